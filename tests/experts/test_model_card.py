"""Model cards: a header that huggingface_hub reads back, with the base on the hub and the figures as measured."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import ModelCard

from sigmix.experts.bank import Bank
from sigmix.experts.expert import Expert
from sigmix.experts.metadata import thaw
from sigmix.experts.model_card import card

Z = {"layers.0.q": torch.tensor([0.5, 1.5])}


def data(tmp_path, **meta):
    """The header of a saved expert, as the hub's library reads it."""
    return ModelCard.load(Expert("sums", Z, meta).save_pretrained(tmp_path / "sums") / "README.md").data


def test_metrics_are_read_back_as_eval_results(tmp_path):
    metrics = [
        {"name": "test accuracy", "value": 0.61, "n": 500, "interval": [0.57, 0.65], "base": 0.1, "p": 1e-48},
        {"name": "validation accuracy", "value": 1, "note": "chose: the 'checkpoint'\n---\n# x"},
        {"name": "mean reward", "value": -0.25, "n": 128},
        {"name": "remark", "value": "good"},
        {"name": "no value"},
    ]
    found = data(tmp_path, task="addition?digits=2", metrics=metrics)
    results = found.eval_results
    assert [(one.metric_name, one.metric_value) for one in results] == [
        ("test accuracy", 0.61), ("validation accuracy", 1), ("mean reward", -0.25),
    ]  # fmt: skip
    first = results[0]
    assert (first.task_type, first.dataset_type, first.dataset_name, first.dataset_split, first.metric_type) == (
        "text-generation", "addition?digits=2", "addition?digits=2", "test", "accuracy",
    )  # fmt: skip
    assert first.metric_args == {"n": 500, "interval": [0.57, 0.65], "base": 0.1, "p": 1e-48}
    assert results[1].metric_args == {"note": "chose: the 'checkpoint'\n---\n# x"}
    assert results[1].dataset_split == "validation"
    assert found.metrics == ["accuracy", "mean_reward"]
    assert found.model_name == "sums"


def test_without_metrics_there_is_no_model_index(tmp_path):
    found = data(tmp_path)
    assert found.eval_results is None
    assert found.metrics is None
    assert found.get("library_name") == "peft"
    assert "model-index" not in found.to_dict()


@pytest.mark.parametrize(
    "base, on_hub",
    [
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("/srv/alice/tiny", None),
        ("./tiny", None),
        ("~/models/tiny", None),
        ("C:\\Users\\alice\\tiny", None),
        ("C:/alice/tiny", None),
        ("/srv/alice/tiny.gguf", None),
        ("tiny", None),
        (None, None),
    ],
)
def test_the_base_is_named_where_it_is_on_the_hub_and_no_path_is_shown(tmp_path, base, on_hub):
    found = data(tmp_path, **({"base": {"name": base}} if base else {}))
    assert found.base_model == on_hub
    assert found.get("base_model_relation") == ("adapter" if on_hub else None)
    text = (tmp_path / "sums" / "README.md").read_text()
    assert "alice" not in text
    assert "~/models" not in text


@pytest.mark.parametrize(
    "given, license_, name",
    [
        ("Apache-2.0", "apache-2.0", None),
        ("MIT", "mit", None),
        ("Our House License v2", "other", "our-house-license-v2"),
        (None, None, None),
    ],
)
def test_licenses_are_the_hubs_identifiers(tmp_path, given, license_, name):
    found = data(tmp_path, **({"license": given} if given else {}))
    assert (found.license, found.license_name) == (license_, name)


def test_nothing_that_an_author_writes_leaves_its_place(tmp_path):
    odd = '"a": {b}\n---\nlicense: mit\n# not a header: [x'
    found = data(tmp_path, domain=odd, task=odd, metrics=[{"name": odd, "value": 1.0, odd: odd}])
    assert found.tags[-1] == odd
    assert found.license is None
    assert found.eval_results[0].metric_args == {odd: odd}


def test_the_bundled_experts_have_the_cards_that_saving_them_writes():
    bank = Bank.bundled()
    for name, expert in bank.items():
        text = (bank.path(name) / "README.md").read_text(encoding="utf-8")
        numbers = sum(len(z) for z in expert.z.values())
        assert text == card(name, thaw(expert.meta), len(expert.z), numbers)
        found = ModelCard(text).data
        assert found.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert [one.metric_value for one in found.eval_results] == [one["value"] for one in expert.meta["metrics"]]
