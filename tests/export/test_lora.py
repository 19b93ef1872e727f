"""A LoRA of a mix: exact at full rank, at a lower one as wrong as it says, and loadable by plain PEFT."""

from __future__ import annotations

import json

import pytest
import torch
from helpers_engine import TOLERANCE
from helpers_export import base_folder, delta, experts, ids
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sigmix.engine import Engine
from sigmix.errors import ConfigError, FingerprintError, OutputError, SigmixError
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix
from sigmix.export import low_rank as lowrank
from sigmix.export.base import BaseCheckpoint
from sigmix.export.lora import export_lora
from sigmix.export.low_rank import LowRank
from sigmix.export.verify import Reference, compare_logits, verify_lora
from sigmix.models.loading import load_base

MIX = Mix.parse("math:0.7+word:0.5")


@pytest.fixture
def truncated(tmp_path, cache):
    """A `LowRank` of the tiny Llama."""
    folder, bank = base_folder(tmp_path / "base"), experts()
    return LowRank.from_mix(BaseCheckpoint(folder), MIX, bank)


def with_peft(source, out):
    base = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(out)).eval()


@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi3", "gpt2", "mixtral"])
def test_exact_in_plain_peft(tmp_path, cache, arch):
    folder, bank = base_folder(tmp_path / "base", arch), experts(arch)
    low = LowRank.from_mix(BaseCheckpoint(folder), MIX, bank)
    figures = export_lora(low, tmp_path / "out")
    assert figures["error"] == 0
    row = torch.tensor([ids()])
    engine = Engine(*load_base(folder, "float32"), bank)
    ours = engine.logits(row, mix=MIX)
    model = with_peft(low.base, tmp_path / "out")
    assert not any("SVF" in type(module).__name__ for module in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=row).logits, ours, **TOLERANCE)
        with model.disable_adapter():
            assert not torch.allclose(model(input_ids=row).logits, ours, atol=1e-2)


def test_factors_are_the_change(truncated):
    for path in truncated.paths:
        a, b = truncated.factors(path)
        torch.testing.assert_close((b @ a).double(), delta(truncated.base, truncated, path), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 5, 40])
def test_a_truncated_one_is_the_best_of_its_rank_with_the_stated_error(truncated, rank):
    truncated.set_ranks(rank=rank)
    total, lost, weights = 0.0, 0.0, 0.0
    stated = truncated.errors
    for path in truncated.paths:
        a, b = truncated.factors(path)
        assert a.shape[0] == b.shape[1] == min(rank, truncated.exact[path])
        change = delta(truncated.base, truncated, path)
        left = change - (b @ a).double()
        best = torch.linalg.svdvals(change)[rank:].norm()  # Eckart and Young
        torch.testing.assert_close(left.norm(), best, rtol=1e-4, atol=1e-4)
        assert stated[path] == pytest.approx(float(left.norm() / change.norm()), rel=1e-3, abs=1e-5)
        total, lost = total + float(change.norm() ** 2), lost + float(left.norm() ** 2)
        weights += float(truncated.base.layer(path).matrix().double().norm() ** 2)
    figures = truncated.describe()
    assert figures["error"] == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    assert figures["error_of_weights"] == pytest.approx((lost / weights) ** 0.5, rel=1e-3)
    assert figures["dropped"] == figures["components"] - sum(min(rank, k) for k in truncated.exact.values())


def test_an_error_is_met_with_as_few_components_as_can_be(truncated, tmp_path):
    truncated.set_ranks(error=0.3)
    error, ranks = truncated.error, dict(truncated.ranks)
    assert 0.25 < error <= 0.3
    assert len(set(ranks.values())) > 1
    every = sorted((float(e), path) for path, energy in truncated.energy.items() for e in energy)
    kept = sum(ranks.values())
    assert min(float(truncated.energy[p].sort(descending=True).values[k - 1]) for p, k in ranks.items() if k) == (
        pytest.approx(every[len(every) - kept][0])
    )
    export_lora(truncated, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    model = with_peft(truncated.base, tmp_path / "out")
    modules = dict(model.named_modules())
    for path in truncated.paths:  # PEFT's own scale is 1 everywhere
        a, b = truncated.factors(path)
        found = modules[f"base_model.model.{path}"].get_delta_weight("default")
        torch.testing.assert_close(found, b @ a, rtol=1e-5, atol=1e-6)
    truncated.set_ranks(error=0.0)
    assert truncated.ranks == truncated.exact


def test_ranks_of_vllm(truncated, tmp_path):
    truncated.set_ranks(vllm=True)
    assert truncated.pad == 64  # all ranks of this base are 32 or 64
    assert truncated.error == 0
    truncated.set_ranks(rank=9, vllm=True)
    assert truncated.pad == 16
    export_lora(truncated, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (16, 16, {}, {})
    for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        assert tensor.shape[0 if "lora_A" in name else 1] == 16
    reference = Reference(truncated.base, MIX, experts(), upcast=True)
    assert verify_lora(tmp_path / "out", truncated.base, reference)["kl"] > 0
    truncated.set_ranks(vllm=True, error=0.3)
    assert truncated.pad in lowrank.VLLM_RANKS
    assert truncated.error <= 0.3
    chosen = lowrank.VLLM_RANKS.index(truncated.pad)
    truncated.set_ranks(rank=lowrank.VLLM_RANKS[chosen - 1], vllm=True)
    assert truncated.error > 0.3
    # a rank above what a matrix has is filled up with zeros
    truncated.set_ranks(rank=128, vllm=True)
    a, b = truncated.factors("model.layers.0.self_attn.k_proj")
    assert a.shape[0] == b.shape[1] == 128
    torch.testing.assert_close(
        (b @ a).double(), delta(truncated.base, truncated, "model.layers.0.self_attn.k_proj"), rtol=1e-4, atol=1e-5
    )


def test_what_vllm_cannot_take(truncated, monkeypatch):
    with pytest.raises(ConfigError, match="512"):
        truncated.set_ranks(rank=513, vllm=True)
    monkeypatch.setattr(lowrank, "VLLM_RANKS", (1, 8))
    with pytest.raises(ConfigError, match="8.*--error"):
        truncated.set_ranks(error=0.01, vllm=True)
    truncated.set_ranks(vllm=True)
    assert truncated.pad == 8
    assert truncated.error > 0.1


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"error": 1.0}, {"error": -0.1}, {"rank": 4, "error": 0.1}]
)
def test_ranks_that_cannot_be(truncated, options):
    with pytest.raises(ConfigError):
        truncated.set_ranks(**options)


