"""Labels of a bank and decisions."""

from __future__ import annotations

import json

import pytest
from helpers_adapt import bank_of

from sigmix.adapt import OTHER, Decision
from sigmix.adapt.base import labels, skills
from sigmix.errors import ConfigError
from sigmix.experts.mix import Mix


def test_labels_are_domains_where_these_tell_experts_apart(tiny):
    bank = bank_of(tiny, b="words", a="words", c="reading", d="other", z="dispatch")
    assert [(one.name, one.mix.id) for one in labels(bank)] == [
        ("a", "a"), ("b", "b"), ("reading", "c"), ("d", "d"), (OTHER, "base"),
    ]  # fmt: skip
    assert labels({})[0].mix == Mix.base()
    with pytest.raises(ConfigError, match="'words'"):
        labels(bank_of(tiny, a="words", words="reading", c="reading"))


def test_classification_experts_are_no_skills(tiny):
    assert skills(bank_of(tiny, b="words", judge="dispatch", a="reading")) == ["a", "b"]


def test_a_decision_as_json():
    decision = Decision(Mix.parse("b:0.5+a"), "x", "so", {"threshold": 0.5}, 3, 0.25)
    assert json.loads(json.dumps(decision.to_json())) == {
        "mix": "a+b:0.5", "weights": {"a": 1.0, "b": 0.5}, "label": "x", "reason": "so", "evidence": {"threshold": 0.5},
        "tokens": 3, "seconds": 0.25,
    }  # fmt: skip
