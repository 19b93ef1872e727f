"""The README's code does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8"), re.S)


@pytest.mark.real
def test_the_engine_example_answers_under_each_rows_own_mix(monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parents[2])
    (source,) = [block for block in BLOCKS if "engine.generate" in block]
    names: dict = {}
    exec(compile(source, "README.md", "exec"), names)
    expert, base = capsys.readouterr().out.strip().splitlines()[-1].split(" | ")
    right = ("895", "895.")  # the task's verifier takes one full stop
    assert expert in right
    assert base not in right
    (tuner,) = [block for block in BLOCKS if "get_peft_model(model" in block]
    exec(compile(tuner, "README.md", "exec"), names)
    trained = [p for p in names["peft_model"].parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 97_920
