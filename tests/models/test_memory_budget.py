"""Memory, disk and time from a config: what is counted against what real objects take; arithmetic that must hold."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from helpers_tiny import build_tiny
from peft import get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3nTextConfig, LlamaConfig, MambaConfig, MixtralConfig

from sigmix.errors import BaseModelError, ConfigError
from sigmix.models.memory import Load, Rates, budget, measure_rates, serving_forms, sizes
from sigmix.svf.config import SVFConfig
from sigmix.svf.tuner import svf_layers

pytestmark = pytest.mark.usefixtures("cache")
LLAMA70 = LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
    vocab_size=128256,
)  # fmt: skip
RATES = Rates("cpu", "bfloat16", 1e12, 1e11, 1e11, 1e9, {256: 0.01, 1024: 0.4})
ARCHS = ("llama", "qwen3", "gpt2")  # qwen3's heads are wider than hidden / heads


def held(tensors):
    """Bytes of storages, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ARCHS)
def test_weights_factors_and_keys_are_counted_exactly(arch, dtype):
    model = build_tiny(arch).to(getattr(torch, dtype))
    found = budget(model.config, dtype=dtype, load=Load(requests=3, context=11))
    weights = held(model.parameters())
    assert found["serve"]["parts"]["weights"] == found["train"]["parts"]["weights"] == weights
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.ones(3, 11, dtype=torch.long), past_key_values=cache)
    states = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    assert found["serve"]["parts"]["keys and values"] == held(states)
    layers = svf_layers(get_peft_model(model, SVFConfig())).values()
    short = held([layer.svf_short for layer in layers])
    spectrum = held([layer.svf_s for layer in layers])
    assert found["serve"]["forms"]["gain"] == short + spectrum
    for layer in layers:
        layer.factors()
    assert found["serve"]["forms"]["factored"] == short + spectrum + held([layer.svf_long for layer in layers])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_the_backward_pass_keeps(dtype):
    config = LlamaConfig(
        vocab_size=512, hidden_size=144, intermediate_size=384, num_hidden_layers=3, num_attention_heads=9,
        num_key_value_heads=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    model = get_peft_model(model, SVFConfig(cache=False))
    for layer in svf_layers(model).values():
        layer.factors()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    rows, tokens = 8, 24
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model.model.model(torch.zeros(rows, tokens, dtype=torch.long), use_cache=False)
    measured = sum(count for count, _ in kept.values())
    # what 64 prompts more add, without the rows of keys and values that they add too
    loads = [Load(batch=64 * n, group=1, prompt=500, answer=500) for n in (1, 2)]
    one, two = (budget(config, dtype=dtype, load=load)["train"]["parts"]["activations"] for load in loads)
    of_keys = 64 * 1000 * config.num_hidden_layers * 2 * 3 * 16 * getattr(torch, dtype).itemsize
    planned = rows * tokens * (two - one - of_keys) / (64 * 1000)
    assert planned == pytest.approx(measured, rel=0.05)


PEAK = """
import json, sys
import torch
from benchmarks.peak import high_water
from sigmix.svf.decomposition import decompose
torch.set_num_threads(1)
decompose(torch.randn(64, 96))
before = high_water()
out, inn = json.loads(sys.argv[1])
decompose(torch.randn(out, inn))
print(high_water() - before)
"""


def test_the_peak_of_a_decomposition_is_near_the_plan():
    shape = (896, 2560)
    config = LlamaConfig(
        vocab_size=64, hidden_size=shape[0], intermediate_size=shape[1], num_hidden_layers=1, num_attention_heads=8
    )
    planned = budget(config, dtype="float32")["decompose"]
    assert sorted(planned["largest"]) == sorted(shape)
    done = subprocess.run([sys.executable, "-c", PEAK, json.dumps(shape)], capture_output=True, text=True, check=True)
    assert planned["peak_bytes"] == pytest.approx(int(done.stdout.splitlines()[-1]), rel=0.3)


def test_a_70b_model_is_streamed_in_a_few_of_its_matrices():
    found = budget(LLAMA70, RATES, gpus=8)
    assert found["decompose"]["whole_model_bytes"] == pytest.approx(141.1e9, rel=1e-3)  # 70.55 billion in bfloat16
    assert found["decompose"]["peak_bytes"] < 6e9
    largest = 8192 * 28672
    assert found["decompose"]["parts"] == {
        "weight": 2 * largest, "float64": 8 * largest, "eigenproblem": 5 * 8 * 8192**2
    }  # fmt: skip
    assert found["serve"]["kv_bytes_per_1000_tokens"] == 1000 * 2 * 80 * 8 * 128 * 2
    assert found["train"]["per_gpu_bytes"] < found["train"]["peak_bytes"] / 4
    one = budget(LLAMA70, RATES)
    assert one["train"]["per_gpu_bytes"] == one["train"]["peak_bytes"]
    assert one["serve"]["per_gpu_bytes"] == one["serve"]["peak_bytes"]
    deeper = budget(LlamaConfig(**{**LLAMA70.to_dict(), "num_hidden_layers": 160}), RATES)
    assert deeper["decompose"]["peak_bytes"] == found["decompose"]["peak_bytes"]
    assert deeper["decompose"]["seconds"] == pytest.approx(2 * found["decompose"]["seconds"])
    assert deeper["decompose"]["disk_bytes"] == 2 * found["decompose"]["disk_bytes"]


def test_a_quantised_base_has_neither_merged_nor_factored_form():
    plain, small = budget(LLAMA70, RATES), budget(LLAMA70, RATES, quantization="nf4")
    assert set(plain["serve"]["forms"]) == {"base", "gain", "merged", "factored"}
    assert set(small["serve"]["forms"]) == {"base", "gain"}
    assert small["train"]["parts"]["weights"] < 0.32 * plain["train"]["parts"]["weights"]
    assert small["train"]["parts"]["factors"] < plain["train"]["parts"]["factors"]


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("load", [Load(), Load(batch=2, group=1, prompt=1, answer=1)])  # learning, acting takes most
def test_one_device_holds_the_peak(load, quantization):
    config = LlamaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=8)
    train = budget(config, load=load, quantization=quantization)["train"]
    assert train["per_gpu_bytes"] == train["peak_bytes"]
    assert budget(config, load=load, gpus=4, quantization=quantization)["train"]["per_gpu_bytes"] < train["peak_bytes"]


