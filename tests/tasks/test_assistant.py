"""The tasks `topics` and `commands`: published texts in worded requests, on small files of the same layout."""

from __future__ import annotations

import json

import pytest

from sigmix.errors import DataError
from sigmix.tasks.assistant import TEMPLATES
from sigmix.tasks.registry import get_task
from sigmix.tasks.skills.templated import load_templates


@pytest.fixture
def data(tmp_path):
    clinc, snips = tmp_path / "clinc150", tmp_path / "snips"
    clinc.mkdir()
    snips.mkdir()
    (clinc / "domains.json").write_text(json.dumps({"banking": ["transfer"], "auto_and_commute": ["oil", "gas"]}))
    texts = {
        split: [[f"{intent} of {split} {n}", intent] for n in range(20) for intent in ("transfer", "oil")]
        for split in ("train", "val", "test")
    }  # fmt: skip
    (clinc / "data_full.json").write_text(json.dumps(texts))
    for split in ("train", "test"):
        slots = [{"track": [f"song {n}"], "genre": ["a", "b"]} for n in range(60)]
        rows = [{"text": f"play {split} {one['track'][0]}", "intent": "PlayMusic", "slots": one} for one in slots]
        (snips / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("name", ["topics", "commands"])
def test_it_is_a_valid_task(name, data):
    report = get_task(name, data_dir=data).validate()
    assert report.ok, report.problems


@pytest.mark.parametrize("name", ["topics", "commands"])
def test_each_split_has_texts_and_wordings_of_its_own(name, data):
    task, templates = get_task(name, data_dir=data), load_templates(TEMPLATES / f"{name}.json")
    texts = {split: {sample.meta["key"] for sample in task.samples(split)} for split in templates}
    assert all(texts.values())
    assert sum(map(len, texts.values())) == len(set().union(*texts.values()))
    wordings = {split: {text.lower() for text in kinds[""]} for split, kinds in templates.items()}
    assert sum(map(len, wordings.values())) == len(set().union(*wordings.values()))
    assert len(wordings["train"]) >= 30
    assert all(text.count("{text}") == 1 and text.count("{") == 1 for part in wordings.values() for text in part)


def test_a_request_does_not_change_with_the_others(data):
    before = {sample.meta["key"]: sample.prompt for sample in get_task("topics", data_dir=data).samples("train")}
    path = data / "clinc150/data_full.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "train": content["train"][:7]}))
    after = {sample.meta["key"]: sample.prompt for sample in get_task("topics", data_dir=data).samples("train")}
    assert len(after) == 7
    assert after.items() <= before.items()


def test_answers(data):
    assert {sample.gold for sample in get_task("topics", data_dir=data).samples("test")} == {
        "banking",
        "auto and commute",
    }
    sample = get_task("commands", data_dir=data).samples("test")[0]
    assert json.loads(sample.gold) == {
        "intent": "PlayMusic",
        "track": json.loads(sample.gold)["track"],
        "genre": ["a", "b"],
    }
    assert 0 < get_task("commands", data_dir=data).score(sample, '{"intent": "PlayMusic"}').value < 1


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("topics", lambda data: None, "not on the hub"),
        ("topics", lambda data: (data / "clinc150/domains.json").unlink(), "domains.json"),
        ("topics", lambda data: (data / "clinc150/data_full.json").write_text('{"train": []}'), "'val'"),
        ("topics", lambda data: (data / "clinc150/domains.json").write_text('{"banking": ["transfer"]}'), "topic"),
        ("commands", lambda data: (data / "snips/train.jsonl").unlink(), "train.jsonl"),
    ],
)
def test_unusable_files(name, damage, told, data):
    damage(data)
    with pytest.raises(DataError, match=told) as error:
        get_task(name, data_dir=None if "hub" in told else data).samples("test")
    assert "--data-dir" in str(error.value.remedy) or "row" in str(error.value)
