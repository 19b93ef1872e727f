"""What a base model needs, counted from its config and compared with real models, files and tensors."""

from __future__ import annotations

import pytest
import torch
from helpers_architectures import build
from helpers_tiny import ARCHITECTURES, build_tiny
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import BertConfig, DynamicCache, LlamaConfig, MambaConfig, T5Config
from transformers.pytorch_utils import Conv1D

from sigmix.errors import BaseModelError, ConfigError
from sigmix.models.memory import empty_model, model_plan
from sigmix.svf.config import SVFConfig
from sigmix.svf.tuner import svf_layers, target_layers

pytestmark = pytest.mark.usefixtures("cache")
LLAMA70 = LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
    vocab_size=128256,
)  # fmt: skip


def plan(config, **options):
    model = empty_model(config)
    return model_plan(model, target_layers(model), **options)


def held(tensors):
    """Bytes of storages, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_counts_are_those_of_the_model(arch, tiny):
    model = tiny(arch)
    found = plan(model.config)
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head]
    ranks = [min(m.weight.shape) for m in linear]
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["matrices"] == len(linear) == sum(shape["count"] for shape in found["by_shape"])
    assert found["z_parameters"] == sum(ranks)
    assert found["cache_bytes"] == sum(4 * (r * r + r) for r in ranks)


@pytest.mark.parametrize("name", ["lfm2", "falcon_h1", "deepseek_v3", "gemma3n_text", "falcon", "gpt_bigcode"])
def test_only_layers_with_keys_and_values_count_for_the_cache(name):
    model = build(name)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.ones(2, 5, dtype=torch.long), past_key_values=cache)
    filled = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    states = [states for layer in filled for states in (layer.keys, layer.values)]
    assert plan(model.config, dtype="float32")["kv_bytes_per_1000_tokens"] == 100 * held(states)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])  # qwen3's heads are wider than hidden / heads
def test_memory_is_that_of_the_tensors(arch, dtype):
    model = build_tiny(arch).to(getattr(torch, dtype))
    found = plan(model.config, dtype=dtype)
    assert found["weights_bytes"] == held(model.parameters())
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.ones(2, 5, dtype=torch.long), past_key_values=cache)
    states = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    assert found["kv_bytes_per_1000_tokens"] == 100 * held(states)
    layers = svf_layers(get_peft_model(model, SVFConfig())).values()
    square = held([layer.svf_short for layer in layers]) + held([layer.svf_s for layer in layers])
    assert found["form_bytes"]["gain"] == square
    for layer in layers:
        layer.factors()
    assert found["form_bytes"]["factored"] == square + held([layer.svf_long for layer in layers])


def test_shapes_are_out_by_in_for_conv1d_too(tiny):
    shapes = {(shape["out"], shape["in"]) for shape in plan(tiny("gpt2").config)["by_shape"]}
    assert (192, 64) in shapes  # q, k and v of 64 each, from 64


def test_the_size_of_an_expert_is_that_of_its_file(tiny_llama, tmp_path):
    layers = target_layers(tiny_llama)
    z = {f"base_model.model.{path}.svf_z.weight": torch.ones(min(m.weight.shape)) for path, m in layers.items()}
    save_file(z, tmp_path / "z.safetensors")
    found = model_plan(tiny_llama, layers)
    assert found["expert_bytes"] == pytest.approx((tmp_path / "z.safetensors").stat().st_size, rel=0.15)


def test_parameters_that_are_not_adapted_are_listed_with_the_reason(tiny):
    found = {entry["name"]: entry for entry in plan(tiny("mixtral").config)["not_adapted"]}
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        assert len(found[name]["shape"]) == 3
        assert "fused experts" in found[name]["why"]
    assert found["embed_tokens.weight"]["why"] == "embedding"


def test_a_70b_model_is_planned_without_allocating_it():
    found = plan(LLAMA70)
    assert found["weights_bytes"] == pytest.approx(141.1e9, rel=1e-3)  # 70.55 billion parameters in bfloat16
    assert found["matrices"] == 80 * 7
    assert found["kv_bytes_per_1000_tokens"] == 1000 * 2 * 80 * 8 * 128 * 2
    assert found["decompose_bytes"] == (2 + 8) * 8192 * 28672 + 5 * 8 * 8192**2
    deeper = plan(LlamaConfig(**{**LLAMA70.to_dict(), "num_hidden_layers": 160}))
    assert deeper["decompose_bytes"] == found["decompose_bytes"]
    assert deeper["disk_bytes"] == 2 * found["disk_bytes"]
    assert deeper["activation_bytes_per_1000_tokens"] == 2 * found["activation_bytes_per_1000_tokens"]


def test_a_quantized_base_has_neither_merged_nor_factored_form():
    full, small = plan(LLAMA70), plan(LLAMA70, quantization="nf4")
    assert set(full["form_bytes"]) == {"base", "gain", "merged", "factored"}
    assert set(small["form_bytes"]) == {"base", "gain"}
    assert small["weights_bytes"] < 0.32 * full["weights_bytes"]
    assert small["train_bytes"] < full["train_bytes"]
    assert small["weights_bf16_bytes"] == full["weights_bf16_bytes"]


def test_int4_is_packed_on_a_gpu_only():
    cpu, gpu = (plan(LLAMA70, quantization="int4", cuda=cuda)["weights_bytes"] for cuda in (False, True))
    assert cpu == plan(LLAMA70, quantization="int8")["weights_bytes"]
    assert gpu == plan(LLAMA70, quantization="nf4")["weights_bytes"]


def test_a_config_without_attention_has_no_cache_per_token():
    found = plan(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4))
    assert found["kv_bytes_per_1000_tokens"] is found["activation_bytes_per_1000_tokens"] is None
    assert found["form_bytes"]["gain"] > 0


@pytest.mark.parametrize("config", [T5Config(), BertConfig(hidden_size=7, num_attention_heads=3)])
def test_a_config_that_gives_no_model_is_named(config):
    with pytest.raises(BaseModelError, match=config.model_type):
        empty_model(config)


@pytest.mark.parametrize("options", [{"dtype": "float8"}, {"quantization": "int9"}])
def test_invalid_options_are_named(options):
    with pytest.raises(ConfigError, match=next(iter(options.values()))):
        plan(LLAMA70, **options)
