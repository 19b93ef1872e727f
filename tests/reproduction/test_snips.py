"""The task file of SNIPS requests to JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import reproduction.snips
from sigmix.tasks.base import Sample
from sigmix.tasks.registry import get_task


@pytest.fixture
def task(tmp_path):
    rows = [
        {"text": f"book a table for {n}", "intent": "BookRestaurant", "slots": {"size": [str(n)], "kind": ["a", "b"]}}
        for n in range(30)
    ]
    rows.append({"text": "long", "intent": "BookRestaurant", "slots": {"size": ["x" * 300]}})
    (tmp_path / "snips").mkdir()
    for split, part in (("train", rows), ("test", rows[:10])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / "snips" / f"{split}.jsonl").write_text(text)
    return get_task(f"{Path(reproduction.snips.__file__)}:snips", data_dir=tmp_path)


def test_it_is_a_valid_task_without_the_longest_answers(task):
    report = task.validate()
    assert report.ok, report.problems
    assert len(task.samples("test")) == 10
    assert all("xxx" not in sample.gold for sample in task.samples("train"))


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ('{"kind": ["a", "b"], "intent": "Book", "size": "3"}', 1.0),
        ('{"intent": "Book", "size": "3"}', 2 / 3),
        ('{"intent": "Book", "size": "4", "kind": ["a", "b"]}', 2 / 3),
        ('{"intent": "Book", "size": "3", "kind": ["a", "b"], "more": 1}', 3 / 4),
        ('{"intent": "Book", "size": 3}', 1 / 3),
        ('[{"intent": "Book"}]', 0.0),
        ('{"intent": "Book"', 0.0),
        ('{"intent": "Book", "intent": "Book"}', 0.0),
        ("", 0.0),
    ],
)
def test_the_score_is_the_share_of_right_fields(task, reply, value):
    sample = Sample.make("?", '{"intent": "Book", "size": "3", "kind": ["a", "b"]}')
    assert task.score(sample, reply).value == pytest.approx(value)
