"""`sigmix demo`, on a tiny base: what it shows, and that no expert's task can stop it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import string
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_cli import add_expert

pytest_plugins = ["helpers_cli"]


@pytest.fixture
def demo(run, home):
    return lambda *arguments, bank=home.bank: run("demo", "--base", home.base, "--bank", bank, *arguments)


def written() -> list[dict]:
    from sigmix.cli.demo import REQUESTS

    return [json.loads(line) for line in REQUESTS.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def skills_bank(run, home, tmp_path):
    """A bank with the experts of the written requests; that of sums has statistics, of its own request."""
    from sigmix import Bank, Engine, load_base
    from sigmix.adapt.router import request_statistics

    bank = Bank(tmp_path / "skills", create=True)
    rows = [row for row in written() if "expert" in row]
    for seed, row in enumerate(rows):
        add_expert(bank, home.base, row["expert"], seed, task=row["expert"])
    sums = next(row["prompt"] for row in rows if row["expert"] == "sums")
    engine = Engine(*load_base(home.base))
    bank.set_requests("sums", request_statistics(engine, [sums, f"{sums}!"], [sums]))
    return bank.folder


def test_json(demo):
    figures = demo("--n", 10, "--json").json
    names = "base seed batch tokens_per_second experts skipped weights seconds"
    assert list(figures) == names.split()
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
    assert figures["weights"]["before"] == figures["weights"]["after"]
    assert set(figures["tokens_per_second"]) == {"base", "mixed"}


def test_the_batch_of_another_bank_has_test_items_of_its_tasks(demo):
    from sigmix.tasks.registry import get_task

    batch = demo("--n", 2, "--json").json["batch"]
    assert [row["expert"] for row in batch] == ["arithmetic", "arithmetic", "reading", "reading"]
    assert [row["mix"] for row in batch] == [row["expert"] for row in batch]  # without statistics, each gets its own
    assert [row["prompt"] for row in batch[:2]] == [
        one.prompt for one in get_task("addition?digits=1").samples("test", 2)
    ]
    assert all(isinstance(row[key], bool) for row in batch for key in ("base_right", "right"))


def test_a_batch_is_answered_in_one_call_with_a_mixture_per_row(demo, monkeypatch):
    from sigmix import Engine

    calls = []
    generate = Engine.generate

    def recorded(self, prompts, mix=None, **options):
        calls.append([str(one.id) for one in mix])
        return generate(self, prompts, mix, **options)

    monkeypatch.setattr(Engine, "generate", recorded)
    demo("--n", 2)
    assert ["base"] * 4 in calls
    assert ["arithmetic", "arithmetic", "reading", "reading"] in calls


def test_written_requests(demo, skills_bank):
    figures = demo("--n", 2, "--json", bank=skills_bank).json
    batch = figures["batch"]
    assert [row["prompt"] for row in batch] == [row["prompt"] for row in written()]
    for row in batch:
        everyday = row["expert"] is None
        assert (row["right"] is None) == (row["base_right"] is None) == (row["gold"] is None) == everyday
        assert "threshold" in row["reason"]
    # only sums has statistics
    assert next(row["mix"] for row in batch if row["expert"] == "sums") == "sums"
    assert {row["mix"] for row in batch} <= {"sums", "base"}
    assert set(figures["skipped"]) == {"topics", "commands"}  # their texts are not in the package
    text = demo("--n", 2, bank=skills_bank).out
    assert "left to the base" in text
    assert "without request statistics: commands, compare-numbers" in text


def test_written_requests_are_graded(demo, skills_bank, monkeypatch):
    from sigmix import Engine

    gold = [row.get("answer", "?") for row in written()]
    replies = iter([[f"{text} or 7" for text in gold], gold])  # of the base, then of the mixtures
    generate = Engine.generate

    def scripted(self, prompts, *arguments, **options):
        found = generate(self, prompts, *arguments, **options)
        if len(prompts) != len(gold):
            return found
        return [replace(one, text=text) for one, text in zip(found, next(replies), strict=True)]

    monkeypatch.setattr(Engine, "generate", scripted)
    for row in demo("--n", 2, "--json", bank=skills_bank).json["batch"]:
        assert (row["base_right"], row["right"]) == ((None, None) if row["gold"] is None else (False, True)), row


def test_written_requests_fit_no_template():
    from sigmix.tasks import skills
    from sigmix.tasks.skills.templated import load_templates

    folder = Path(skills.__file__).parent / "templates"
    rows = [row for row in written() if (folder / f"{row.get('expert')}.json").is_file()]
    assert len(rows) >= 8
    for row in rows:
        for kinds in load_templates(folder / f"{row['expert']}.json").values():
            for template in sum(kinds.values(), ()):
                parts = [
                    re.escape(text) + (".{1,40}" if name else "")
                    for text, name, *_ in string.Formatter().parse(template)
                ]
                assert not re.fullmatch("".join(parts), row["prompt"], re.IGNORECASE), template


def test_output(demo):
    done = demo("--n", 5)
    assert done.code == 0
    batch, speed, table, rest = re.split(r"\nspeed: |\n.*accuracy on held-out|\nweights of the base: ", done.out)
    assert "strategy D is not available" in batch
    assert "wrong" in batch
    assert "one measurement" in speed
    assert "best constant" in table
    assert "unchanged" in rest
    assert rest.split("Try next:")[1].count("  sigmix ") == 3


def test_changed_weights_are_an_error(demo, monkeypatch):
    import torch

    from sigmix import Engine

    generate = Engine.generate

    def damaging(engine, *arguments, **options):
        result = generate(engine, *arguments, **options)
        with torch.no_grad():
            next(engine.model.parameters()).view(-1)[0] += 1
        return result

    monkeypatch.setattr(Engine, "generate", damaging)
    done = demo("--n", 2, "--json")
    assert done.code == 1
    assert "weights changed" in done.err[-1]
    weights = json.loads(done.out)["weights"]
    assert weights["before"] != weights["after"]
    assert "unchanged" not in demo("--n", 2).out


def test_the_number_of_items_fits_the_time(demo, monkeypatch):
    from sigmix.cli import demo as module

    monkeypatch.setattr(module, "SECONDS", 0.0)  # one batch
    figures = demo("--json").json
    assert [row["n"] for row in figures["experts"]] == [module.ROUND] * 2
    assert "sigmix demo --n" in demo().out
    assert demo("--n", 2 * module.ROUND + 1, "--json").json["experts"][1]["n"] == 2 * module.ROUND + 1
    monkeypatch.setattr(module, "SECONDS", 1000.0)
    monkeypatch.setattr(module, "MAX_ITEMS", module.ROUND + 5)
    assert demo("--json").json["experts"][0]["n"] == module.ROUND + 5


def test_the_suggested_commands_work(demo, run, tmp_path, monkeypatch):
    train, *lines = demo("--n", 2).out.split("Try next:")[1].strip().splitlines()
    for line in lines:
        assert run(*["2" if word == "300" else word for word in shlex.split(line)[1:]]).code == 0, line
    monkeypatch.chdir(tmp_path)
    words = shlex.split(train, comments=True)[1:]
    assert "tickets.csv" in run(*words).err[-1]  # there is no such file here
    rows = "".join(f"broken {number},{'repair' if number % 2 else 'refund'}\n" for number in range(60))
    (tmp_path / "tickets.csv").write_text(f"prompt,answer\n{rows}")
    assert run(*words, "--max-steps", 1).code == 0


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


def test_a_bank_without_measurable_tasks_has_no_batch(demo, run, home, tmp_path):
    from sigmix import Bank

    add_expert(Bank(tmp_path / "bank", create=True), home.base, "one")
    figures = demo("--json", bank=tmp_path / "bank").json
    assert (figures["batch"], figures["tokens_per_second"], figures["experts"]) == ([], None, [])
    assert demo(bank=tmp_path / "bank").out.count("  sigmix ") == 3


def test_an_empty_bank_is_an_error(refused, home, tmp_path):
    assert "has no experts" in refused("demo", "--base", home.base, "--bank", tmp_path)
