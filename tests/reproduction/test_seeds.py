"""Intervals over training seeds and test items."""

from __future__ import annotations

import math

import numpy as np
import pytest

from reproduction.seeds import paired_seeds, seeds_interval
from sigmix.errors import ConfigError


def test_seeds_interval_holds_items_and_seeds():
    random = np.random.default_rng(0)
    items = random.random(400) < 0.5
    mean, low, high = seeds_interval([items, items, items])
    assert mean == items.mean()
    # equal seeds: only the items vary, as in a proportion of 400
    assert (high - low) == pytest.approx(2 * 1.96 * math.sqrt(mean * (1 - mean) / 400), rel=0.1)
    apart = [np.ones(400, bool), np.zeros(400, bool), items]
    mean, low, high = seeds_interval(apart)
    assert mean == pytest.approx((1 + items.mean()) / 3)
    assert low < 0.05  # one seed drawn three times
    assert high > 0.95
    assert seeds_interval([items, items]) == seeds_interval([items, items])
    assert seeds_interval([np.ones(5, bool)]) == (1.0, 1.0, 1.0)


def test_seeds_interval_covers():
    random = np.random.default_rng(1)
    held = 0
    for trial in range(200):
        truth = random.normal(0.5, 0.0, 3)
        rows = random.random((3, 300)) < truth[:, None]
        _, low, high = seeds_interval(rows, seed=trial, draws=400)
        held += low <= 0.5 <= high
    assert held >= 180  # a bootstrap over three seeds is rough


def test_paired_seeds_pairs_items():
    random = np.random.default_rng(2)
    easy = random.random(500)
    ours = [easy < 0.6, easy < 0.62]
    theirs = [easy < 0.5, easy < 0.52]
    mean, low, high = paired_seeds(ours, theirs)
    assert mean == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert low < mean < high
    assert high - low < 0.12  # unpaired it would be about 0.13
    assert paired_seeds(ours, ours[:1])[1] <= 0 <= paired_seeds(ours, ours[:1])[2]
    with pytest.raises(ConfigError, match="same items"):
        paired_seeds([[True]], [[True, False]])
