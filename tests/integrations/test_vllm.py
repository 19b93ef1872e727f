"""Mixtures as vLLM's requests name them: settings, canonical names, and paths that differ wherever numbers could."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_engine import expert
from helpers_experts import at
from helpers_export import experts
from helpers_tiny import build_tiny

from sigmix.errors import ConfigError, ExpertError
from sigmix.experts.bank import Bank
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix
from sigmix.integrations import vllm
from sigmix.integrations.vllm.adapter import Adapter, Settings

NAME = "math:0.7+word:0.5"


@pytest.fixture
def bank(tmp_path, cache):
    bank = Bank(tmp_path / "bank", create=True)
    for one in experts().values():
        bank.add(one)
    return bank


@pytest.fixture
def settings(bank):
    return Settings(str(bank.folder))


def test_settings_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings.of({}) is None
    assert Settings.of({"SIGMIX_VLLM_BASE": "x"}) is None  # no experts: the plugin stays out of the way
    found = {"SIGMIX_VLLM_EXPERTS": "bundled", "SIGMIX_VLLM_BASE": "b", "SIGMIX_VLLM_MIXES": "~/mixes", "HOME": "x"}
    assert Settings.of(found) == Settings("bundled", "b", tmp_path / "mixes")
    assert list(Settings("bundled").bank()) == Bank.bundled().names()
    with pytest.raises(ConfigError, match="SIGMIX_VLLM_RANK"):  # of an earlier version
        Settings.of({"SIGMIX_VLLM_EXPERTS": "x", "SIGMIX_VLLM_RANK": "64"})


def test_equal_mixtures_have_one_name_and_path(settings):
    first = Adapter.find(NAME, settings)
    again = Adapter.find("word:.5 + math:0.70", settings)
    assert (first.name, first.path) == (NAME, again.path)
    assert Adapter.parse(first.path) == first
    assert not first.prompt


def test_whatever_changes_the_numbers_changes_the_path(bank, settings):
    old = bank["math"]
    paths = {Adapter.find(name, settings).path for name in (NAME, "math", "math:0.7", "math:0.7+word:0.4")}
    for changed in (
        replace(old, z={path: 1 + (z - 1) * 0.5 for path, z in old.z.items()}),
        at("prompt", old),
        expert(build_tiny(seed=3), "math", 1),  # of another base
    ):
        bank.add(changed, replace=True)
        paths.add(Adapter.find("math", settings).path)
    assert len(paths) == 7
    assert Adapter.find("math", settings).path != Adapter.find("word", settings).path


def test_experts_on_prompt_tokens_are_marked(bank, settings):
    bank.add(at("prompt", bank["math"], "prompts"))
    assert Adapter.find("prompts", settings).prompt
    assert Adapter.find("prompts:0.5+word:0.5", settings).prompt


def test_saved_mixtures_and_weights_per_layer(settings, tmp_path):
    mix = Mix({"math": [0.2, 0.8], "word": 0.5})
    (tmp_path / "mixes").mkdir()
    (tmp_path / "mixes" / "mine.json").write_text(str(mix.to_json()).replace("'", '"'))
    saved = replace(settings, mixes=tmp_path / "mixes")
    found = Adapter.find("mine", saved)
    assert found.name == mix.id
    assert Adapter.parse(found.path).mix == mix
    assert Adapter.find("mine", settings) is None
    (tmp_path / "mixes" / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="JSON"):
        Adapter.find("broken", saved)


def test_other_names_are_left_to_others(settings):
    for name in ("nobody", "math+nobody", "base", "../math", "", "math:x", "org/adapter", "math;rm -rf"):
        assert Adapter.find(name, settings) is None


def test_an_expert_that_is_added_later(bank, settings):
    assert Adapter.find("third", settings) is None
    bank.add(Expert("third", dict(bank["math"].z), {**bank["math"].meta}))
    assert Adapter.find("third", settings).name == "third"


def test_experts_without_a_common_base(bank, settings):
    bank.add(expert(build_tiny(seed=3), "other", 1))
    bank.add(Expert("unknown", dict(bank["math"].z)))
    with pytest.raises(ExpertError, match="different bases"):
        Adapter.find("math+other", settings)
    with pytest.raises(ExpertError, match="no recorded base"):
        Adapter.find("unknown", settings)


def test_paths_of_others(settings):
    with pytest.raises(ConfigError, match="no LoRA adapters"):
        Adapter.parse("/adapters/lora")
    path = Adapter.find("math", settings).path
    with pytest.raises(ConfigError, match="decomposition"):
        Adapter.parse(re.sub('"decomposition":"[^"]*"', '"decomposition":"older"', path))


def test_without_settings_the_plugin_does_nothing(monkeypatch):
    monkeypatch.delenv("SIGMIX_VLLM_EXPERTS", raising=False)
    vllm.register()  # imports no vLLM


def test_the_entry_point_is_the_plugin():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    found = re.search(r'\[project\.entry-points\."vllm\.general_plugins"\]\nsigmix = "(.+)"\n', text)
    assert found[1] == f"{vllm.__name__}:{vllm.register.__name__}"
