"""Fitting the truncated form: which directions, and how many of them for every group of layers.

`fit` watches the inputs of the layers on some prompts and finds each group's subspaces (`sigmix.svf.subspace`). A pair
of sizes per group is then chosen for all groups at once: every group takes the one that minimises lost + λ · cost, and
λ is the price at which the whole model loses just the budget (a Lagrangian; each group's trade is on its own convex
hull). A size may be 0: then a group is the base's and costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sigmix.engine.groups import Group, find_groups
from sigmix.engine.modes import as_base
from sigmix.engine.prefix import left_pad
from sigmix.engine.truncation import Truncation
from sigmix.errors import ConfigError
from sigmix.svf.subspace import Subspace, subspace

INPUTS = (4, 8, 12, 16, 20, 24, 32, 48)
OUTPUTS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of directions that are tried, and the largest."""
EXACT = 1e-4
"""Share lost to rounding in float32 that counts as nothing."""
CALL = 300_000
"""Multiply-adds per row that the extra calls of one group are worth (measured: about 50 µs at 32 rows)."""


@dataclass
class Calibration:
    """Subspaces at full size, from which plans of any budget are cut."""

    groups: list[Group]
    full: dict[str, Subspace]
    gains: dict[str, list[torch.Tensor]]
    base_cost: int
    experts: dict[str, str]
    facts: dict[str, Any]
    like: torch.Tensor

    def plan(self, budget: float) -> Truncation:
        """The cheapest sizes that lose at most ``budget`` (a share) of what the experts do.

        Raises:
            ConfigError: the budget is no share, or even all directions that were fitted lose more.
        """
        check_budget(budget)
        whole = sum(part.total for part in self.full.values()) or 1.0

        def lost(sizes: Mapping[str, tuple[int, int]]) -> float:
            return sum(self.full[key].lost(*pair) * self.full[key].total for key, pair in sizes.items()) / whole

        low, high = -12.0, 3.0  # of the price's logarithm: from "everything" to "nothing"
        sizes = self._sizes(10**low)
        if lost(sizes) > max(budget, EXACT):
            raise ConfigError(
                f"an error budget of {budget:.1%} is out of reach: all fitted directions lose {lost(sizes):.1%}",
                remedy="allow more, fit with more directions, or use form='factored', which is exact",
            )
        for _ in range(40):
            middle = (low + high) / 2
            trial = self._sizes(10**middle)
            if lost(trial) <= budget:
                low, sizes = middle, trial
            else:
                high = middle
        parts = {k: self.full[k].cut(*pair, self.gains[k], self.like) for k, pair in sizes.items() if min(pair)}
        cost = sum(self._cost(group, *sizes[group.paths[0]], call=0) for group in self.groups) / self.base_cost
        return Truncation(self.groups, parts, lost(sizes), cost, self.experts, {**self.facts, "budget": budget})

    def _sizes(self, price: float) -> dict[str, tuple[int, int]]:
        whole = sum(part.total for part in self.full.values()) or 1.0
        found = {}
        for group in self.groups:
            part = self.full[group.paths[0]]
            most = tuple(size - 1 for size in part.captured.shape)
            options = [(j, k) for j in {*OUTPUTS, most[0]} for k in {*INPUTS, most[1]} if j <= most[0] and k <= most[1]]
            options = [(0, 0), *sorted(options)]
            share = part.total / whole
            values = [part.lost(*pair) * share + price * self._cost(group, *pair) / 1e6 for pair in options]
            found[group.paths[0]] = options[values.index(min(values))]
        return found

    @staticmethod
    def _cost(group: Group, j: int, k: int, call: int = CALL) -> int:
        return k * group.layers[0].in_features + j * sum(group.sizes) + j * k + call * (k > 0)


def check_budget(budget: float) -> None:
    """Raise `ConfigError` unless an error budget is a share."""
    if not 0 <= budget <= 1:
        raise ConfigError(f"an error budget is a share from 0 to 1, not {budget}")


