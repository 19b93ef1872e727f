"""Algebra on gains: mixing, scaling, parameterizations.

    gain            g = z - 1                                 [r]       zero is the base
    mixture         z' = 1 + Σₖ αₖ (zₖ - 1)                             with Σα = 1 the paper's Σ αₖ zₖ (section 3.3)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sigmix.errors import ConfigError


class Scale(torch.autograd.Function):
    """h * z for h [..., r] of any dtype and float32 z [r], [B, r] or [B, 1, r]; z's gradient is summed in float32.

    z itself is not rounded to h's dtype: the bfloat16 numbers next to 1 are 0.996 and 1.008. Rounded products keep
    gains above 0.002 on average; smaller ones vanish in bfloat16 in every form.
    """

    @staticmethod
    def forward(ctx, h, z):
        ctx.save_for_backward(h, z)
        return scaled(h, z)

    @staticmethod
    def backward(ctx, grad):
        h, z = ctx.saved_tensors
        return scaled(grad, z) if ctx.needs_input_grad[0] else None, _sum_rows(grad * h, z)


class Gain(torch.autograd.Function):
    """h * g for h [..., r] of any dtype and g = z - 1, shaped as z in `Scale`; g's gradient is summed in float32.

    The gain form adds this to the base's output, so only g is rounded to h's dtype.
    """

    @staticmethod
    def forward(ctx, h, gain):
        ctx.save_for_backward(h, gain)
        return h * gain.to(h.dtype)

    @staticmethod
    def backward(ctx, grad):
        h, gain = ctx.saved_tensors
        return grad * gain.to(grad.dtype) if ctx.needs_input_grad[0] else None, _sum_rows(grad * h, gain)


def _sum_rows(product: Tensor, z: Tensor) -> Tensor:
    """Gradient of z [r], [B, r] or [B, 1, …, r] from products [..., r], in float32."""
    if z.ndim == 1:
        return product.reshape(-1, product.shape[-1]).sum(0, dtype=torch.float32)
    inner = tuple(range(1, product.ndim - 1))
    return product.sum(inner, keepdim=True, dtype=torch.float32) if inner else product.float()


def z_per_row(z: Tensor, x: Tensor) -> Tensor:
    """Shape z [B, r] for inputs x with a first dimension of B rows, or of the tokens of all rows, row by row.

    Raises:
        ConfigError: x has neither.
    """
    if x.ndim == 3:
        return z.unsqueeze(1)
    if x.ndim == 2 and len(z) not in (1, len(x)):
        if len(x) % len(z):
            raise ConfigError(f"an input of {len(x)} tokens cannot be split into {len(z)} rows")
        return z.repeat_interleave(len(x) // len(z), 0)
    return z.reshape(len(z), *[1] * (x.ndim - 2), -1)


def scaled(h: Tensor, z: Tensor, gain: Tensor | None = None) -> Tensor:
    """Return h [..., r] times z [..., r] (float32), in h's dtype; ``gain``: z - 1 in h's dtype, if available."""
    if h.dtype in (torch.bfloat16, torch.float16):
        # h + h g in one pass: rounding g costs g times as much as rounding z would, and no float32 h is allocated
        return torch.addcmul(h, h, (z - 1).to(h.dtype) if gain is None or gain.dtype != h.dtype else gain)
    return (h * z).to(h.dtype)


def mix_z(zs: Sequence[Tensor], alphas: Sequence[float]) -> Tensor:
    """Return the effective z [r] of a mixture of z [r] with one weight α each.

    A single expert at weight 1 is returned bit for bit; no expert (or only zero weights) gives exact ones.

    Raises:
        ConfigError: lengths differ, or an α is not finite.
    """
    if len(zs) != len(alphas):
        raise ConfigError(f"{len(zs)} experts need {len(zs)} mixing weights, not {len(alphas)}")
    if not all(math.isfinite(a) for a in alphas):
        raise ConfigError(f"mixing weights must be finite numbers, not {list(alphas)}")
    active = [(z, float(a)) for z, a in zip(zs, alphas, strict=True) if a != 0]
    if not active:
        return torch.ones_like(zs[0]) if zs else torch.ones(0)
    if len(active) == 1 and active[0][1] == 1.0:
        return active[0][0].clone()  # 1 + (z - 1) would round
    gain = torch.zeros_like(active[0][0], dtype=torch.float64)
    for z, alpha in active:
        gain += alpha * (z.double() - 1)
    return (1 + gain).to(active[0][0].dtype)


def reference_z(p: Tensor, s: Tensor) -> Tensor:
    """Return z [r] of the public reference implementation's parameters p [r]: sigmoid(p) · Σs / Σ(s · sigmoid(p)).

    Its restoring factor is folded into z, so the result is an ordinary expert.
    """
    raw = torch.sigmoid(p)
    return raw * (s.sum() / (s * raw).sum())
