"""The study of the bank on a tiny base with experts of random z: cells are made once, and the tables have all rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers_adapt import big
from helpers_cli import add_expert
from helpers_tiny import build_tiny, build_tokenizer

from reproduction import bank as study
from sigmix.adapt.base import OTHER
from sigmix.errors import ConfigError
from sigmix.evals import dispatch
from sigmix.experts.bank import Bank
from sigmix.tasks.base import Sample
from sigmix.tasks.registry import get_task

# the experts' name, their label, and rows of their handwritten file
SKILLS = {"sums": ("arithmetic", 4), "compare-numbers": ("comparing", 3)}
FOREIGN, N = 5, 3
WHO = ("base", "expert", "auto", "soft", "even")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny base and a bank for it with request statistics."""
    folder = tmp_path_factory.mktemp("bank")
    base, bank = folder / "tiny", Bank(folder / "experts", create=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGMIX_CACHE", str(folder / "cache"))
        big(build_tiny).save_pretrained(base)
        build_tokenizer().save_pretrained(base)
        for seed, (name, (label, _)) in enumerate(SKILLS.items()):
            add_expert(bank, base, name, seed, task=name, domain=label, description=f"Does {name}.")
        engine = study.Engine(*study.load_base(base), bank)
        patch.setattr(dispatch, "TRAIN_LIMIT", 100)  # of the prompts, which are long in letters
        patch.setattr(dispatch, "VALIDATION_LIMIT", 50)
        for name in SKILLS:
            dispatch.add_statistics(engine, bank, name)
        yield SimpleNamespace(base=base, bank=bank.folder, cache=folder / "cache")


@pytest.fixture
def measure(home, tmp_path, monkeypatch):
    """Run the program, with few handwritten rows; returns the folder of its results."""
    files = {study.FILES[name]: count for name, (_, count) in SKILLS.items()} | {"foreign": FOREIGN}
    monkeypatch.setattr(study, "HANDWRITTEN", tmp_path / "handwritten")
    study.HANDWRITTEN.mkdir()
    for file, count in files.items():
        lines = (Path(study.__file__).parent / "handwritten" / f"{file}.jsonl").read_text().splitlines(keepends=True)
        (study.HANDWRITTEN / f"{file}.jsonl").write_text("".join(lines[:count]))
    monkeypatch.setenv("SIGMIX_CACHE", str(home.cache))

    def call(n: int = N) -> Path:
        words = ["--data-dir", tmp_path, "--out", tmp_path / "out", "--bank", home.bank, "--base", home.base, "--n", n]
        monkeypatch.setattr(sys, "argv", ["bank", *map(str, words)])
        study.main()
        return tmp_path / "out"

    return call


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def table(page: str, title: str) -> list[list[str]]:
    """The cells of the rows below a title."""
    lines = page.partition(f"## {title}\n\n")[2].partition("\n\n")[0].splitlines()
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def test_a_bank_is_measured_once(measure, monkeypatch):
    out = measure()
    expected = {
        f"{name}.{which.replace(' ', '-')}.{who}.jsonl": count if which == "handwritten" else N
        for name, (_, count) in SKILLS.items() for which in study.SETS for who in WHO
        if which != study.SETS[0] or who in ("base", "expert")
    }  # fmt: skip
    assert {path.name: len(rows(path)) for path in (out / "cells").iterdir()} == expected

    page = (out / "bank.md").read_text(encoding="utf-8")
    experts = table(page, "Experts")
    assert [row[:3] for row in experts] == [
        [name, which, str(count if which == "handwritten" else N)]
        for name, (_, count) in SKILLS.items() for which in study.SETS
    ]  # fmt: skip
    assert {len(row) for row in experts} == {7}
    total = sum(count for _, count in SKILLS.values())
    everything = table(page, "End to end")
    assert [row[:2] for row in everything] == [[study.SETS[1], str(N * len(SKILLS))], [study.SETS[2], str(total)]]
    assert {len(row) for row in everything} == {7}

    router = json.loads((out / "router.json").read_text())
    assert [(row["label"], row["n"]) for row in router["handwritten"]["rows"]] == [
        *SKILLS.values(), (OTHER, FOREIGN)
    ]  # fmt: skip
    assert (out / "router.png").read_bytes()[:4] == b"\x89PNG"

    monkeypatch.setattr(study, "answer_samples", lambda *_, **__: pytest.fail("measured again"))
    measure()
    assert (out / "bank.md").read_text(encoding="utf-8") == page
    with pytest.raises(ConfigError, match="--out"):
        measure(n=N + 1)


def test_a_missing_cell_alone_is_measured_again(measure, monkeypatch):
    out = measure()
    page, cell = (out / "bank.md").read_text(encoding="utf-8"), out / "cells" / "sums.handwritten.auto.jsonl"
    before = cell.read_bytes()
    cell.unlink()
    answered, plain = [], study.answer_samples
    monkeypatch.setattr(study, "answer_samples", lambda *a, **b: answered.append(a[1].name) or plain(*a, **b))
    measure()
    assert answered == ["sums"]
    assert cell.read_bytes() == before
    assert (out / "bank.md").read_text(encoding="utf-8") == page


def test_auto_answers_as_the_chosen_mixture_does(measure):
    out = measure()
    routed, compared = rows(out / "routed.jsonl"), 0
    for which in study.SETS[1:]:
        chosen = {item["request"]: item["label"] for item in routed if item["requests"] == which}
        for name, (label, _) in SKILLS.items():
            cells = {who: rows(out / "cells" / f"{name}.{which.replace(' ', '-')}.{who}.jsonl") for who in WHO}
            for base, own, auto in zip(cells["base"], cells["expert"], cells["auto"], strict=True):
                if chosen[auto["prompt"]] in (label, OTHER):
                    assert auto == (own if chosen[auto["prompt"]] == label else base)
                    compared += chosen[auto["prompt"]] == label
            assert cells["expert"] != cells["base"]
    assert compared


@pytest.mark.parametrize("name", study.FILES)
def test_the_graders_take_the_handwritten_answers(name):
    task = get_task(name)
    samples = [Sample.make(row["prompt"], row["completion"]) for row in study.rows_of(study.FILES[name])]
    assert [sample.prompt for sample in samples if task.score(sample, sample.gold).value != 1.0] == []
    assert [sample.prompt for sample in samples if task.score(sample, "nothing of the kind").value != 0.0] == []
