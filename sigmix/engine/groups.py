"""Layers that read the same input (queries, keys and values; gate and up), found by watching one pass.

What several layers compute of one input can be computed in one matmul when the first of them is called. That is decided
anew in every pass by the identity of the input, so a model that calls them otherwise only loses the gain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sigmix.engine.modes import as_base
from sigmix.svf.layer import SVFLinear


@dataclass(frozen=True)
class Group:
    """Adapted layers with one input.

    Attributes:
        paths: their names, in the order of the model's adapted layers. layers: the layers.
        first: place of the first one's z in a vector over all layers, see `sigmix.experts.layout`.
        place: of the first one among all adapted layers.
    """

    paths: tuple[str, ...]
    layers: tuple[SVFLinear, ...]
    first: int
    place: int

    @property
    def sizes(self) -> list[int]:
        """Output features of each."""
        return [layer.out_features for layer in self.layers]

    @property
    def ranks(self) -> list[int]:
        """Singular values of each."""
        return [layer.r for layer in self.layers]

    def weight(self, others: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """The layers' weights [Σ out, in] below each other; ``others`` replaces some by name."""
        mats = [(others or {}).get(path, layer.matrix()) for path, layer in zip(self.paths, self.layers, strict=True)]
        return mats[0] if len(mats) == 1 else torch.cat(mats)

    def bias(self) -> torch.Tensor | None:
        """The layers' biases [Σ out], zeros for those without; None if none has one."""
        biases = [layer.get_base_layer().bias for layer in self.layers]
        if all(bias is None for bias in biases):
            return None
        weight = self.layers[0].matrix()
        parts = [weight.new_zeros(m) if b is None else b.data for m, b in zip(self.sizes, biases, strict=True)]
        return torch.cat(parts)


def find_groups(model: Any, layers: Mapping[str, SVFLinear], every: bool = False) -> list[Group]:
    """All adapted `torch.nn.Linear` layers, those together that a pass of the base calls in turn with one tensor.

    Args:
        model: a causal language model, wrapped by PEFT or not. every: GPT-2's `Conv1D` layers too.
    """

    def fits(path: str) -> bool:
        return every or type(layers[path].get_base_layer()) is nn.Linear

    calls: list[tuple[str, torch.Tensor]] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args, path=path: calls.append((path, args[0])))
        for path, layer in layers.items()
    ]
    device = model.get_input_embeddings().weight.device
    try:
        with torch.no_grad(), as_base(layers):
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    names = list(layers)
    offsets = dict(zip(names, [0, *torch.tensor([layers[name].r for name in names]).cumsum(0).tolist()], strict=False))
    once = {path for path in names if sum(path == called for called, _ in calls) == 1}
    found: list[list[str]] = []
    last: torch.Tensor | None = None
    for path, x in calls:
        if not fits(path) or path not in once:
            last = None
            continue
        follows = found and names.index(path) == names.index(found[-1][-1]) + 1  # so that their z lie side by side
        if x is last and follows:
            found[-1].append(path)
        else:
            found.append([path])
        last = x
    seen = {path for group in found for path in group}
    found += [[path] for path in names if path not in seen and fits(path)]
    return [Group(tuple(g), tuple(layers[p] for p in g), offsets[g[0]], names.index(g[0])) for g in found]


class Shared:
    """Computes the outputs of a group's layers together and hands them out one by one.

    Args:
        compute: x [B, T, in] -> a tensor for each layer.
    """

    def __init__(self, compute: Callable[[torch.Tensor], Sequence[torch.Tensor]]) -> None:
        self.compute = compute
        self._x: torch.Tensor | None = None
        self._parts: list[torch.Tensor | None] = []

    def take(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """The output of layer ``number`` for x."""
        if x is not self._x or self._parts[number] is None:
            self._x, self._parts = x, list(self.compute(x))
        part, self._parts[number] = self._parts[number], None
        if all(other is None for other in self._parts):
            self._x = None
        return part  # type: ignore[return-value]


Patch = tuple[nn.Module, str]


class Patches:
    """Functions put on modules in place of their own, and taken off again."""

    def __init__(self) -> None:
        self._made: list[Patch] = []

    def put(self, module: nn.Module, name: str, function: Any) -> None:
        object.__setattr__(module, name, function)
        self._made.append((module, name))

    def remove(self) -> None:
        for module, name in self._made:
            object.__delattr__(module, name)
        self._made = []
