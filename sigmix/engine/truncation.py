"""The truncated form for a whole model: what experts do to every group of layers, in a few directions each, with the
error known before it runs. `sigmix.engine.calibration` finds the directions and chooses how many.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from sigmix.engine.groups import Group, Patches, Shared
from sigmix.engine.packing import Packing, packed_linear
from sigmix.errors import ConfigError
from sigmix.svf.subspace import LowRank


@dataclass
class Truncation:
    """A plan for mixtures of given experts.

    Attributes:
        groups: of the model. parts: a group's replacement by its first path; groups without one are the base's.
        error: expected share of what the experts do to the layers' outputs (squared, over the calibration's inputs,
            each layer in units of its own output) that is lost. cost: extra multiply-adds per token, as a share of
            the base's. experts: {name: digest}, in the order of the parts' cores. facts: how it was fitted.
        serial: of this object, to tell plans apart.
    """

    groups: list[Group]
    parts: dict[str, LowRank]
    error: float
    cost: float
    experts: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    serial: int = field(default_factory=itertools.count(1).__next__)

    def describe(self) -> str:
        """One line, to be printed before use."""
        ins = sum(len(part.inputs) for part in self.parts.values())
        outs = sum(part.outputs.shape[1] for part in self.parts.values())
        return (
            f"truncated: {ins} input and {outs} output directions in {len(self.parts)} of {len(self.groups)} groups "
            f"of layers, {self.cost:.1%} more work, expected error {self.error:.1%} of what the experts do"
        )

    @contextmanager
    def using(self, packing: Packing, alphas: torch.Tensor, places: list[int]) -> Iterator[Any]:
        """Inside, adapted layers compute W x + Q core_b A x for row b.

        Args:
            packing: of the model.
            alphas: [D, K, M], mixing weights of distinct mixes over the plan's experts, at every adapted matrix.
            places: row b of the batch is computed under alphas[places[b]].

        Yields:
            A function that keeps only the rows with given indices; None: all again.
        """
        cores = {}
        for group in self.groups:
            if (part := self.parts.get(group.paths[0])) is not None:
                own = alphas[:, :, group.place : group.place + len(group.paths)].to(part.cores.device)
                # transposed, because rows multiply it from the left
                cores[group.paths[0]] = part.core(own)[places].transpose(1, 2).contiguous()
        now = dict(cores)

        def keep(indices: list[int] | None) -> None:
            now.update(cores if indices is None else {path: core[indices] for path, core in cores.items()})

        patches = Patches()
        try:
            for group in self.groups:
                self._patch(group, packing, now, patches)
            yield keep
        finally:
            patches.remove()

    def _patch(self, group: Group, packing: Packing, now: dict[str, torch.Tensor], patches: Patches) -> None:
        key, part, sizes = group.paths[0], self.parts.get(group.paths[0]), group.sizes
        if part is None:  # the layers are switched to the base already
            return
        if packing.on:
            bases = [layer.get_base_layer().weight for layer in group.layers]
            first = packing.of((key, "in"), [*bases, part.inputs], lambda: torch.cat([group.weight(), part.inputs]))
            second = packing.of((key, "out"), [part.outputs], lambda: part.outputs)
            bias = group.bias()
            if bias is not None:
                bias = torch.cat([bias, bias.new_zeros(len(part.inputs))])
            total = sum(sizes)

            def packed(x: torch.Tensor) -> Sequence[torch.Tensor]:
                both = packed_linear(x, first, bias)
                inner = _mixed(both[..., total:], now[key])
                return (both[..., :total] + packed_linear(inner, second, None)).split(sizes, -1)

            shared = Shared(packed)
        else:

            def plain(x: torch.Tensor) -> Sequence[torch.Tensor]:
                change = F.linear(_mixed(F.linear(x, part.inputs), now[key]), part.outputs).split(sizes, -1)
                return [layer.base_layer(x) + own for layer, own in zip(group.layers, change, strict=True)]

            shared = Shared(plain)
        for number, layer in enumerate(group.layers):
            patches.put(layer, "forward", functools.partial(_take, shared, number))


def _mixed(h: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
    """h [B, T, k] times each row's own core [B, k, j]."""
    if h.shape[1] == 1:  # where a batched matmul would call a kernel for every row
        return (h.transpose(1, 2) * core).sum(1, keepdim=True)
    return torch.bmm(h, core)


def _take(shared: Shared, number: int, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    # 2-d inputs (experts of a mixture, flattened tokens) have lost their rows
    if x.ndim != 3:
        raise ConfigError("the truncated form needs inputs [rows, tokens, features]", remedy="use form='factored'")
    return shared.take(number, x)
