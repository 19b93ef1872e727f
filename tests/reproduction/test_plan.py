"""The plan of a reproduction: what the stages did on a tiny model, and the tokens that the same takes at full size."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from helpers_reproduce import call, lab

from reproduction.plan import Length, Work, passes, rehearsal, rehearse, tokens
from reproduction.scale import SCALES
from reproduction.stages.groups import groups
from reproduction.stages.table1 import once
from sigmix.errors import DataError

HALF = SCALES["half-billion"]


def test_tokens_follow_steps_items_and_lengths(tmp_path):
    scale = replace(SCALES["laptop"], items={"larger": 700})
    lengths = {"addition": Length(20, 4, 16), "larger": Length(30, 4, 10)}
    maker = lab(tmp_path)
    maker.scale = scale
    configs = {kind: maker.config(kind, "addition") for kind in ("svf-rl", "lora-sft")}
    validations = 4 * configs["svf-rl"].max_eval_samples * (20 + 16)
    run = tokens(scale, Work("a", [("svf-rl", "addition")]), lengths, configs)
    assert run == pytest.approx(5 * 24 * 64 * (20 + 16) + validations)
    run = tokens(scale, Work("a", [("lora-sft", "addition")]), lengths, configs)
    assert run == pytest.approx(2 * 24 * 64 * (20 + 4) + validations)
    cells = tokens(scale, Work("a", cells=Counter({"addition": 2, "larger": 1})), lengths, {})
    assert cells == 2 * 500 * 36 + 700 * 40
    assert tokens(scale, Work("a", tried=Counter({"larger": 3})), lengths, {}) == 3 * 48 * 40
    assert passes(scale.kinds["svf-sft"], maker.config("svf-sft", "addition")) == 3


def test_a_rehearsal_counts_runs_cells_and_tunings(tmp_path, cache):
    scale = replace(SCALES["smoke"], stages=("sweep", "table1", "composition"), seeds=(0,), extra=(), conflict=None)
    scale = replace(scale, kinds={kind: scale.kinds[kind] for kind in ("svf-rl", "lora-rl")})
    sweep, table1, composition = rehearse(scale, tmp_path)
    assert Counter(kind for kind, _ in sweep.runs) == {"svf-rl": 1, "lora-rl": 1}
    assert {task for _, task in sweep.runs} == {"larger"}
    assert Counter(table1.runs) == {("svf-rl", "addition"): 1, ("lora-rl", "addition"): 1}
    assert table1.cells == {"addition": 3, "larger": 3}  # base, and both kinds
    assert composition.runs == []
    assert composition.cells["addition"] == composition.cells["larger"]
    assert composition.tried["addition"] == composition.tried["larger"] > 10


def test_the_scale_of_the_papers_tasks_trains_what_it_names():
    assert once(HALF) == ["lora-rl"]
    assert HALF.kinds["lora-rl"].tasks == ("gsm8k",)
    assert set(HALF.kinds) == {*HALF.compared, "lora-rl"}
    assert [len(group) for group in groups(HALF, "svf-rl", 0)] == [2, 2, 2, 3]
    assert rehearsal(HALF).stages == HALF.stages


def test_a_plan_without_data_says_what_is_missing(tmp_path, monkeypatch, capsys, cache):
    words = ("--scale", "half-billion", "--data-dir", str(tmp_path), "--allow-code", "--plan")
    code, out, err = call(monkeypatch, capsys, *words)
    assert code == 2
    assert "arc" in err
    assert not out
    with pytest.raises(DataError):
        rehearse(HALF, tmp_path, tmp_path)
