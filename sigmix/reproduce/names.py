"""Names of runs and of what is measured, and the learning rate that a sweep chose; from stored records alone.

A name says all that decides an adapter: kind, learning rate, task, seed. So a cell can never stand for another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sigmix.reproduce.scale import Scale
from sigmix.reproduce.store import Store

BASE = "base"


def run_name(kind: str, lr: float, task: str, seed: int, after: Sequence[str] = ()) -> str:
    """Of a training run; ``after``: tasks that the adapter was trained on before."""
    return f"{kind}@{lr:g}.{'+'.join([*after, task])}.s{seed}"


def mix_name(kind: str, lr: float, weights: Mapping[str, float], seed: int) -> str:
    """Of a weighted sum of adapters of one kind and seed, one for each task."""
    return f"{kind}@{lr:g}.mix.{'+'.join(f'{task}={alpha:g}' for task, alpha in weights.items())}.s{seed}"


def swept(store: Store, scale: Scale, kind: str) -> dict[float, dict]:
    """{learning rate: record} of a kind's sweep, ascending."""
    found = {}
    for run in store.runs().values():
        key = (run.get("kind"), run.get("task"), run.get("seed"), run.get("after"))
        if key == (kind, scale.sweep, scale.seeds[0], []):
            found[float(run["lr"])] = run
    return dict(sorted(found.items()))


def chosen_lr(store: Store, scale: Scale, kind: str) -> float | None:
    """The learning rate with the best validation accuracy in the sweep, the lowest of equal ones; None before it ran.

    A kind that is ``like`` another takes that one's.
    """
    own = scale.kinds[kind]
    if own.like is not None:
        return chosen_lr(store, scale, own.like)
    tried = swept(store, scale, kind)
    return max(tried, key=lambda lr: (tried[lr]["best"]["accuracy"], -lr)) if tried else None


def single(store: Store, scale: Scale, kind: str, task: str, seed: int) -> str | None:
    """Name of the run at the chosen learning rate; None before the sweep ran."""
    lr = chosen_lr(store, scale, kind)
    return None if lr is None else run_name(kind, lr, task, seed)
