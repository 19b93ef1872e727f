"""The plugin and its adapters against vLLM's own code, where vLLM is installed: what needs no engine and no GPU."""

from __future__ import annotations

import asyncio
import importlib.util

import pytest
import torch
from helpers_export import base_folder, experts

from sigmix.experts.bank import Bank
from sigmix.experts.mix import Mix
from sigmix.export.base import BaseCheckpoint
from sigmix.export.lora import export_lora
from sigmix.export.low_rank import VLLM_RANKS, LowRank

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
NAME = "math:0.7+word:0.5"
MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def home(tmp_path, cache):
    base = base_folder(tmp_path / "base")
    bank = Bank(tmp_path / "bank", create=True)
    for one in experts().values():
        bank.add(one)
    return base, bank


def loaded(path, rank):
    """The adapter as vLLM's worker loads it."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_local_dir(str(path), 256)
    helper.validate_legal(LoRAConfig(max_lora_rank=rank))
    return LoRAModel.from_local_checkpoint(
        str(path), MODULES, helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )


def same(model, low):
    assert set(model.loras) == set(low.paths)
    for path, layer in model.loras.items():
        a, b = low.factors(path)
        found = layer.lora_b @ layer.lora_a * layer.scaling
        torch.testing.assert_close(found, b @ a, rtol=1e-5, atol=1e-6)


def test_resolved_through_vllms_registry_and_loaded_by_its_loader(home, monkeypatch):
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    from sigmix.integrations import vllm

    base, bank = home
    monkeypatch.setattr(LoRAResolverRegistry, "resolvers", {})
    monkeypatch.setenv("SIGMIX_VLLM_EXPERTS", str(bank.folder))
    monkeypatch.setenv("SIGMIX_VLLM_RANK", "64")
    vllm.register()
    resolver = LoRAResolverRegistry.get_resolver("sigmix")
    assert isinstance(resolver, LoRAResolver)
    request = asyncio.run(resolver.resolve_lora(str(base), NAME))
    assert isinstance(request, LoRARequest)
    assert asyncio.run(resolver.resolve_lora(str(base), "nobody")) is None
    low = LowRank.from_mix(BaseCheckpoint(base), Mix.parse(NAME), bank)
    same(loaded(request.lora_path, 64), low)
    with pytest.raises(ValueError, match="greater than max_lora_rank"):
        loaded(request.lora_path, 16)


def test_own_ranks_of_every_matrix_are_scaled_right(home, tmp_path):
    base, bank = home
    low = LowRank.from_mix(BaseCheckpoint(base), Mix.parse(NAME), bank)
    low.set_ranks(error=0.3)
    export_lora(low, tmp_path / "out")
    same(loaded(tmp_path / "out", 64), low)


def test_the_ranks_are_vllms():
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == VLLM_RANKS
