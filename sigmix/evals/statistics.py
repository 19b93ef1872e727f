"""Intervals, paired tests, the best constant reply and the entropy of answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest

from sigmix.errors import ConfigError, DataError
from sigmix.tasks.base import Sample, Task

MAX_SCORINGS, MAX_COSTLY_SCORINGS = 20_000, 100  # limits of `best_constant`; a costly task runs a program per scoring
TAILS = (0.025, 0.975)  # quantiles of a 95 % interval


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(ours: Sequence[bool], theirs: Sequence[bool]) -> dict[str, float]:
    """Return the exact two-sided McNemar test on the same items: won (only ours right), lost (only theirs), p."""
    if len(ours) != len(theirs):
        raise ConfigError(f"a paired test needs the same items: {len(ours)} against {len(theirs)}")
    won = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    lost = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    p = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    return {"won": won, "lost": lost, "p": p}


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], seed: int = 0, draws: int = 10_000
) -> tuple[float, float, float]:
    """Return the mean difference on the same items and its percentile bootstrap interval (pairs resampled)."""
    difference = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    if not len(difference):
        return 0.0, -1.0, 1.0
    random = np.random.default_rng(seed)
    means = difference[random.integers(0, len(difference), (draws, len(difference)))].mean(1)
    low, high = np.quantile(means, TAILS)
    return float(difference.mean()), float(low), float(high)


def best_constant(task: Task, samples: Sequence[Sample]) -> tuple[str, float]:
    """Return the constant reply of the highest accuracy on ``samples``, and that accuracy.

    The candidates are the gold replies, the most frequent first, up to a limit of scorings. Pairs that cannot be scored
    are left out. If all gold replies of a costly task differ, the result is 1/n.
    """
    if not samples:
        raise DataError(f"task {task.name}: no samples for the best constant reply")
    golds = [gold for gold, _ in Counter(sample.gold for sample in samples).most_common()]
    if task.costly and len(golds) == len(samples):
        return golds[0], 1 / len(samples)
    limit = MAX_COSTLY_SCORINGS if task.costly else MAX_SCORINGS
    best = (golds[0], -1.0)
    for reply in golds[: max(1, limit // len(samples))]:
        values = [score.value for sample in samples if (score := task.score(sample, reply)).value is not None]
        accuracy = sum(values) / len(values) if values else 0.0
        if accuracy > best[1]:
            best = (reply, accuracy)
    return best


def answer_entropy(answers: Sequence[str | None]) -> float:
    """Return the entropy in nats of the answers; None (no answer) is one value. 0 if empty."""
    counts = Counter(answers)
    return sum(-count / len(answers) * math.log(count / len(answers)) for count in counts.values())
