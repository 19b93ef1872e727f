"""The contract itself: ids, splits, and a validation that finds bad graders."""

import random

import pytest

from sigmix.errors import ConfigError, DataError
from sigmix.evals.statistics import answer_entropy, best_constant
from sigmix.tasks import ProceduralTask, Sample, Score, Task, content_id
from sigmix.tasks.base import hash_split


class Parity(ProceduralTask):
    """Numbers below ``size``; ``judge`` is the grader."""

    def __init__(self, judge, size=1000):
        super().__init__()
        self.judge, self.size = judge, size

    def stream(self, seed):
        rng = random.Random(seed)
        while True:
            number = rng.randrange(self.size)
            yield Sample.make(f"Is {number} odd?", "yes" if number % 2 else "no"), None

    def score(self, sample, reply):
        return self.judge(sample, reply)


def strict(sample, reply):
    return Score.of(reply == sample.gold, reply)


def test_content_id_ignores_white_space_only():
    assert content_id("a  b\n") == content_id("a b")
    assert content_id("a b") != content_id("a B")
    assert content_id("a", system="b") != content_id("b", system="a")
    assert len(content_id("a")) == 16


def test_hash_split_shares():
    places = [hash_split(str(number), (0.6, 0.2, 0.2)) for number in range(4000)]
    assert 0.57 < places.count("train") / 4000 < 0.63
    assert 0.17 < places.count("test") / 4000 < 0.23
    assert all(hash_split(str(number), (0.9, 0.1, 0.0)) != "test" for number in range(1000))


def test_splits_are_disjoint_whatever_the_seed():
    task = Parity(strict, size=200)
    ids = {split: {s.id for seed in range(5) for s in task.samples(split, seed=seed)}
           for split in ("train", "validation", "test")}  # fmt: skip
    assert not ids["train"] & ids["test"]
    assert not ids["train"] & ids["validation"]
    assert not ids["validation"] & ids["test"]
    assert sum(map(len, ids.values())) == 200


def test_a_sound_grader_passes():
    report = Parity(strict).validate(n=20)
    assert report.ok
    assert report.counts["samples"] == report.counts["gold_right"] == 20


@pytest.mark.parametrize(
    ("judge", "found"),
    [
        (lambda s, r: Score.of(s.gold in r, r), "wrong reply"),  # a lax grader: finds the answer in any sentence
        (lambda s, r: Score(1.0, r), "wrong reply ''"),
        (lambda s, r: Score(0.0, r), "gold"),
        (lambda s, r: Score(None, r), "gold"),
        (lambda s, r: Score(0.3, r) if r != s.gold else Score(1.0, r), "scores 0.3"),
    ],
)
def test_bad_graders_are_found(judge, found):
    report = Parity(judge).validate(n=5)
    assert not report.ok
    assert any(found in problem for problem in report.problems)


def test_unscorable_wrong_replies_are_counted_apart():
    report = Parity(lambda s, r: strict(s, r) if r else Score(None, None)).validate(n=4)
    assert report.ok
    assert report.counts["wrong_unscorable"] == 4


class Leaky(Task):
    name = "leaky"

    def samples(self, split, n=None, seed=0):
        return [Sample.make("same question", "yes")] if split != "validation" else [Sample("0" * 16, "another", "yes")]

    def score(self, sample, reply):
        return strict(sample, reply)


def test_validate_finds_shared_items_and_false_ids():
    problems = Leaky().validate().problems
    assert any("in train and in test" in problem for problem in problems)
    assert any("is not the hash of its content" in problem for problem in problems)


def test_bad_requests():
    task = Parity(strict)
    for split, n in (("dev", 5), ("train", 0), ("train", -1), ("train", 2.5)):
        with pytest.raises(ConfigError):
            task.samples(split, n)


def test_empty_split_is_an_error():
    with pytest.raises(DataError, match="split"):
        [Parity(strict, size=1).samples(split) for split in ("train", "validation", "test")]


def test_best_constant():
    task = Parity(strict)
    samples = [Sample.make(f"q{i}", gold) for i, gold in enumerate(["yes"] * 3 + ["no"] * 7)]
    assert best_constant(task, samples) == ("no", 0.7)
    with pytest.raises(DataError):
        best_constant(task, [])


def test_best_constant_leaves_unscorable_out():
    task = Parity(lambda s, r: Score(None, None) if s.gold == "yes" else strict(s, r))
    samples = [Sample.make(f"q{i}", gold) for i, gold in enumerate(["yes", "no", "no", "never"])]
    assert best_constant(task, samples) == ("no", pytest.approx(2 / 3))


def test_answer_entropy():
    assert answer_entropy([]) == 0
    assert answer_entropy(["a", "a"]) == 0
    assert answer_entropy(["a", None]) == pytest.approx(0.6931, abs=1e-4)
    assert answer_entropy(list("abcd")) == pytest.approx(1.3863, abs=1e-4)
