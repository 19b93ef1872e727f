"""The vLLM plugin: mixes by name, made once, bounded, and handed over through vLLM's interface (a stand-in for it)."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from pathlib import Path

import helpers_vllm
import pytest
import torch
from helpers_engine import TOLERANCE, expert
from helpers_experts import at
from helpers_export import base_folder, experts, ids
from peft import PeftModel
from safetensors.torch import load_file

from sigmix.engine import Engine
from sigmix.errors import CacheError, ConfigError, FingerprintError
from sigmix.experts.bank import Bank
from sigmix.experts.expert import Expert
from sigmix.export.low_rank import LowRank
from sigmix.integrations import vllm
from sigmix.integrations.vllm import Adapters, Settings
from sigmix.models.loading import load_base
from sigmix.utils import cache as caching

NAME = "math:0.7+word:0.5"


@pytest.fixture
def home(tmp_path, cache):
    """(base folder, bank folder)."""
    base = base_folder(tmp_path / "base")
    bank = Bank(tmp_path / "bank", create=True)
    for one in experts().values():
        bank.add(one)
    return base, bank.folder


def test_settings_come_from_the_environment():
    assert Settings.of({}) is None
    assert Settings.of({"SIGMIX_VLLM_RANK": "64"}) is None  # no experts: the plugin stays out of the way
    settings = Settings.of({"SIGMIX_VLLM_EXPERTS": "bundled", "SIGMIX_VLLM_RANK": "64", "SIGMIX_VLLM_ERROR": "0.2"})
    assert settings == Settings("bundled", rank=64, error=0.2)
    for key, value in (("RANK", "many"), ("RANK", "0"), ("ERROR", "2"), ("KEEP", "-1")):
        with pytest.raises(ConfigError, match=f"_{key}"):
            Settings.of({"SIGMIX_VLLM_EXPERTS": "x", f"SIGMIX_VLLM_{key}": value})
    with pytest.raises(ConfigError, match="512"):  # when vLLM starts
        Settings.of({"SIGMIX_VLLM_EXPERTS": "x", "SIGMIX_VLLM_RANK": "513"})


def test_a_mix_becomes_an_adapter_that_peft_loads(home):
    base, bank = home
    path = Adapters(Settings(str(bank), rank=64)).path(str(base), NAME)
    config = json.loads((path / "adapter_config.json").read_text())
    helpers_vllm.legal(config, 64)
    tensors = load_file(path / "adapter_model.safetensors")
    assert all(64 in tensor.shape for tensor in tensors.values())
    model, tokenizer = load_base(base, "float32")
    row = torch.tensor([ids()])
    ours = Engine(model, tokenizer, Bank(bank)).logits(row, mix=NAME)
    plain = PeftModel.from_pretrained(load_base(base, "float32")[0], str(path))
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=row).logits, ours, **TOLERANCE)


def test_an_expert_that_acts_on_prompts_alone_gets_no_adapter(home):
    base, folder = home
    bank = Bank(folder)
    bank.add(at("prompt", bank["math"], "prompts"))
    adapters = Adapters(Settings(str(folder), rank=8))
    for name in ("prompts", "prompts:0.5+word:0.5"):
        with pytest.raises(ConfigError, match=r"'prompt' \(prompts\)"):
            adapters.path(str(base), name)
    assert not [entry for entry in adapters.folder.glob("*") if entry.is_dir()]
    assert adapters.path(str(base), "word").is_dir()


def test_it_is_made_once_and_anew_for_other_experts_ranks_or_weights(home):
    base, bank = home
    adapters = Adapters(Settings(str(bank), rank=8))
    path = adapters.path(str(base), NAME)
    stamp = (path / "adapter_model.safetensors").stat().st_mtime_ns
    assert adapters.path(str(base), "word:.5 + math:0.70") == path  # the same mix in other words
    assert Adapters(Settings(str(bank), rank=8)).path(str(base), NAME) == path
    assert (path / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    found = {path, Adapters(Settings(str(bank), rank=16)).path(str(base), NAME), adapters.path(str(base), "math")}
    old = Bank(bank)["math"]
    changed = {path: 1 + (z - 1) * 0.5 for path, z in old.z.items()}
    Bank(bank).add(Expert("math", changed).sealed(load_base(base, "float32")[0]), replace=True)
    found.add(adapters.path(str(base), NAME))
    assert len(found) == 4


def test_other_names_are_left_to_others(home):
    base, bank = home
    adapters = Adapters(Settings(str(bank)))
    for name in ("nobody", "math+nobody", "base", "../math", "", "math:x", "org/adapter", "math;rm -rf"):
        assert adapters.path(str(base), name) is None
    assert not adapters.folder.exists()


def test_errors_room_and_another_base(home, tmp_path, caplog):
    base, bank = home
    with pytest.raises(ConfigError, match="SIGMIX_VLLM_RANK"):
        Adapters(Settings(str(bank), rank=1, error=0.1)).path(str(base), NAME)
    adapters = Adapters(Settings(str(bank), rank=1, keep=2))
    with caplog.at_level(logging.WARNING):
        adapters.path(str(base), "math")
    assert "loses" in caplog.text
    adapters.path(str(base), "word")
    with pytest.raises(ConfigError, match="SIGMIX_VLLM_KEEP"):
        adapters.path(str(base), NAME)
    assert adapters.path(str(base), "word")  # what is there is still found
    assert sum(1 for entry in adapters.folder.iterdir() if entry.is_dir()) == 2
    other = base_folder(tmp_path / "other", seed=5)
    with pytest.raises(FingerprintError, match="'math'"):
        Adapters(Settings(str(bank), rank=2)).path(str(other), "math")


def test_experts_of_several_dtypes_do_not_disturb_each_other(tmp_path, cache):
    base, bank = base_folder(tmp_path / "base"), Bank(tmp_path / "bank", create=True)
    bank.add(expert(load_base(base, "bfloat16")[0], "rounded", 1))
    bank.add(expert(load_base(base, "float32")[0], "exact", 2))
    found = []
    for number, order in enumerate((("rounded", "exact"), ("exact", "rounded"))):
        adapters = Adapters(Settings(str(bank.folder), rank=64, cache=tmp_path / str(number)))
        paths = {name: adapters.path(str(base), name) for name in order}
        tensors = {name: load_file(path / "adapter_model.safetensors") for name, path in paths.items()}
        kinds = {name: next(iter(one.values())).dtype for name, one in tensors.items()}
        assert kinds == {"rounded": torch.bfloat16, "exact": torch.float32}
        found.append({name: path.name for name, path in paths.items()})
    assert found[0] == found[1]


def test_the_error_is_held_to_for_adapters_that_are_there(home, caplog):
    base, bank = home
    path = Adapters(Settings(str(bank), rank=8)).path(str(base), NAME)
    error = json.loads((path / "sigmix_export.json").read_text())["error"]
    assert error > 0.1
    caplog.clear()
    assert Adapters(Settings(str(bank), rank=8, error=error + 0.01)).path(str(base), NAME) == path
    assert f"loses {100 * error:.1f} %" in caplog.text
    with pytest.raises(ConfigError, match=f"{error:.1%}.*SIGMIX_VLLM_ERROR"):
        Adapters(Settings(str(bank), rank=8, error=error - 0.01)).path(str(base), NAME)
    assert path.is_dir()  # another server may have it open
    (path / "sigmix_export.json").write_text("{}")
    with pytest.raises(CacheError, match="sigmix_export.json"):
        Adapters(Settings(str(bank), rank=8)).path(str(base), NAME)


def test_refusals_are_remembered_until_the_expert_changes(home, monkeypatch):
    base, bank = home
    names, of = [], LowRank.from_mix
    monkeypatch.setattr(LowRank, "from_mix", lambda *arguments: names.append(arguments[1].id) or of(*arguments))
    adapters = Adapters(Settings(str(bank), rank=1, error=0.1))
    for _ in range(3):
        with pytest.raises(ConfigError, match="SIGMIX_VLLM_RANK"):
            adapters.path(str(base), NAME)
    assert names == [NAME]
    # all of its change in one component of each matrix: rank 1 loses nothing
    old = Bank(bank)["math"]
    changed = {path: torch.ones_like(z).index_fill(0, torch.tensor([0]), 1.5) for path, z in old.z.items()}
    Bank(bank).add(Expert("math", changed).sealed(load_base(base, "float32")[0]), replace=True)
    assert adapters.path(str(base), "math").is_dir()
    # a folder that is full is looked at again
    full = Adapters(Settings(str(bank), rank=8, keep=1))
    with pytest.raises(ConfigError, match="SIGMIX_VLLM_KEEP"):
        full.path(str(base), "word")
    assert len(caching.clear("vllm")) == 1
    assert full.path(str(base), "word").is_dir()


def test_an_expert_that_is_added_later(home):
    base, bank = home
    adapters = Adapters(Settings(str(bank), rank=1))
    assert adapters.path(str(base), "third") is None
    old = Bank(bank)["math"]
    Bank(bank).add(Expert("third", dict(old.z), {**old.meta, "name": "third"}))
    assert adapters.path(str(base), "third").is_dir()


def test_the_cache_lists_its_adapters(home, monkeypatch, tmp_path):
    base, bank = home
    path = Adapters(Settings(str(bank), rank=1)).path(str(base), "math")
    (entry,) = caching.entries("vllm")
    assert entry.path == path
    assert entry.bytes > 0
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = Settings.of({"SIGMIX_VLLM_EXPERTS": "x", "SIGMIX_VLLM_CACHE": "~/adapters"})
    assert settings.cache == tmp_path / "adapters"


def test_the_resolver_returns_a_request(home, monkeypatch, caplog):
    base, bank = home
    registry = helpers_vllm.install(monkeypatch)
    vllm.register()
    assert not registry.resolvers
    monkeypatch.setenv("SIGMIX_VLLM_EXPERTS", str(bank))
    monkeypatch.setenv("SIGMIX_VLLM_RANK", "32")
    vllm.register()
    (name,) = registry.get_supported_resolvers()
    resolver = registry.get_resolver(name)
    assert isinstance(resolver, helpers_vllm.LoRAResolver)

    async def ask():
        return await asyncio.gather(*(resolver.resolve_lora(str(base), one) for one in (NAME, NAME, "math", "nobody")))

    first, again, other, none = asyncio.run(ask())
    assert first == again
    assert first.lora_name == NAME
    assert (Path(first.lora_path) / "adapter_config.json").is_file()
    assert first.lora_int_id != other.lora_int_id
    assert none is None
    # what cannot be made is told in the log and is no answer, so that vLLM's is "does not exist"
    assert asyncio.run(resolver.resolve_lora("/no/such/base", "math")) is None
    assert "no adapter for 'math'" in caplog.text


def test_the_entry_point_is_the_plugin():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    found = re.search(r'\[project\.entry-points\."vllm\.general_plugins"\]\nsigmix = "(.+)"\n', text)
    assert found[1] == f"{vllm.__name__}:{vllm.register.__name__}"