def test_only_what_is_adapted_is_targeted(tmp_path, cache):
    folder = base_folder(tmp_path / "base")
    bank = experts(targets="attention")
    export_lora(LowRank.from_mix(BaseCheckpoint(folder), MIX, bank), tmp_path / "all")
    config = json.loads((tmp_path / "all" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    one = experts(targets=["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"])
    export_lora(LowRank.from_mix(BaseCheckpoint(folder), MIX, one), tmp_path / "one")
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    layers = Mix({"math": [0.0, 0.8]})  # weights per layer
    low = LowRank.from_mix(BaseCheckpoint(folder), layers, bank)
    assert all(".layers.1." in path for path in low.paths)
    export_lora(low, tmp_path / "layers")
    engine = Engine(*load_base(folder, "float32"), bank)
    row = torch.tensor([ids()])
    with torch.no_grad():
        theirs = with_peft(low.base, tmp_path / "layers")(input_ids=row).logits
    torch.testing.assert_close(theirs, engine.logits(row, mix=layers), **TOLERANCE)


def test_refused(truncated, tmp_path, cache):
    folder, bank = base_folder(tmp_path / "other", seed=3), experts()
    with pytest.raises(FingerprintError):
        LowRank.from_mix(BaseCheckpoint(folder), MIX, bank)
    with pytest.raises(ConfigError, match="base"):
        LowRank.from_mix(truncated.base, Mix.base(), bank)
    (tmp_path / "out").write_text("taken")
    with pytest.raises(OutputError):
        export_lora(truncated, tmp_path / "out")
    (tmp_path / "damaged").mkdir()
    ours = Reference(truncated.base, MIX, bank, upcast=True)
    with pytest.raises(SigmixError, match="peft"):
        verify_lora(tmp_path / "damaged", truncated.base, ours)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_and_the_card(truncated, tmp_path, precision):
    truncated.set_ranks(rank=8)
    figures = export_lora(truncated, tmp_path / "out", precision)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{precision}"}
    assert figures["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in ("library_name: peft", MIX.id, f"{figures['error']:.2%}", "scale is 1"):
        assert fact in card


def test_matrices_that_cannot_change(tmp_path, cache):
    folder = base_folder(tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    zero, other = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    bank = {
        "math": Expert("math", {zero: torch.full((64,), 1.5), other: torch.full((64,), 1.5)}, {}),
        "word": Expert("word", {zero: torch.full((64,), 1.5)}, {}),
    }
    low = LowRank.from_mix(BaseCheckpoint(folder), Mix.one("math"), bank)
    for choice in ({}, {"error": 0.5}, {"rank": 4}, {"rank": 8, "vllm": True}):
        low.set_ranks(**choice)
        found = low.describe()
        assert low.errors[zero] == 0
        assert found["worst"] == [other, low.errors[other]] or not found["error"]
        export_lora(low, tmp_path / str(choice))
        names = load_file(tmp_path / str(choice) / "adapter_model.safetensors")
        assert any(zero in name for name in names) == ("vllm" in choice)  # zeros, where all have one rank
    with pytest.raises(ConfigError, match="word"):
        LowRank.from_mix(BaseCheckpoint(folder), Mix.one("word"), bank)


def test_comparison_of_logits():
    one = torch.zeros(2, 3)
    other = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    found = compare_logits([one], [other])
    p = torch.tensor([1.0, 0.0, 0.0]).softmax(0)
    assert found["max"] == 1
    assert found["kl"] == pytest.approx(float((1 / 3 * (1 / 3 / p).log()).sum()) / 2)
    assert compare_logits([other], [other]) == {"max": 0.0, "kl": 0.0, "same_top": 1.0}
    assert compare_logits([torch.tensor([[0.0, 1.0]])], [torch.tensor([[1.0, 0.0]])])["same_top"] == 0
    with pytest.raises(SigmixError, match="--dtype float32"):
        compare_logits([one], [other * float("nan")])


def test_what_it_holds_is_peft_s_own(truncated, tmp_path):
    export_lora(truncated, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    read = LoraConfig.from_pretrained(str(tmp_path / "out")).to_dict()
    assert set(read.pop("target_modules")) == set(config.pop("target_modules"))
    assert {key: read[key] for key in config} == config
    names = set(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert names == {f"base_model.model.{path}.lora_{side}.weight" for path in truncated.paths for side in "AB"}