def test_a_written_token_reads_what_the_form_multiplies_with():
    few = Load(requests=1, context=1)  # reading the weights takes all the time
    found = budget(LLAMA70, RATES, load=few)["serve"]
    speed = found["decode_tokens_per_second"]
    assert speed["merged"] == speed["base"]
    many = budget(LLAMA70, RATES, load=Load(requests=1, context=1, mixes=9))["serve"]
    assert many["decode_tokens_per_second"] == speed
    table = 2 * 128256 * 8192  # of which a token reads a row
    kv = found["parts"]["keys and values"]
    assert RATES.copy / speed["base"] == pytest.approx(found["parts"]["weights"] - table + kv)
    assert RATES.copy / speed["gain"] == pytest.approx(RATES.copy / speed["base"] + found["forms"]["gain"])
    both = RATES.copy / speed["base"] - 2 * 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    assert RATES.copy / speed["factored"] == pytest.approx(both + found["forms"]["factored"])


def test_flops_are_of_the_weights_that_a_token_meets():
    def met(config):
        return RATES.matmul / budget(config, RATES)["serve"]["prefill_tokens_per_second"]["base"] / 2

    small = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tied, untied = (LlamaConfig(**small, **heads, tie_word_embeddings=tied) for tied in (True, False))
    assert met(tied) == pytest.approx(met(untied))
    # with a router of 64 numbers an expert in each layer
    of_many = {**small, **heads, "tie_word_embeddings": True, "num_experts_per_tok": 2}
    two, eight = (met(MixtralConfig(**of_many, num_local_experts=count)) for count in (2, 8))
    assert eight - two == pytest.approx(2 * 64 * 6)


def test_four_bits_are_packed_on_a_gpu():
    small = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    config = LlamaConfig(**small, num_attention_heads=4)

    def bits(**options):
        return budget(config, quantization="int4", **options)["serve"]["parts"]["weights"]

    on_gpu = Rates("cuda:0", "bfloat16", 1e12, 1e11, 1e11, 1e9, {256: 0.01, 1024: 0.4})
    assert bits() == bits(rates=RATES) == budget(config, quantization="int8")["serve"]["parts"]["weights"]
    packed = budget(config, quantization="nf4")["serve"]["parts"]["weights"]
    assert packed == bits(gpus=2) == bits(rates=on_gpu) == bits(cuda=True)
    assert bits(gpus=2, cuda=False) == bits()


@pytest.mark.parametrize(
    "config, named",
    [
        (MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4), "does not say num_attention"),
        (Gemma3nTextConfig(), "has one for each layer as intermediate_size"),
    ],
)
def test_a_model_whose_layers_are_not_counted_says_so(config, named):
    with pytest.raises(BaseModelError, match=f"kind '{config.model_type}' are not planned for: the config {named}"):
        budget(config)
    assert serving_forms(sizes(config))["gain"] > 0  # weights and factors are counted all the same


def test_times_follow_the_rates():
    twice = Rates("cpu", "bfloat16", 2e12, 2e11, 2e11, 2e9, {256: 0.005, 1024: 0.2})
    slow, fast = budget(LLAMA70, RATES), budget(LLAMA70, twice)
    assert fast["decompose"]["seconds"] == pytest.approx(slow["decompose"]["seconds"] / 2)
    assert fast["train"]["seconds_per_step"] == pytest.approx(slow["train"]["seconds_per_step"] / 2)
    for form, speed in slow["serve"]["decode_tokens_per_second"].items():
        assert fast["serve"]["decode_tokens_per_second"][form] == pytest.approx(2 * speed)
    assert budget(LLAMA70)["train"].get("seconds_per_step") is None
    assert RATES.eigh_seconds(512) == pytest.approx((0.01 * 0.4) ** 0.5)  # half way on both log scales
    assert RATES.eigh_seconds(2048) == pytest.approx(8 * 0.4)


def test_rates_are_measured():
    rates = measure_rates("cpu", "float32", sizes=(16, 48))
    assert min(rates.matmul, rates.matmul64, rates.copy, rates.hashed, *rates.eigh.values()) > 0
    assert set(rates.eigh) == {16, 48}


def test_bad_input():
    with pytest.raises(ConfigError, match="float8"):
        budget(LLAMA70, dtype="float8")
    with pytest.raises(ConfigError, match="int9"):
        budget(LLAMA70, quantization="int9")
    with pytest.raises(ConfigError, match="at least one device"):
        budget(LLAMA70, gpus=0)
    with pytest.raises(ConfigError, match="at least 1"):
        Load(batch=0)
