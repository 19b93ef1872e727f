"""Intervals and tests against known values, hand computation and slow loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sigmix.errors import ConfigError
from sigmix.evals.statistics import mcnemar, paired_difference, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),  # Brown, Cai and DasGupta 2001: 0 of n gives z²/(n + z²)
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (1, 2, 0.0945, 0.9055),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I
        (15, 148, 0.0624, 0.1605),
    ],
)
def test_wilson_known_values(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_solves_its_equation():
    # the ends are the p for which (p̂ - p)² = z² p (1 - p) / n
    z = 1.959963984540054
    for successes, n in ((3, 17), (50, 60), (200, 1319)):
        for p in wilson(successes, n):
            assert (successes / n - p) ** 2 == pytest.approx(z * z * p * (1 - p) / n, rel=1e-9)


def test_wilson_of_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


def pairs(won, lost, both=3, neither=2):
    ours = [True] * won + [False] * lost + [True] * both + [False] * neither
    theirs = [False] * won + [True] * lost + [True] * both + [False] * neither
    return ours, theirs


@pytest.mark.parametrize(
    ("won", "lost", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 32),
        (0, 6, 2 / 64),
        (3, 1, 2 * (4 + 1) / 16),
        (7, 2, 2 * (1 + 9 + 36) / 512),
        (4, 4, 1.0),
    ],
)
def test_mcnemar_by_hand(won, lost, p):
    found = mcnemar(*pairs(won, lost))
    assert (found["won"], found["lost"]) == (won, lost)
    assert found["p"] == pytest.approx(p)
    assert mcnemar(*pairs(won, lost, both=500, neither=0)) == found  # pairs that agree say nothing


def test_mcnemar_against_a_slow_sum():
    for won in range(9):
        for lost in range(9):
            n = won + lost
            tail = sum(math.comb(n, k) for k in range(min(won, lost) + 1)) / 2**n
            assert mcnemar(*pairs(won, lost))["p"] == pytest.approx(min(1.0, 2 * tail))


def test_mcnemar_needs_the_same_items():
    with pytest.raises(ConfigError, match="3 against 2"):
        mcnemar([True] * 3, [True] * 2)


def test_paired_difference_is_seeded():
    random = np.random.default_rng(0)
    ours, theirs = random.random(50), random.random(50) - 0.2  # scores, so that the quantiles are not a few values
    assert paired_difference(ours, theirs, seed=3) == paired_difference(ours, theirs, seed=3)
    assert paired_difference(ours, theirs, seed=3) != paired_difference(ours, theirs, seed=4)
    difference, low, high = paired_difference(ours, theirs)
    assert difference == pytest.approx(ours.mean() - theirs.mean())
    assert low < difference < high
    swapped = paired_difference(theirs, ours)
    assert swapped == pytest.approx((-difference, -high, -low))


def test_paired_difference_uses_the_pairs():
    same = [True, False] * 50
    assert paired_difference(same, same) == (0.0, 0.0, 0.0)
    opposite = [not x for x in same]
    _, low, high = paired_difference(same, opposite)
    assert low < -0.1 < 0.1 < high
    assert paired_difference([], []) == (0.0, -1.0, 1.0)


def test_paired_difference_covers():
    # 200 data sets of 60 pairs whose true difference is 0.2; a 95 % percentile interval misses about one in twenty
    random, covered = np.random.default_rng(1), 0
    for _ in range(200):
        shared = random.random(60)
        ours, theirs = shared < 0.7, shared + 0.3 * (random.random(60) - 0.5) < 0.5
        _, low, high = paired_difference(ours, theirs, draws=500)
        covered += low <= 0.2 <= high
    assert 0.88 <= covered / 200 <= 0.99
