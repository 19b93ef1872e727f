"""Packed weights for half-precision passes on the CPU.

A bfloat16 matmul of few rows spends much of its time on bringing the weight into the layout that the kernel wants, anew
in every call. oneDNN can do that once; the results are the same, bit for bit. The packed copies are kept beside the
weights (the base has to stay as it is), so this is for models whose copies fit a budget.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sigmix.svf.layer import SVFLinear
from sigmix.svf.scale import scaled

BUDGET = 2 << 30
"""Bytes of packed copies that an engine makes by default."""
ROWS = 32
"""Rows that the layout is chosen for; it serves others as well."""

Pack = Any
"""An opaque tensor of oneDNN's."""


def pack(weight: torch.Tensor) -> Pack:
    """The packed copy of a weight [out, in]."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)


def packed_linear(x: torch.Tensor, packed: Pack, bias: torch.Tensor | None) -> torch.Tensor:
    """`torch.nn.functional.linear` with a packed weight; no gradients."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


@functools.cache
def available() -> bool:
    """Whether this torch has the operators and they agree with `linear` here, tried once."""
    try:
        draw = torch.Generator().manual_seed(0)
        weight = torch.randn(48, 32, generator=draw).bfloat16()
        x = torch.randn(2, 3, 32, generator=draw).bfloat16()
        bias = torch.randn(48, generator=draw).bfloat16()
        same = [
            torch.allclose(
                packed_linear(x, pack(weight), b).float(), F.linear(x, weight, b).float(), rtol=0.02, atol=0.02
            )
            for b in (None, bias)
        ]
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return all(same)


class Packing:
    """Packed copies of a model's weights, and the switch that makes its layers use them.

    Args:
        model: any model. layers: its adapted layers. budget: bytes of copies; where they would not fit none are made.

    Attributes:
        on: whether copies are made: on the CPU, in bfloat16, within the budget, where torch can.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, SVFLinear], budget: int = BUDGET) -> None:
        self.layers = layers
        own = {id(layer.get_base_layer()) for layer in layers.values()}
        linears = [module for module in model.modules() if type(module) is nn.Linear]
        self.others = [module for module in linears if id(module) not in own]
        size = sum(module.weight.nbytes for module in linears)
        size += sum(2 * layer.r * (layer.in_features + layer.out_features) for layer in layers.values())
        kinds = {(module.weight.device.type, module.weight.dtype) for module in linears}
        self.on = kinds == {("cpu", torch.bfloat16)} and size <= budget and available()
        self._known: dict[Any, tuple[torch.Tensor, int, Pack]] = {}

    def of(self, key: Any, weight: torch.Tensor, version: int = 0) -> Pack:
        """The packed copy under a key, made anew if the weight is another tensor or was changed in place."""
        known = self._known.get(key)
        if known is None or known[0].data_ptr() != weight.data_ptr() or known[1] != version:
            # the weight is held, so that no other one can get its address
            known = self._known[key] = (weight.detach(), version, pack(weight))
        return known[2]

    @contextmanager
    def using(self, merged: Mapping[str, Pack] | None, form: str | None) -> Iterator[None]:
        """Inside, linear layers compute with packed weights.

        Args:
            merged: packed W'(z) of the layers that hold one. form: of a mixed batch, or None where all rows are alike.
        """
        changed: list[tuple[nn.Module, str]] = []

        def put(module: nn.Module, name: str, function: Any) -> None:
            object.__setattr__(module, name, function)
            changed.append((module, name))

        try:
            if self.on:
                for module in self.others:
                    put(module, "forward", functools.partial(_forward, module, self._weight(module)))
                for path, layer in self.layers.items():
                    base = layer.get_base_layer()
                    if type(base) is not nn.Linear:
                        continue
                    if form == "factored":
                        put(layer, "_factored", functools.partial(_factored, layer, *self._factors(path, layer)))
                    else:
                        packed = (merged or {}).get(path)
                        packed = self._weight(base) if packed is None else packed
                        put(base, "forward", functools.partial(_forward, base, packed))
            yield
        finally:
            for module, name in changed:
                object.__delattr__(module, name)

    def _weight(self, module: nn.Linear) -> Pack:
        return self.of(id(module), module.weight, module.weight._version)

    def _factors(self, path: str, layer: SVFLinear) -> tuple[Pack, Pack]:
        first, second = layer.factors()
        return self.of((path, 1), first), self.of((path, 2), second)


def _forward(module: nn.Linear, packed: Pack, x: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() or x.dtype != torch.bfloat16:
        return F.linear(x, module.weight, module.bias)
    return packed_linear(x, packed, module.bias)


def _factored(
    layer: SVFLinear, first: Pack, second: Pack, x: torch.Tensor, z: torch.Tensor, gain: torch.Tensor | None = None
) -> torch.Tensor:
    if torch.is_grad_enabled() or x.dtype != torch.bfloat16:
        return SVFLinear._factored(layer, x, z, gain)
    return packed_linear(scaled(packed_linear(x, first, None), z, gain), second, layer.get_base_layer().bias)
