"""Turns, ratios, aims and the schema of a report."""

from __future__ import annotations

import json

import pytest

import benchmarks as bench
from benchmarks.harness import Aim, device, interleaved, ratio, report, summary, text
from sigmix.errors import ConfigError, UnknownNameError


def test_contestants_take_turns_and_warm_ups_do_not_count(capsys):
    calls = []

    def one(name, seconds):
        def run(number):
            calls.append((name, number))
            return seconds * (number + 1)

        return run

    seconds = interleaved({"a": one("a", 1.0), "b": one("b", 10.0)}, repeats=2, warmup=1)
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert seconds == {"a": [2.0, 3.0], "b": [20.0, 30.0]}
    assert capsys.readouterr().out == ""  # progress is not a result


def test_a_contestant_without_figures_of_its_own_is_timed():
    seconds = interleaved({"a": lambda number: None}, repeats=3)
    assert len(seconds["a"]) == 3
    assert all(taken >= 0 for taken in seconds["a"])


def test_no_repeats_are_refused():
    with pytest.raises(ConfigError, match="0"):
        interleaved({}, repeats=0)


def test_ratios_are_taken_repeat_by_repeat():
    quotients = ratio([10.0, 40.0, 9.0], [5.0, 10.0, 9.0])
    assert quotients == [2.0, 4.0, 1.0]
    assert summary(quotients) == {"min": 1.0, "median": 2.0, "max": 4.0}
    with pytest.raises(ValueError):
        ratio([1.0, 2.0], [1.0])


def test_aims():
    assert Aim(">=", 2.5).met(2.5)
    assert not Aim(">=", 2.5).met(2.49)
    assert Aim("<=", 2.0).met(2.0)
    assert not Aim("<=", 2.0).met(2.1)
    assert str(Aim("<=", 2.0)) == "<= 2"
    with pytest.raises(ConfigError):
        Aim("<", 1.0)


def test_a_report_is_one_json_object_judged_by_the_medians():
    result = report(
        "some-bench",
        device("float32"),
        {"speedup": [2.0, 3.0, 9.0], "free": [1.0]},
        {"speedup": Aim(">=", 4.0), "warm_seconds": Aim("<=", 2.0)},
        {"seconds": {"a": [1.0]}},
        {"warm_seconds": [1.0, 5.0, 1.5]},
    )
    again = json.loads(json.dumps(result, allow_nan=False))
    assert again == result
    assert set(result) == {"bench", "device", "ratios", "aims", "met", "raw"}
    assert {"cpu", "threads", "dtype", "torch"} <= set(result["device"])
    assert result["ratios"]["speedup"] == {"min": 2.0, "median": 3.0, "max": 9.0}
    assert result["aims"] == {"speedup": ">= 4", "warm_seconds": "<= 2"}
    assert result["met"] == {"speedup": False, "warm_seconds": True}
    assert result["raw"]["warm_seconds"] == {"min": 1.0, "median": 1.5, "max": 5.0}
    assert result["raw"]["ratios_by_repeat"]["speedup"] == [2.0, 3.0, 9.0]
    assert result["raw"]["seconds"] == {"a": [1.0]}
    shown = text(result)
    assert "speedup: 3 (2 to 9), aim >= 4: missed" in shown
    assert "warm_seconds: 1.5 (1 to 5), aim <= 2: met" in shown
    assert "free: 1 (1 to 1)" in shown


def test_an_unknown_bench_names_the_nearest():
    with pytest.raises(UnknownNameError, match="train-step"):
        bench.run("train-stp")
