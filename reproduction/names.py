"""Names of runs and cells, and the learning rate that a sweep chose, from stored records alone.

A run's name says what decides it beside the scale (to which `Lab.begin` holds a store): kind, rate, task, seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean

from reproduction.scale import Scale
from reproduction.store import Store

BASE = "base"


def run_name(kind: str, lr: float, task: str, seed: int, after: Sequence[str] = ()) -> str:
    """Return the name of a training run; ``after``: earlier tasks of the same adapter."""
    return f"{kind}@{lr:g}.{'+'.join([*after, task])}.s{seed}"


def run_as(name: str, positions: str) -> str:
    """Return the name of the cells of a run with z at other positions than in its training."""
    return f"{name}.as-{positions}"


def mix_name(kind: str, lr: float, weights: Mapping[str, float], seed: int, method: str = "mix") -> str:
    """Return the name of a merge of adapters of one kind and seed, one per task; "mix" is their weighted sum."""
    return f"{kind}@{lr:g}.{method}.{'+'.join(f'{task}={alpha:g}' for task, alpha in weights.items())}.s{seed}"


def runs_of(store: Store, kind: str, task: str, seed: int) -> dict[float, dict]:
    """{learning rate: record} of the runs of a kind on a task, ascending."""
    found = {}
    for run in store.runs().values():
        if (run.get("kind"), run.get("task"), run.get("seed"), run.get("after")) == (kind, task, seed, []):
            found[float(run["lr"])] = run
    return dict(sorted(found.items()))


def sweep_tasks(scale: Scale, kind: str) -> tuple[str, ...]:
    """Return the tasks of a kind's sweep."""
    return scale.kinds[kind].sweep or (scale.sweep,)


def swept(store: Store, scale: Scale, kind: str) -> dict[float, list[dict]]:
    """{learning rate: records, one per task} of a kind's sweep, ascending; of rates with a run on every task."""
    first, *others = (runs_of(store, kind, task, scale.seeds[0]) for task in sweep_tasks(scale, kind))
    return {lr: [run, *(one[lr] for one in others)] for lr, run in first.items() if all(lr in one for one in others)}


BEYOND = 2
"""Maximum number of rates that a sweep adds beyond its initial ones."""


def next_rate(tried: Mapping[float, float], begun: Sequence[float]) -> float | None:
    """The rate that a sweep tries next, or None when it is done.

    Args:
        tried: {rate: validation accuracy} so far. begun: rates that every sweep begins with, ascending by one factor.

    It begins with all of ``begun`` and, while the best rate (the lowest of equal ones) is at an end, goes on beyond it,
    `BEYOND` times at most.
    """
    for lr in begun:
        if lr not in tried:
            return lr
    if len(begun) < 2 or len(tried) >= len(begun) + BEYOND:
        return None
    best, ratio = best_rate(tried), begun[1] / begun[0]
    if best not in (min(tried), max(tried)):
        return None
    # two digits, so that the rate reads well and names stay stable
    return float(f"{best * ratio if best == max(tried) else best / ratio:.2g}")


def best_rate(tried: Mapping[float, float]) -> float:
    """The rate with the best accuracy, the lowest of equal ones."""
    return max(tried, key=lambda lr: (tried[lr], -lr))


def accuracies(runs: Mapping[float, Sequence[Mapping]]) -> dict[float, float]:
    """{rate: best validation accuracy, mean of the tasks} of a sweep's records."""
    return {lr: mean(run["best"]["accuracy"] for run in own) for lr, own in runs.items()}


def chosen_lr(store: Store, scale: Scale, kind: str) -> float | None:
    """The learning rate with the best validation accuracy in the sweep, the lowest of equal ones; None before it ran.

    A kind that is ``like`` another takes that one's, or the one that matches in KL (`Kind.match`).
    """
    own = scale.kinds[kind]
    tried = swept(store, scale, own.like or kind)
    if not tried:
        return None
    if own.match is None:
        return best_rate(accuracies(tried))
    model = chosen_lr(store, scale, own.match)
    if model is None:
        return None
    goal = mean(map(kl_of, swept(store, scale, own.match)[model]))
    return min(tried, key=lambda lr: abs(math.log((mean(map(kl_of, tried[lr])) + 1e-6) / (goal + 1e-6))))


def kl_of(run: Mapping) -> float:
    """KL per token to the base on the rollouts of the step before the checkpoint that a run gave; 0 for the base."""
    last = [entry["kl"] for entry in run["history"] if entry["kind"] == "step" and entry["step"] < run["best"]["step"]]
    return float(last[-1]) if last else 0.0


def kl_coefficient(run: Mapping) -> float:
    """The run's `TrainConfig.beta`; records of the published results carry its former name, ``kl_weight``."""
    config = run["config"]
    return float(config["beta"] if "beta" in config else config["kl_weight"])


def single(store: Store, scale: Scale, kind: str, task: str, seed: int) -> str | None:
    """Name of the run at the chosen learning rate; None before the sweep ran."""
    lr = chosen_lr(store, scale, kind)
    return None if lr is None else run_name(kind, lr, task, seed)
