"""Pure algebra on gains: mixing, truncation, parameterisations. Tensors in, tensors out; nothing else.

    gain            g = z - 1                                 [r]       zero is the base
    mixture         z' = 1 + Σₖ αₖ (zₖ - 1)                             with Σα = 1 the paper's Σ αₖ zₖ (section 3.3)
    truncation      keep the k components with the largest |s·g|, replace the others' gains by their s²-weighted mean c;
                    squared weight error = Σ_dropped s²(g - c)², never more than Σ_dropped (s·g)² of leaving them out
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

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
        return scaled(grad, z) if ctx.needs_input_grad[0] else None, _summed(grad * h, z)


class Gain(torch.autograd.Function):
    """h * g for h [..., r] of any dtype and g = z - 1, shaped as z in `Scale`; g's gradient is summed in float32.

    The gain form adds this to what the base computes, so g alone is rounded to h's dtype, not z.
    """

    @staticmethod
    def forward(ctx, h, gain):
        ctx.save_for_backward(h, gain)
        return h * gain.to(h.dtype)

    @staticmethod
    def backward(ctx, grad):
        h, gain = ctx.saved_tensors
        return grad * gain.to(grad.dtype) if ctx.needs_input_grad[0] else None, _summed(grad * h, gain)


def _summed(product: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """The gradient of z [r], [B, r] or [B, 1, r] from products [..., r], in float32."""
    if z.ndim == 1:
        return product.reshape(-1, product.shape[-1]).sum(0, dtype=torch.float32)
    return product.float() if product.ndim == 2 else product.sum(1, keepdim=True, dtype=torch.float32)


def scaled(h: torch.Tensor, z: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
    """h [..., r] times z [..., r] (float32), in h's dtype; ``gain``, z - 1 in h's dtype, saves working it out."""
    if h.dtype in (torch.bfloat16, torch.float16):
        # h + h g in one pass: rounding g costs g times as much as rounding z would, and a float32 h is never made
        return torch.addcmul(h, h, (z - 1).to(h.dtype) if gain is None or gain.dtype != h.dtype else gain)
    return (h * z).to(h.dtype)


Tensor = torch.Tensor


def mix_z(zs: Sequence[Tensor], alphas: Sequence[float]) -> Tensor:
    """Effective z [r] of a mixture of experts' z [r] under weights α, one per expert.

    A single expert at weight 1 comes back bit for bit, and no expert at all (or every α zero) gives exact ones.

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


def truncate(gain: Tensor, s: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split gains into a common scale and k corrections.

    Args:
        gain: [..., r]; every row of leading dimensions is a mixture of the same matrix.
        s: [r], singular values.
        k: how many components keep their own gain; the same components for all rows, those with the most energy
            summed over the rows.

    Returns:
        index: int64 [k], ascending. common: [..., 1], the s²-weighted mean gain c of the dropped components, per row.
        error: [...], squared Frobenius error of the weight, Σ_dropped s²(g - c)².
    """
    r = gain.shape[-1]
    if not 0 <= k <= r:
        raise ConfigError(f"k = {k} components asked of a matrix that has {r}")
    power = (s.double() ** 2).expand_as(gain)
    wide = gain.double()
    energy = (power * wide**2).reshape(-1, r).sum(0)
    keep = torch.zeros(r, dtype=torch.bool, device=gain.device)
    keep[energy.topk(k).indices] = True
    dropped = power * ~keep
    total = dropped.sum(-1, keepdim=True)
    common = (dropped * wide).sum(-1, keepdim=True) / total.clamp_min(torch.finfo(torch.float64).tiny)
    error = (dropped * (wide - common) ** 2).sum(-1)
    return keep.nonzero().flatten(), common.to(gain.dtype), error.to(gain.dtype)


def reference_z(p: Tensor, s: Tensor) -> Tensor:
    """The public reference implementation's parameterisation: z = sigmoid(p) · Σs / Σ(s · sigmoid(p)), p [r] -> z [r].

    Its restoring factor is folded into z, so the result is an ordinary expert.
    """
    raw = torch.sigmoid(p)
    return raw * (s.sum() / (s * raw).sum())