@torch.no_grad()
def fit(
    engine: Any,
    prompts: Sequence[Any],
    experts: Sequence[str],
    *,
    max_new_tokens: int = 16,
    outputs: int = OUTPUTS[-1],
    inputs: int = INPUTS[-1],
) -> Calibration:
    """Watch the layers' inputs on prompts and the experts' own answers to them.

    Args:
        engine: an `Engine`. prompts: training prompts of what the experts are for; user turns or token ids.
        experts: names; prompt i is answered by experts[i % K].
        outputs, inputs: largest numbers of directions of a group.

    Raises:
        ConfigError: no prompts or no experts.
    """
    if not prompts or not experts:
        raise ConfigError("a truncation is fitted on at least one prompt and one expert")
    rows = [engine.encode(prompt) for prompt in prompts]
    mixes = engine.mixes([experts[number % len(experts)] for number in range(len(rows))], len(rows))
    answers = engine.generate(rows, mixes, max_new_tokens=max_new_tokens)
    whole = [row + answer.ids for row, answer in zip(rows, answers, strict=True)]
    groups = find_groups(engine.model, engine.layers, every=True)
    seconds = _second_moments(engine, groups, whole)
    table = torch.stack([engine.states.z(mix) for mix in engine.mixes(list(experts), len(experts))])
    full, every = {}, {}
    for group in groups:
        second = seconds.pop(group.paths[0])
        single = second.float()
        gains = list((table[:, group.first : group.first + sum(group.ranks)] - 1).split(group.ranks, 1))
        every[group.paths[0]] = gains
        factors, sizes = [], []
        for layer in group.layers:
            first, last = layer.factors()  # [r, in], [out, r]
            factors.append((last.float().cpu(), first.float().cpu().T))
            weight = layer.matrix().float().cpu()
            sizes.append(((weight @ single) * weight).sum())
        full[group.paths[0]] = subspace(factors, gains, sizes, second, outputs, inputs)
    digests = {name: engine.bank[name].digest for name in experts}
    facts = {"prompts": len(rows), "tokens": sum(map(len, whole))}
    return Calibration(groups, full, every, _work(engine), digests, facts, next(iter(engine.layers.values())).matrix())


def keep_components(engine: Any, experts: Sequence[str], budget: float) -> tuple[float, float]:
    """The plain way, without prompts: singular components with the most energy for their cost, over all matrices.

    Sets every layer's ``k``, which ``form="truncated"`` goes by while the engine has no `Truncation`.

    Returns:
        The expected squared error of the weights as a share of Σ (s g)² over the experts, at most ``budget``; and the
        extra multiply-adds per token as a share of the base's.
    """
    names = list(engine.layers)
    gains = [engine.states.layout.split(engine.states.z(mix) - 1) for mix in engine.mixes(list(experts), len(experts))]
    energies, costs = [], []
    for path, layer in engine.layers.items():
        layer.ensure_factors()
        gain = torch.stack([one[path] for one in gains])
        energies.append((layer.svf_s.cpu() * gain).square().sum(0))
        costs.append(torch.full((layer.r,), 2.0 * layer.r))
    energy, cost = torch.cat(energies).double(), torch.cat(costs)
    order = (energy / cost).argsort(descending=True)
    total = float(energy.sum()) or 1.0
    left = 1 - energy[order].cumsum(0) / total
    count = int((left > budget + 1e-12).sum()) + 1 if budget < 1 else 0
    kept = torch.zeros(len(energy), dtype=torch.bool)
    kept[order[:count]] = True
    for path, part in zip(names, kept.split([engine.layers[path].r for path in names]), strict=True):
        engine.layers[path].k = int(part.sum())
    return float(energy[~kept].sum()) / total, float(cost[kept].sum()) / _work(engine)


def _work(engine: Any) -> int:
    """Multiply-adds of the base's linear layers per token."""
    adapted = sum(layer.in_features * layer.out_features for layer in engine.layers.values())
    return adapted + sum(module.weight.numel() for module in engine.packing.others)


def _second_moments(engine: Any, groups: Sequence[Group], rows: list[list[int]], batch: int = 16) -> dict[str, Any]:
    """Mean x xᵀ [in, in] float64 of each group's inputs over all real tokens, by the group's first path."""
    found = {
        group.paths[0]: torch.zeros(*[group.layers[0].in_features] * 2, dtype=torch.float64) for group in groups
    }
    mask = torch.empty(0)

    def watch(key: str) -> Any:
        def hook(_: Any, args: Any) -> None:
            x = args[0].flatten(0, -2)[mask.flatten()].cpu().double()
            found[key] += x.T @ x

        return hook

    handles = [group.layers[0].register_forward_pre_hook(watch(group.paths[0])) for group in groups]
    device = engine.model.get_input_embeddings().weight.device
    try:
        with as_base(engine.layers):
            for start in range(0, len(rows), batch):
                ids, mask = left_pad(rows[start : start + batch], engine.pad_id, device)
                positions = (mask.long().cumsum(1) - 1).clamp_min(0)
                engine.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {key: total / sum(map(len, rows)) for key, total in found.items()}
