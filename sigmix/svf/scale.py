"""z as a module's parameter, h ⊙ z with a gradient for z, and h ⊙ g with one for g."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn


class SingularScale(nn.Module):
    """Holder of one z: `weight`, float32 [r]. A module, so that names end in ``.<adapter>.weight`` (PEFT, TRL)."""

    def __init__(self, r: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(r, dtype=torch.float32, device=device))

    def _apply(self, fn, recurse=True):
        # z stays float32 in model.bfloat16(): bfloat16 has no number between 1 and 1.0078
        kept = {name: parameter.data for name, parameter in self._parameters.items() if parameter is not None}
        super()._apply(fn, recurse)
        for name, data in kept.items():
            if self._parameters[name].dtype != data.dtype:
                self._parameters[name].data = data.to(self._parameters[name].device)
        return self


if TYPE_CHECKING:

    class Scales(nn.ModuleDict):
        """`SingularScale`s by adapter."""

        def __getitem__(self, key: str) -> SingularScale: ...

else:
    Scales = nn.ModuleDict


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
