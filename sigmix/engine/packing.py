"""Packed weights for half-precision passes on the CPU.

A bfloat16 matmul of few rows spends much of its time on bringing the weight into the layout that the kernel wants, anew
in every call. oneDNN can do that once; the results are the same, bit for bit. The packed copies are kept beside the
weights (the base has to stay as it is), so this is for models whose copies fit a budget.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sigmix.engine.groups import Group, Patches, Shared, find_groups
from sigmix.svf.layer import SVFLinear
from sigmix.svf.scale import scaled
from sigmix.svf.weights import is_quantised

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

    Layers with one input are one matmul, see `sigmix.engine.groups`.

    Args:
        model: any model. layers: its adapted layers.
        budget: bytes of copies of the base's weights and factors; where they would not fit none are made. Those of
            merged weights are counted by `MergedWeights`; the truncated form adds one more copy of the base.

    Attributes:
        on: whether copies are made: on the CPU, in bfloat16, within the budget, where torch can.
        groups: the adapted layers by input; none while copies are not made.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, SVFLinear], budget: int = BUDGET) -> None:
        own = {id(layer.get_base_layer()) for layer in layers.values()}
        linears = [module for module in model.modules() if type(module) is nn.Linear]
        self.others = [module for module in linears if id(module) not in own]
        size = sum(module.weight.nbytes for module in linears)
        size += sum(2 * layer.r * (layer.in_features + layer.out_features) for layer in layers.values())
        kinds = {(module.weight.device.type, module.weight.dtype) for module in linears}
        plain = not any(is_quantised(module.weight) for module in linears)
        self.on = plain and kinds == {("cpu", torch.bfloat16)} and size <= budget and available()
        self.groups: list[Group] = find_groups(model, layers) if self.on and layers else []
        self._known: dict[Any, tuple[Any, Pack]] = {}

    def of(self, key: Any, weights: Sequence[torch.Tensor], make: Callable[[], torch.Tensor] | None = None) -> Pack:
        """The packed copy under a key, made anew if the weights are other tensors or were changed in place.

        Args:
            key: any. weights: what it is made from. make: how; None: it is the one weight itself.
        """
        state = [(weight.data_ptr(), weight._version) for weight in weights]
        known = self._known.get(key)
        if known is None or known[0][0] != state:
            # the weights are held, so that no other ones can get their addresses
            held = [weight.detach() for weight in weights]
            known = self._known[key] = ((state, held), pack(weights[0] if make is None else make()))
        return known[1]

    def merged(self, weights: Mapping[str, torch.Tensor]) -> dict[str, Pack]:
        """Packed copies for merged weights, by the first path of each group that has one."""
        if not self.on:
            return {}
        return {
            group.paths[0]: pack(group.weight(weights))
            for group in self.groups
            if any(path in weights for path in group.paths)
        }

    @contextmanager
    def using(self, merged: Mapping[str, Pack] | None, form: str | None) -> Iterator[None]:
        """Inside, linear layers compute with packed weights.

        Args:
            merged: packed W'(z) by the first path of each group that holds one.
            form: of a mixed batch, or None where all rows are alike.
        """
        patches = Patches()
        try:
            if self.on:
                for module in self.others:
                    weight = self.of(id(module), [module.weight])
                    patches.put(module, "forward", functools.partial(_forward, module, weight))
                for group in self.groups:
                    if form == "factored":
                        self._factored(group, patches)
                    else:
                        packed = (merged or {}).get(group.paths[0])
                        self._plain(group, self.base(group) if packed is None else packed, patches)
            yield
        finally:
            patches.remove()

    def base(self, group: Group) -> Pack:
        """A group's packed base weights."""
        return self.of(group.paths[0], [layer.get_base_layer().weight for layer in group.layers], group.weight)

    def _plain(self, group: Group, packed: Pack, patches: Patches) -> None:
        bias, sizes = group.bias(), group.sizes
        shared = Shared(lambda x: packed_linear(x, packed, bias).split(sizes, -1))
        for number, layer in enumerate(group.layers):
            base = layer.get_base_layer()
            assert isinstance(base, nn.Linear)  # `find_groups` leaves the others out
            patches.put(base, "forward", functools.partial(_shared, base, shared, number))

    def _factored(self, group: Group, patches: Patches) -> None:
        factors = [layer.factors() for layer in group.layers]
        key, firsts = group.paths[0], [first for first, _ in factors]
        first = self.of((key, 1), firsts, lambda: firsts[0] if len(firsts) == 1 else torch.cat(firsts))
        seconds = [self.of((path, 2), [second]) for path, (_, second) in zip(group.paths, factors, strict=True)]
        ranks = group.ranks
        shared = Shared(lambda x: packed_linear(x, first, None).split(ranks, -1))
        for number, (layer, second) in enumerate(zip(group.layers, seconds, strict=True)):
            patches.put(layer, "_factored", functools.partial(_factored, layer, shared, number, second))


def _plain_pass(x: torch.Tensor) -> bool:
    return torch.is_grad_enabled() or x.dtype != torch.bfloat16


def _forward(module: nn.Linear, packed: Pack, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, module.weight, module.bias) if _plain_pass(x) else packed_linear(x, packed, module.bias)


def _shared(module: nn.Linear, shared: Shared, number: int, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, module.weight, module.bias) if _plain_pass(x) else shared.take(number, x)


def _factored(
    layer: SVFLinear,
    shared: Shared,
    number: int,
    second: Pack,
    x: torch.Tensor,
    z: torch.Tensor,
    gain: torch.Tensor | None = None,
) -> torch.Tensor:
    if _plain_pass(x):
        return SVFLinear._factored(layer, x, z, gain)
    return packed_linear(scaled(shared.take(number, x), z, gain), second, layer.get_base_layer().bias)
