"""Order of prompts, random seeds of rows, and rewards."""

from __future__ import annotations

import pytest
from helpers_train import Letter

from sigmix.tasks.base import Score
from sigmix.train.rollout import PromptStream, reward, row_seed


def test_stream_visits_every_sample_once_an_epoch():
    samples = Letter().samples("train", 10)
    stream = PromptStream(samples, 4, seed=3)
    ids = [sample.id for step in range(5) for sample in stream.step(step)]  # 20 places: two epochs, ragged steps
    for epoch in (ids[:10], ids[10:]):
        assert sorted(epoch) == sorted(sample.id for sample in samples)
    assert ids[:10] != ids[10:]


def test_stream_is_a_function_of_seed_and_step():
    samples = Letter().samples("train", 10)
    stream = PromptStream(samples, 4, seed=3)
    forward = [[s.id for s in stream.step(step)] for step in range(6)]
    again = PromptStream(samples, 4, seed=3)
    assert [[s.id for s in again.step(step)] for step in (5, 0, 3)] == [forward[5], forward[0], forward[3]]
    assert [s.id for s in PromptStream(samples, 4, seed=4).step(0)] != forward[0]


def test_stream_of_fewer_samples_than_a_step_needs():
    samples = Letter().samples("train", 3)
    counts = [s.id for s in PromptStream(samples, 7, seed=0).step(0)]
    assert sorted(counts.count(s.id) for s in samples) == [2, 2, 3]


def test_row_seeds_differ_everywhere():
    seeds = {row_seed(seed, step, row) for seed in range(4) for step in range(10) for row in range(64)}
    assert len(seeds) == 4 * 10 * 64
    assert row_seed(0, 1, 2) == row_seed(0, 1, 2)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (Score(1.0, "w"), 1.0),
        (Score(0.0, None), -1.0),
        (Score(0.0, "x"), -0.6),
        (Score(0.5, "x"), 0.0),
    ],
)
def test_rewards(score, expected):
    assert reward(score, 0.4) == pytest.approx(expected)
    assert reward(score) == 2 * score.value - 1
