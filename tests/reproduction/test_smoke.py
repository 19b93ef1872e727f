"""Every stage, from nothing, on a tiny model; then once more, when nothing is left to do."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from helpers_reproduce import call

from reproduction.scale import SCALES
from reproduction.stages import stages

QUESTIONS = [
    {"id": str(n), "question": {"stem": f"What is {n}?", "choices": [{"text": "a", "label": "A"},
     {"text": "b", "label": "B"}]}, "answerKey": "AB"[n % 2]} for n in range(40)
]  # fmt: skip


@pytest.fixture
def data(tmp_path):
    """ARC, OpenBookQA, SNIPS and GSM8K of a few made-up questions."""
    for folder, names in (
        ("arc", [f"ARC-{kind}-{split}" for kind in ("Easy", "Challenge") for split in ("Train", "Dev", "Test")]),
        ("openbookqa", ["train", "dev", "test"]),
    ):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for number, name in enumerate(names):
            rows = [
                {**row, "id": f"{name}-{row['id']}", "question": {**row["question"], "stem": f"{name} {row['id']}?"}}
                for row in QUESTIONS
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows[number % 3 :])
            (tmp_path / "data" / folder / f"{name}.jsonl").write_text(text)
    for folder, rows in (
        (
            "snips",
            [{"text": f"Rate {n} of 6", "intent": "RateBook", "slots": {"rating_value": [str(n)]}} for n in range(60)],
        ),
        ("gsm8k", [{"question": f"What is {n} and 1?", "answer": f"#### {n + 1}"} for n in range(60)]),
    ):
        (tmp_path / "data" / folder).mkdir()
        for name, part in (("train", rows[:40]), ("test", rows[40:])):
            text = "".join(json.dumps(row) + "\n" for row in part)
            (tmp_path / "data" / folder / f"{name}.jsonl").write_text(text)
    return tmp_path / "data"


@pytest.mark.slow
def test_all_stages(tmp_path, data, cache, monkeypatch, capsys):
    out_folder = tmp_path / "out"

    def run(*words: str) -> tuple[int, str, str]:
        words = ("--scale", "smoke", "--out", str(out_folder), "--work", str(tmp_path / "work"), *words)
        return call(monkeypatch, capsys, *words)

    code, out, err = run("--data-dir", str(data))
    assert code == 0, err
    page = (out_folder / "smoke.md").read_text(encoding="utf-8")
    for stage in stages(SCALES["smoke"]).values():
        assert f"## {stage.title}" in page
    smoke = SCALES["smoke"]
    assert set(re.findall(r"^\| (\S+) \| not run", page, re.M)) == {"train-step", "mixed", "decompose"}
    # speed, which needs a GPU; the pair in conflict for a third kind, in four modes; the full search on three examples
    assert page.count("not run") == 3 + 4 + 1
    for task in (*smoke.tasks, *smoke.unseen, "arc-easy", "openbookqa", "snips", "gsm8k"):
        assert (out_folder / "smoke" / "cells" / task / "base.jsonl").exists()
    for picture in ("composition", "spectra", "dispatch-D"):
        assert (out_folder / f"smoke-{picture}.png").read_bytes()[:4] == b"\x89PNG"

    files = {path: path.read_bytes() for path in out_folder.rglob("*") if path.is_file()}
    code, out, err = run("--data-dir", str(data))
    assert code == 0, err
    assert "trained" not in out
    assert {path: path.read_bytes() for path in files} == files

    # the same tables from the archive alone
    assert run("--report", "--pack")[0] == 0
    shutil.rmtree(out_folder / "smoke")
    (out_folder / "smoke.md").unlink()
    assert run("--report")[0] == 0
    assert (out_folder / "smoke.md").read_text(encoding="utf-8") == page
    assert not (out_folder / "smoke").exists()


def test_wrong_names_end_with_code_2(tmp_path, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, "--out", str(tmp_path), "--only", "tabel1")
    assert code == 2
    assert "table1" in err
    code, _, err = call(monkeypatch, capsys, "--out", str(tmp_path), "--scale", "huge")
    assert code == 2
    assert "laptop" in err
