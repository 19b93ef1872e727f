"""Every stage, from nothing, on a tiny model; then once more, when nothing is left to do."""

from __future__ import annotations

import json
import re
import sys

import pytest

from reproduction.page import fill
from reproduction.scale import SCALES
from reproduction.stages import stages
from reproduction.store import Store
from sigmix.cli import main
from sigmix.errors import ConfigError

QUESTIONS = [
    {"id": str(n), "question": {"stem": f"What is {n}?", "choices": [{"text": "a", "label": "A"},
     {"text": "b", "label": "B"}]}, "answerKey": "AB"[n % 2]} for n in range(40)
]  # fmt: skip


@pytest.fixture
def data(tmp_path):
    """ARC and OpenBookQA of a few made-up questions."""
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
    return tmp_path / "data"


def test_all_stages(tmp_path, data, cache, monkeypatch, capsys):
    def run(*words: str) -> tuple[int, str, str]:
        words = ("--scale", "smoke", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), *words)
        monkeypatch.setattr(sys, "argv", ["sigmix", "reproduce", *words])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    code, out, err = run("--data-dir", str(data))
    assert code == 0, err
    page = (tmp_path / "out" / "tables.md").read_text(encoding="utf-8")
    for stage in stages().values():
        assert f"## {stage.title}" in page
    smoke = SCALES["smoke"]
    assert set(re.findall(r"^\| (\S+) \| not run", page, re.M)) == {"train-step", "mixed", "decompose"}
    # speed, which needs a GPU; the pair in conflict for a third kind, in four modes; the full search on three examples
    assert page.count("not run") == 3 + 4 + 1
    for task in (*smoke.tasks, *smoke.unseen, "arc-easy", "openbookqa"):
        assert (tmp_path / "out" / "cells" / task / "base.jsonl.gz").exists()
    for picture in ("composition", "spectra", "dispatch-D"):
        assert (tmp_path / "out" / f"{picture}.png").read_bytes()[:4] == b"\x89PNG"

    store = Store(tmp_path / "out")
    for key in ("svf-rl/sum/2", "lora-rl/tuned/2/addition", "svf-rl/average/conflict"):
        filled = fill(f"<!-- smoke=composition/{key} -->?<!-- = -->", store, smoke)
        assert re.fullmatch(r"<!-- .* -->\d+\.\d<!-- = -->", filled)
    with pytest.raises(ConfigError, match="lora-small-rl"):
        fill("<!-- smoke=composition/lora-small-rl/sum/2/none -->?<!-- = -->", store, smoke)

    made = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    code, out, err = run("--data-dir", str(data))
    assert code == 0, err
    assert "trained" not in out
    assert {path: path.read_bytes() for path in made} == made
    (tmp_path / "out" / "tables.md").unlink()
    assert run("--report")[0] == 0
    assert (tmp_path / "out" / "tables.md").read_text(encoding="utf-8") == page

    code, _, err = run("--only", "tabel1")
    assert code == 2
    assert "table1" in err
    monkeypatch.setattr(sys, "argv", ["sigmix", "reproduce", "--scale", "huge"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "laptop" in capsys.readouterr().err
