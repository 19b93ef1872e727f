"""Tables from stored items: every accuracy, interval and paired test is computed here, from `Store` alone.

Cells that were not run read "not run". Accuracies are in per cent. With one seed the interval is Wilson's; with several
it is a bootstrap over seeds and items together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reproduction.names import BASE, chosen_lr, single
from reproduction.scale import Scale
from reproduction.seeds import paired_seeds, seeds_interval
from reproduction.store import Store
from sigmix.evals.accuracy import Result, compare
from sigmix.evals.statistics import wilson

NOT_RUN = "not run"


class Report:
    """Stored results of a scale, formatted for tables.

    Args:
        folder: where plots are written.
    """

    def __init__(self, store: Store, scale: Scale, folder: Path | None = None) -> None:
        self.store, self.scale, self.folder = store, scale, folder or store.folder

    def picture(self, name: str) -> Path:
        """Return the path of a plot."""
        return self.folder / f"{self.scale.name}-{name}.png"

    def image(self, text: str, name: str) -> str:
        """Return the Markdown image of a plot, relative to the page of tables."""
        return f"![{text}]({self.picture(name).name})"

    # ------------------------------------------------------------------ one cell

    def result(self, task: str, who: str | None) -> Result | None:
        """Items of a cell, or None."""
        cell = None if who is None else self.store.cell(task, who)
        return None if cell is None else cell.result

    def accuracy(self, task: str, who: str | None) -> str:
        """``62.0 [57.7, 66.1]``, or "not run"."""
        result = self.result(task, who)
        return NOT_RUN if result is None else shown(result)

    def against(self, task: str, who: str | None, other: str | None) -> str:
        """Paired difference with its interval and McNemar's p."""
        ours, theirs = self.result(task, who), self.result(task, other)
        if ours is None or theirs is None:
            return NOT_RUN
        pair = compare(ours, theirs)
        low, high = pair["interval"]
        return f"{100 * pair['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}], p {pair['p']:.2g}"

    def constant(self, task: str) -> str:
        """Accuracy of the best constant answer to a task's test items."""
        value = (self.store.about(task).get("best_constant") or {}).get("accuracy")
        return "" if value is None else f"{100 * value:.1f}"

    def kl(self, task: str, who: str | None) -> float | None:
        """KL per token to the base on a cell's replies, or None."""
        cell = None if who is None else self.store.cell(task, who)
        return None if cell is None else cell.facts.get("kl")

    # ------------------------------------------------------------------ over seeds

    def names(self, kind: str, task: str, seeds: Sequence[int] | None = None) -> list[str]:
        """Runs of a kind on a task that have a cell of it, by seed."""
        found = [single(self.store, self.scale, kind, task, seed) for seed in seeds or self.scale.seeds]
        return [name for name in found if name is not None and self.store.has(task, name)]

    def over(self, task: str, names: Sequence[str]) -> str:
        """Accuracy over the seeds of a kind: mean, interval, and each seed's; or "not run"."""
        results = [self.result(task, name) for name in names]
        found = [one for one in results if one is not None]
        if not found:
            return NOT_RUN
        if len(found) == 1:
            return f"{shown(found[0])} (1 seed)" if len(self.scale.seeds) > 1 else shown(found[0])
        mean, low, high = seeds_interval([marks(one) for one in found])
        each = ", ".join(f"{100 * one.accuracy:.1f}" for one in found)
        return f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}] ({each})"

    def over_against(self, task: str, ours: Sequence[str], theirs: Sequence[str]) -> str:
        """Difference between two kinds on the same items, over as many seeds as each has."""
        a, b = (
            [marks(one) for name in names if (one := self.result(task, name)) is not None] for names in (ours, theirs)
        )
        if not a or not b:
            return NOT_RUN
        mean, low, high = paired_seeds(a, b)
        return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"

    def base(self, task: str) -> str:
        """The base's accuracy."""
        return self.accuracy(task, BASE)

    def lr(self, kind: str) -> str:
        """The learning rate that a kind's sweep chose."""
        rate = chosen_lr(self.store, self.scale, kind)
        return NOT_RUN if rate is None else f"{rate:g}"


def shown(result: Result) -> str:
    """Accuracy in per cent with its 95 % Wilson interval."""
    right = result.right
    low, high = wilson(sum(right), len(right))
    return f"{100 * result.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def marks(result: Result) -> list[bool]:
    """Per item: full marks; an item that could not be judged counts as wrong, so that all rows have equal length."""
    return [item.score == 1.0 for item in result.items]


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def mean(values: Sequence[float]) -> float:
    """Mean; NaN of nothing."""
    return float(np.mean(values)) if len(values) else float("nan")
