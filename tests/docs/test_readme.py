"""The README's code does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sigmix.tasks.registry import get_task

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8"), re.S)


def test_the_task_of_your_own_is_sound(tmp_path):
    (source,) = [block for block in BLOCKS if "@skill" in block]
    (tmp_path / "cheaper.py").write_text(source)
    report = get_task(f"{tmp_path / 'cheaper.py'}:cheaper").validate()
    assert report.ok, report.problems


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
