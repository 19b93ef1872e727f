"""From replies to figures, and from the file back to the figures."""

from __future__ import annotations

import json
import math
import subprocess

import pytest

from sigmix.evals import accuracy
from sigmix.evals.accuracy import Item, Result, compare, constant_baseline, evaluate
from sigmix.evals.statistics import wilson
from sigmix.tasks.base import Sample, Score, Task


class Parity(Task):
    """Replies "odd" or "even"; "hmm" cannot be judged, "half" gets half the marks."""

    name = "parity"

    def samples(self, split, n=None, seed=0):
        return [Sample.make(f"Is {i} odd or even?", "odd" if i % 2 else "even") for i in range(n or 10)]

    def score(self, sample, reply):
        if reply == "hmm":
            return Score(None, None, "cannot tell")
        if reply == "half":
            return Score(0.5, "half")
        return Score.of(reply == sample.gold, reply or None, "compared")


@pytest.fixture
def task():
    return Parity()


def test_evaluate_keeps_order_and_everything(task):
    samples = task.samples("test", 4)
    result = evaluate(task, samples, ["even", "odd", "odd", "hmm"])
    assert [item.id for item in result.items] == [sample.id for sample in samples]
    assert [item.score for item in result.items] == [1.0, 1.0, 0.0, None]
    last = result.items[-1]
    assert last == Item(samples[3].id, "Is 3 odd or even?", "odd", "hmm", None, None, "cannot tell")


def test_evaluate_needs_a_reply_for_each(task):
    with pytest.raises(ValueError):
        evaluate(task, task.samples("test", 4), ["odd"])


def test_summary(task):
    result = evaluate(task, task.samples("test", 8), ["even", "even", "hmm", "half"] * 2)
    # even is right for 0 and 4, wrong for 1 and 5; 2 and 6 cannot be judged; half marks are not right
    assert result.summary() == {
        "task": "parity",
        "n": 6,
        "accuracy": pytest.approx(2 / 6),
        "interval": list(wilson(2, 6)),
        "mean_score": pytest.approx((2 + 2 * 0.5) / 6),
        "unscorable": 2,
        "answer_entropy": pytest.approx(-(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))),
        "distinct_answers": 3,
    }


def test_summary_of_nothing(task):
    summary = evaluate(task, task.samples("test", 2), ["hmm"] * 2).summary()
    assert (summary["n"], summary["accuracy"], summary["interval"], summary["unscorable"]) == (0, 0.0, [0.0, 1.0], 2)
    assert Result("parity", []).summary()["n"] == 0


def test_a_saved_file_gives_the_summary_again(task, tmp_path):
    replies = ["even", "odd\nwith a second line \u2028 and 日本語", 'a "quoted" one', "hmm", "half"]
    result = evaluate(task, task.samples("test", 10), replies * 2)
    result.save(tmp_path / "items.jsonl")
    with open(tmp_path / "items.jsonl", encoding="utf-8") as file:
        again = Result(result.task, [Item(**json.loads(line)) for line in file])
    assert again == result
    assert again.summary() == result.summary()


def test_best_constant(task):
    samples = task.samples("test", 9)  # five even, four odd
    assert constant_baseline(task, samples) == {"reply": "even", "accuracy": pytest.approx(5 / 9)}
    task.costly = True
    assert constant_baseline(task, samples) == {}


# ------------------------------------------------------------------ compare


def result_of(scores):
    return Result("parity", [Item(name, "", "", "", None, score, "") for name, score in scores.items()])


def test_compare_by_hand():
    ours = result_of({"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.0, "e": 0.5})
    theirs = result_of({"a": 1.0, "b": 0.0, "c": 0.0, "d": 1.0, "e": 0.0})
    found = compare(ours, theirs)
    assert (found["n"], found["won"], found["lost"], found["p"]) == (5, 2, 1, 1.0)
    assert found["difference"] == pytest.approx(1 / 5)
    assert found["interval"][0] < 1 / 5 < found["interval"][1]


def test_compare_aligns_by_id_not_by_place():
    ours = result_of({"a": 1.0, "b": 0.0, "c": 1.0})
    theirs = result_of({"c": 1.0, "a": 1.0, "b": 0.0})
    assert compare(ours, theirs) == {"n": 3, "difference": 0.0, "interval": [0.0, 0.0], "won": 0, "lost": 0, "p": 1.0}


def test_compare_leaves_out_what_either_could_not_judge_or_does_not_have():
    ours = result_of({"a": 1.0, "b": None, "c": 1.0, "only ours": 1.0})
    theirs = result_of({"a": 0.0, "b": 0.0, "c": None, "only theirs": 1.0})
    found = compare(ours, theirs)
    assert (found["n"], found["won"], found["lost"], found["difference"]) == (1, 1, 0, 1.0)
    nothing = compare(ours, result_of({"z": 1.0}))
    assert (nothing["n"], nothing["p"], nothing["interval"]) == (0, 1.0, [-1.0, 1.0])


def test_compare_is_seeded():
    ours = result_of({str(i): float(i % 3 == 0) for i in range(60)})
    theirs = result_of({str(i): float(i % 2 == 0) for i in range(60)})
    assert compare(ours, theirs, seed=1) == compare(ours, theirs, seed=1)
    assert len({tuple(compare(ours, theirs, seed)["interval"]) for seed in range(10)}) > 1


# ------------------------------------------------------------------ provenance


def git(folder, *words):
    command = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.org", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_only_a_checkout_that_tracks_the_code_has_a_commit(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    (tmp_path / "run.py").write_text("")
    (tmp_path / "other.py").write_text("")
    git(tmp_path, "add", "other.py")
    git(tmp_path, "commit", "-qm", "other")
    monkeypatch.setattr(accuracy, "__file__", str(tmp_path / "run.py"))
    assert accuracy.commit() is None  # installed inside another repository
    git(tmp_path, "add", "run.py")
    git(tmp_path, "commit", "-qm", "run")
    assert accuracy.commit() == git(tmp_path, "rev-parse", "--short", "HEAD")
    (tmp_path / "run.py").write_text("changed")
    assert accuracy.commit().endswith("+")
