"""The data that dispatch strategies learn from and are measured on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sigmix.adapt import Decision
from sigmix.adapt.base import OTHER
from sigmix.errors import ConfigError, DataError, ExpertError, UnknownNameError
from sigmix.evals.dispatch import (
    SEEN,
    UNSEEN,
    DispatchTask,
    confusion,
    everyday,
    read_requests,
    requests,
    unseen_tasks,
    without_data,
)
from sigmix.experts.mix import Mix
from sigmix.tasks.registry import get_task


def bank(**experts):
    """{name: "domain task"} -> a bank of descriptions."""
    rows = {}
    for name, text in experts.items():
        domain, task = text.split()
        meta = {"domain": domain, "task": task, "description": f"Does {name}."}
        rows[name] = SimpleNamespace(name=name, meta=meta)
    return rows


BANK = bank(adder="arithmetic addition", finder="reading who-has", judge="dispatch addition")


def test_requests_are_the_experts_own_prompts_of_that_split():
    for split in ("train", "validation", "test"):
        found = requests(BANK, split, 20)
        assert list(found) == ["arithmetic", "reading", OTHER]
        assert found["arithmetic"] == [one.prompt for one in get_task("addition").samples(split, 20)]
        assert {len(texts) for texts in found.values()} == {20}


def test_no_request_is_in_two_splits():
    splits = [requests(BANK, split, 200, unseen=UNSEEN) for split in ("train", "validation", "test")]
    texts = [{text for some in found.values() for text in some} for found in splits]
    assert not texts[0] & texts[1]
    assert not texts[2] & (texts[0] | texts[1])


def test_other_holds_nothing_that_the_bank_has_an_expert_for():
    assert unseen_tasks(BANK) == [*UNSEEN, "code"]
    assert unseen_tasks(bank(a="logic boolean")) == ["code"]  # both are of that domain
    assert unseen_tasks(bank(a="code addition")) == list(UNSEEN)
    assert not set(SEEN) & set(UNSEEN)
    words = {one.prompt for task in ("plural", "opposite", "spell") for one in get_task(task).samples("train", 100)}
    assert words & set(requests(BANK, "train", 100)[OTHER])
    assert not words & set(requests(bank(a="words spell"), "train", 100)[OTHER])


def test_a_whole_domain_is_in_the_test_only():
    found = requests(BANK, "test", 100, unseen=unseen_tasks(BANK))
    programs = found["other:code"]
    assert len(set(programs)) == 100
    others = [requests(BANK, split, 400) for split in ("train", "validation", "test")]
    assert not set(programs) & {text for some in others for texts in some.values() for text in texts}


def test_everyday_requests_are_plenty_and_templates_stay_in_their_split():
    for split in ("train", "validation", "test"):
        assert len(set(everyday(split, 1000))) > 60
        assert everyday(split, 10, seed=1) == everyday(split, 10, seed=1) != everyday(split, 10)


def test_an_expert_without_its_task_is_named():
    for task in (None, "nothing-like-it"):
        lost = bank(adder="arithmetic addition")
        lost["adder"].meta["task"] = task
        with pytest.raises(ExpertError, match="adder"):
            requests(lost, "train", 5)


def test_labels_without_data_are_found_and_left_out():
    some = {**BANK, **bank(topics="reading topics", commands="format commands")}
    missing = without_data(some)
    assert set(missing) == {"topics", "commands"}
    assert all("--data-dir" in reason for reason in missing.values())
    assert without_data(BANK) == {}
    with pytest.raises(DataError, match="commands"):
        requests(some, "test", 5)
    found = requests(some, "test", 5, without=missing)
    # topics shares its domain with finder, so that finder's label is its name
    assert {label: len(texts) for label, texts in found.items()} == {"arithmetic": 5, "finder": 5, OTHER: 5}


def test_the_dispatch_task_needs_the_data_of_every_label():
    task = DispatchTask({**BANK, **bank(commands="format commands")}, per_label=5)
    with pytest.raises(DataError, match="commands"):
        task.samples("train", 5)


def test_the_dispatch_task_is_sound_and_balanced():
    task = DispatchTask(BANK, per_label=30)
    assert task.validate(n=30).ok, task.validate(n=30).problems
    samples = task.samples("train", 90)
    assert {label: sum(one.gold == label for one in samples) for label in task.names} == dict.fromkeys(task.names, 30)
    assert task.facts == {"labels": ["arithmetic", "reading", OTHER]}
    assert "judge" not in samples[0].prompt
    with pytest.raises(ConfigError, match="no expert to choose"):
        DispatchTask({})


class Says:
    name = "says"

    def __init__(self, *labels):
        self.given = iter(labels)

    def decide(self, prompts):
        return [Decision(Mix.base(), next(self.given), "so") for _ in prompts]


def test_confusion_counts_by_true_label():
    found = {"a": ["1", "2", "3"], OTHER: ["4"], f"{OTHER}:new": ["5", "6"]}
    figures = confusion(Says("a", OTHER, "a", OTHER, "a", OTHER), found, ["a", OTHER])
    assert [(row["label"], row["counts"], row["right"]) for row in figures["rows"]] == [
        ("a", [2, 1], 2), (OTHER, [0, 1], 1), (f"{OTHER}:new", [1, 1], 1),
    ]  # fmt: skip
    assert figures["accuracy"] == pytest.approx(4 / 6)
    assert figures["balanced"] == pytest.approx((2 / 3 + 1 + 1 / 2) / 3)
    assert figures["interval"][0] < 4 / 6 < figures["interval"][1]


def test_requests_of_a_file(tmp_path):
    file = tmp_path / "requests.json"
    file.write_text('{"arithmetic": ["add 1 and 2"], "other:poems": ["a poem"]}')
    assert read_requests(file, ["arithmetic", OTHER]) == {"arithmetic": ["add 1 and 2"], "other:poems": ["a poem"]}
    with pytest.raises(UnknownNameError, match="arithmetic"):
        read_requests(file, ["reading", OTHER])
    for text in ("{}", "[]", '{"other": []}', '{"other": "x"}', '{"other": [1]}', "{"):
        file.write_text(text)
        with pytest.raises(DataError, match="requests.json"):
            read_requests(file, ["arithmetic", OTHER])
    with pytest.raises(DataError, match="nowhere.json"):
        read_requests(tmp_path / "nowhere.json", [OTHER])
