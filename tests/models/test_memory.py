"""What a base needs, counted from its config and compared with real models."""

from __future__ import annotations

import pytest
import torch
from helpers_tiny import ARCHITECTURES
from safetensors.torch import save_file
from transformers import BertConfig, T5Config
from transformers.pytorch_utils import Conv1D

from sigmix.errors import BaseModelError
from sigmix.models.memory import model_plan


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_plan_matches_the_model(arch, tiny):
    model = tiny(arch)
    plan = model_plan(model.config)
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head]
    ranks = [min(m.weight.shape) for m in linear]
    assert plan["parameters"] == sum(p.numel() for p in model.parameters())
    assert plan["matrices"] == len(linear)
    assert plan["z_parameters"] == sum(ranks)
    assert plan["cache_bytes"] == sum(4 * (r * r + r) for r in ranks)
    assert plan["factored_bytes"] == sum(4 * r * (sum(m.weight.shape) + 1) for r, m in zip(ranks, linear))
    assert sum(shape["count"] for shape in plan["by_shape"]) == len(linear)


def test_shapes_are_out_by_in_for_conv1d_too(tiny):
    shapes = {(shape["out"], shape["in"]) for shape in model_plan(tiny("gpt2").config)["by_shape"]}
    assert (192, 64) in shapes  # q, k and v of 64 each, from 64


def test_the_size_of_an_expert_is_near_that_of_a_file(tiny_llama, tmp_path):
    z = {
        f"base_model.model.{name}.svf_z.weight": torch.ones(min(module.weight.shape))
        for name, module in tiny_llama.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    save_file(z, tmp_path / "z.safetensors")
    plan = model_plan(tiny_llama.config)
    assert plan["expert_bytes"] == pytest.approx((tmp_path / "z.safetensors").stat().st_size, rel=0.15)


def test_fused_experts_are_named_as_not_adapted(tiny):
    plan = model_plan(tiny("mixtral").config)
    fused = [entry for entry in plan["not_adapted"] if len(entry["shape"]) == 3]
    assert {entry["name"] for entry in fused} == {"experts.gate_up_proj", "experts.down_proj"}
    assert all("fused experts" in entry["why"] for entry in fused)


@pytest.mark.parametrize("config", [T5Config(), BertConfig(hidden_size=7, num_attention_heads=3)])
def test_a_config_that_gives_no_model_is_a_clear_error(config):
    with pytest.raises(BaseModelError, match=config.model_type):
        model_plan(config)


def test_planning_a_large_model_allocates_nothing():
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
    plan = model_plan(config)
    assert plan["weights_bf16_bytes"] > 100e9
    assert plan["matrices"] == 80 * 7
