"""Intervals over training seeds and test items, by bootstrap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sigmix.errors import ConfigError
from sigmix.evals.statistics import TAILS


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
