"""Evaluation: accuracy with intervals, paired comparisons, strategies and dispatch on a task's items."""

from __future__ import annotations

from sigmix.evals.accuracy import Item, Result, compare, evaluate, run, save
from sigmix.evals.dispatch import confusion
from sigmix.evals.statistics import mcnemar, paired_difference, wilson
from sigmix.evals.strategies import measure_strategy, run_strategies

__all__ = [
    "Item", "Result", "compare", "confusion", "evaluate", "mcnemar", "measure_strategy", "paired_difference", "run",
    "run_strategies", "save", "wilson",
]  # fmt: skip
