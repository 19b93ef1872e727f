"""Registry of experts and saved mixtures, without a model."""

from __future__ import annotations

import pytest

from sigmix.errors import ConfigError, ExpertError, UnknownNameError
from sigmix.experts.mix import Mix
from sigmix.serve import registry as registry_module
from sigmix.serve.registry import ModelRegistry
from sigmix.serve.store import Store


class Named:
    def __init__(self, name: str) -> None:
        self.name = name


@pytest.fixture
def registry(tmp_path):
    store = Store(tmp_path)
    yield ModelRegistry({"math": Named("math"), "code": Named("code")}, store)
    store.close()


def test_is_a_mapping(registry):
    assert set(registry) == {"math", "code"}
    assert len(registry) == 2
    with pytest.raises(KeyError) as error:
        registry["maths"]
    assert isinstance(error.value, UnknownNameError)
    assert "math" in str(error.value)
    assert registry.get("maths") is None
    assert registry.get("maths", 3) == 3
    assert "maths" not in registry


def test_readers_keep_their_snapshot(registry):
    seen = []
    for name in registry:
        seen.append(name)
        registry.add(Named(f"new-{name}"))
    experts = registry.experts
    registry.remove("math")
    assert seen == ["math", "code"]
    assert "math" in experts
    assert "math" not in registry
    with pytest.raises(UnknownNameError):
        registry.remove("math")


def test_taken_names(registry):
    registry.save_mix("mine", Mix.parse("math:.5"), {})
    for name in ("math", "mine"):
        with pytest.raises(ConfigError):
            registry.add(Named(name))


def test_resolve(registry):
    registry.save_mix("mine", Mix.parse("math:.5"), {})
    assert registry.resolve("auto") is None
    assert registry.resolve("base") == Mix.base()
    assert registry.resolve("mine") == registry.resolve("math:0.5") == Mix({"math": 0.5})
    with pytest.raises(UnknownNameError) as error:
        registry.resolve("math+other")
    assert "other" in str(error.value)
    with pytest.raises(ConfigError):
        registry.resolve("math:x")
    registry.remove("math")
    with pytest.raises(UnknownNameError):
        registry.resolve("mine")


def test_mixtures_of_clients(registry, monkeypatch):
    monkeypatch.setattr(registry_module, "MAX_MIXES_PER_CLIENT", 2)
    mix = Mix.one("math")
    registry.save_mix("first", mix, {}, "alice")
    registry.save_mix("house", mix, {})
    for client, name in (("bob", "first"), ("alice", "house"), ("alice", "math"), (None, "math")):
        with pytest.raises(ConfigError):
            registry.save_mix(name, mix, {}, client)
    for name in ("No Name", "auto", "base"):
        with pytest.raises(ExpertError):
            registry.save_mix(name, mix, {})
    registry.save_mix("second", mix, {}, "alice")
    with pytest.raises(ConfigError):
        registry.save_mix("third", mix, {}, "alice")
    registry.save_mix("first", mix, {})  # an administrator
    assert registry.mixes["first"] == (mix, {})
    registry.delete_mix("first")
    with pytest.raises(UnknownNameError):
        registry.delete_mix("first")


def test_loading_is_disabled_without_folders(registry):
    with pytest.raises(ConfigError) as error:
        registry.load("math")
    assert "--expert-folders" in str(error.value)
