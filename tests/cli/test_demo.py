"""`sigmix demo`, on a tiny base: what it shows, and that no expert's task can stop it."""

from __future__ import annotations

import shutil

import pytest
from helpers_cli import add_expert

pytest_plugins = ["helpers_cli"]


@pytest.fixture
def demo(run, home):
    return lambda *arguments, bank=home.bank: run("demo", "--base", home.base, "--bank", bank, *arguments)


def test_json(demo):
    figures = demo("--n", 10, "--json").json
    assert [row["expert"] for row in figures["experts"]] == ["arithmetic", "reading"]
    assert figures["skipped"] == {}
    for row in figures["experts"]:
        assert row["n"] == row["base"]["n"] == row["tuned"]["n"] == 10
        assert row["base"]["interval"][0] <= row["base"]["accuracy"] <= row["base"]["interval"][1]
        assert 0 <= row["paired"]["p"] <= 1
        assert 0 < row["best_constant"]["accuracy"] <= 1
        assert len(row["examples"]) == 2
        assert all(0 <= count <= 10 for count in row["no_answer"])
        assert {"prompt", "gold", "base", "expert", "base_right", "expert_right"} == set(row["examples"][0])


def test_questions_table_and_what_to_try_next(demo):
    done = demo("--n", 5)
    assert done.code == 0
    assert "(wrong)" in done.out or "(right)" in done.out
    assert "best constant" in done.out
    after = done.out.split("Try next:")[1]
    assert after.count("  sigmix ") == 3
    assert "…" not in done.out


def test_quick_takes_25_items(demo):
    figures = demo("--quick", "--json").json
    assert figures["experts"][1]["n"] == 25


def test_the_suggested_commands_work(demo, run, home):
    lines = demo("--n", 2).out.split("Try next:")[1].strip().splitlines()
    import shlex

    for line in lines:
        words = shlex.split(line)[1:]
        more = ["--n", 2] if words[0] == "eval" else []
        at = ["--base", home.base, "--bank", home.bank, *more]
        assert run(*[word if word != "300" else "2" for word in words], *at).code == 0, line


def test_experts_of_unavailable_tasks_are_named_and_skipped(demo, run, home, tmp_path):
    from sigmix import Bank

    bank = tmp_path / "bank"
    shutil.copytree(home.bank, bank)
    opened = Bank(bank)
    tasks = {"gone": "my/lost.py:task", "none": None, "slow": "mbpp", "odd": "addition?digits=many", "long": "gsm8k"}
    for name, task in tasks.items():
        add_expert(opened, home.base, name, task=task)
    add_expert(opened, home.other, "foreign", task="first-letter")
    (bank / "arithmetic" / "sigmix.json").write_text("{")
    figures = demo("--n", 3, "--json", bank=bank).json
    assert [row["expert"] for row in figures["experts"]] == ["reading"]
    assert set(figures["skipped"]) == {*tasks, "foreign", "arithmetic"}
    assert "was made on" in figures["skipped"]["foreign"]
    assert "not shown: gone" in demo("--n", 3, bank=bank).out


def test_an_empty_bank_is_an_error(refused, home, tmp_path):
    assert "has no experts" in refused("demo", "--base", home.base, "--bank", tmp_path)
