"""z as a module's parameter, and h ⊙ z with a gradient for z."""

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
        if z.ndim == 1:
            dz = (grad * h).reshape(-1, h.shape[-1]).sum(0, dtype=torch.float32)
        elif h.ndim == 2:
            dz = (grad * h).float()
        else:
            dz = (grad * h).sum(1, keepdim=True, dtype=torch.float32)
        return scaled(grad, z) if ctx.needs_input_grad[0] else None, dz


def scaled(h: torch.Tensor, z: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
    """h [..., r] times z [..., r] (float32), in h's dtype; ``gain``, z - 1 in h's dtype, saves working it out."""
    if h.dtype in (torch.bfloat16, torch.float16):
        # h + h g in one pass: rounding g costs g times as much as rounding z would, and a float32 h is never made
        return torch.addcmul(h, h, (z - 1).to(h.dtype) if gain is None or gain.dtype != h.dtype else gain)
    return (h * z).to(h.dtype)
