"""Design of the composition experiment: groups of experts and names of their cells."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from reproduction.compose import average, fact, total
from reproduction.merging import method_name
from reproduction.names import BASE, chosen_lr, mix_name, single
from reproduction.report import Report, marks, mean
from reproduction.scale import Scale

FIRST_SEED = ("lora-small-rl", "lora-kl-rl")

MODES = ("average", "sum", "tuned")


def kinds(store: Any, scale: Scale) -> list[str]:
    """The kinds that are compared; the one at SVF's KL only if it is not the sweep's best anyway."""
    more = [kind for kind in FIRST_SEED if kind in scale.kinds]
    if "lora-kl-rl" in more and chosen_lr(store, scale, "lora-kl-rl") == chosen_lr(store, scale, "lora-rl"):
        more.remove("lora-kl-rl")
    return [*scale.compared, *more]


def seeds(scale: Scale, kind: str) -> tuple[int, ...]:
    """Which seeds of a kind are trained."""
    return scale.seeds if kind in scale.compared else scale.seeds[:1]


def groups(scale: Scale, kind: str, seed: int) -> list[tuple[str, ...]]:
    """Which experts are mixed: two, three (all seeds), all (first seed); and the pair in conflict (first seed, of the
    two kinds that are compared most). With `Scale.pairs` every two."""
    found = [scale.tasks[:count] for count in range(2, len(scale.tasks) + 1)]
    if scale.pairs:
        found = [*combinations(scale.tasks, 2), *found]
    if seed == scale.seeds[0]:
        found.append(scale.tasks + scale.extra)
        if scale.conflict and kind in scale.compared:
            found.append(scale.conflict)
    return list(dict.fromkeys(found))


def crossed(scale: Scale) -> tuple[str, ...]:
    """Experts that are also measured on each other's tasks: those of every seed, and the pair in conflict."""
    return tuple(dict.fromkeys(scale.tasks + (scale.conflict or ())))


def weights_of(report: Report, kind: str, seed: int, group: Sequence[str], mode: str) -> dict[str, float] | None:
    """α of a mode or a rule of `reproduction.merging`; None for a tuning that was not run."""
    if mode == "average":
        return average(group)
    if mode == "sum":
        return total(group)
    return (report.store.fact(fact(kind, seed, group, mode)) or {}).get("weights")


def who(report: Report, kind: str, seed: int, group: Sequence[str], mode: str) -> str | None:
    """Name of a mixture's cells."""
    rate = chosen_lr(report.store, report.scale, kind)
    weights = weights_of(report, kind, seed, group, mode)
    if rate is None or weights is None:
        return None
    if mode in MODES:
        return mix_name(kind, rate, weights, seed)
    density = (report.store.fact(fact(kind, seed, group, mode)) or {}).get("density")
    return mix_name(kind, rate, weights, seed, method_name(mode, density))


def rows_of(report: Report, kind: str, group: Sequence[str], mode: str) -> dict[int, list[bool]]:
    """{seed: marks on all members' items in turn} of complete mixtures."""
    found = {}
    for seed in seeds(report.scale, kind):
        if group not in groups(report.scale, kind, seed):
            continue
        if mode == "alone":
            results = [report.result(task, single(report.store, report.scale, kind, task, seed)) for task in group]
        elif mode == BASE:
            results = [report.result(task, BASE) for task in group]
        else:
            results = [report.result(task, who(report, kind, seed, group, mode)) for task in group]
        if all(one is not None for one in results):
            found[seed] = [mark for one in results if one is not None for mark in marks(one)]
    return found


def retention(report: Report, kind: str, group: Sequence[str], mode: str) -> list[float]:
    """Per seed: share of the experts' gain over the base that is left in the mixture, over the members' tasks."""
    ours, alone = rows_of(report, kind, group, mode), rows_of(report, kind, group, "alone")
    base = rows_of(report, kind, group, BASE)
    return [
        (mean(ours[seed]) - mean(base[seed])) / (mean(alone[seed]) - mean(base[seed]))
        for seed in ours
        if seed in alone and seed in base and mean(alone[seed]) > mean(base[seed])
    ]
