"""Intervals, paired tests, the best constant reply and the entropy of answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest

from sigmix.errors import ConfigError, DataError
from sigmix.tasks.base import Sample, Task

MAX_SCORINGS, MAX_COSTLY_SCORINGS = 20_000, 100
"""Limits of `best_constant`; a costly task runs a program per scoring."""

TAILS = (0.025, 0.975)
"""Quantiles of a 95 % interval."""


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
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


def seeds_interval(
    right: Sequence[Sequence[bool]], seed: int = 0, draws: int = 2_000
) -> tuple[float, float, float]:
    """Return the mean accuracy of training seeds on the same items and its percentile bootstrap interval.

    Args:
        right: one row per seed, items in the same order. Seeds and items are both resampled; with three seeds the
            interval is rough.
    """
    values = np.asarray(right, dtype=float)
    means = _resampled(values, np.random.default_rng(seed), draws)
    low, high = np.quantile(means, TAILS)
    return float(values.mean()), float(low), float(high)


def paired_seeds(
    ours: Sequence[Sequence[bool]],
    theirs: Sequence[Sequence[bool]],
    seed: int = 0,
    draws: int = 2_000,
) -> tuple[float, float, float]:
    """Return the mean difference of two groups of seeds on the same items and its bootstrap interval.

    Items are resampled in pairs, the seeds of each group separately.
    """
    a, b = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if a.shape[1] != b.shape[1]:
        raise ConfigError(f"a paired comparison needs the same items: {a.shape[1]} against {b.shape[1]}")
    random = np.random.default_rng(seed)
    items = random.integers(0, a.shape[1], (draws, a.shape[1]))
    means = _resampled(a, random, draws, items) - _resampled(b, random, draws, items)
    low, high = np.quantile(means, TAILS)
    return float(a.mean() - b.mean()), float(low), float(high)


def _resampled(
    values: np.ndarray, random: np.random.Generator, draws: int, items: np.ndarray | None = None
) -> np.ndarray:
    """Return means [draws] over rows and columns drawn with replacement."""
    count, n = values.shape
    items = random.integers(0, n, (draws, n)) if items is None else items
    weights = random.multinomial(count, np.full(count, 1 / count), draws) / count
    per_seed = np.stack([row[items].mean(1) for row in values], 1)
    return (weights * per_seed).sum(1)


def best_constant(task: Task, samples: Sequence[Sample], candidates: Sequence[str] | None = None) -> tuple[str, float]:
    """Return the constant reply of the highest accuracy on ``samples``, and that accuracy.

    Pairs that cannot be scored are left out. Candidates beyond the limit of scorings are dropped, the rarest gold
    replies first; if all gold replies differ, the result is 1/n.

    Args:
        candidates: default: the distinct gold replies, most frequent first.

    Raises:
        DataError: no samples, or no candidates.
    """
    if not samples:
        raise DataError(f"task {task.name}: no samples for the best constant reply")
    golds = Counter(sample.gold for sample in samples)
    pool = list(dict.fromkeys(candidates)) if candidates is not None else [gold for gold, _ in golds.most_common()]
    if not pool:
        raise DataError(f"task {task.name}: no candidates for the best constant reply")
    if task.costly and candidates is None and len(golds) == len(samples):
        return pool[0], 1 / len(samples)
    limit = MAX_COSTLY_SCORINGS if task.costly else MAX_SCORINGS
    best = (pool[0], -1.0)
    for reply in pool[: max(1, limit // len(samples))]:
        values = [score.value for sample in samples if (score := task.score(sample, reply)).value is not None]
        accuracy = sum(values) / len(values) if values else 0.0
        if accuracy > best[1]:
            best = (reply, accuracy)
    return best


def answer_entropy(answers: Sequence[str | None]) -> float:
    """Return the entropy in nats of the answers; None (no answer) is one value. 0 if empty."""
    counts = Counter(answers)
    return sum(-count / len(answers) * math.log(count / len(answers)) for count in counts.values())
