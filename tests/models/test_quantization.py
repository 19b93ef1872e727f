"""Device maps (layers on the disk are read one at a time and are the same base) and stored quantization."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from helpers_tiny import build_tiny, build_tokenizer
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from sigmix import Engine, Expert, Mix, SVFConfig, load_base
from sigmix.errors import BaseModelError, ConfigError
from sigmix.experts.fingerprint import fingerprint
from sigmix.models.quantization import QUANTIZATIONS, named_config
from sigmix.svf import decomposition as module
from sigmix.svf.linears import readers
from sigmix.svf.tuner import svf_layers

pytestmark = pytest.mark.usefixtures("cache")
IDS = torch.tensor([[5, 9, 33, 71, 120, 8], [77, 3, 250, 14, 14, 60]])
DISK = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
    "model.rotary_emb": "cpu", "lm_head": "cpu",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "base"
    build_tiny("qwen2").save_pretrained(path)  # with biases, which are offloaded too
    build_tokenizer().save_pretrained(path)
    return path


def expert_on(model):
    adapted = get_peft_model(model, SVFConfig())
    for number, layer in enumerate(svf_layers(adapted).values()):
        draw = torch.Generator().manual_seed(number)
        layer.svf_z["default"].weight.data.copy_(1 + 0.3 * torch.randn(layer.r, generator=draw))
    return Expert.from_model(adapted, name="mine")


def test_layers_on_the_disk_compute_what_whole_ones_do(folder, tmp_path, monkeypatch):
    whole, tokenizer = load_base(folder, "float32")
    expert = expert_on(load_base(folder, "float32")[0])
    exact = Engine(whole, tokenizer, {"mine": expert})
    spread, _ = load_base(folder, "float32", device_map=DISK, offload_folder=tmp_path / "offloaded")
    assert spread.model.layers[1].mlp.up_proj.weight.is_meta
    assert fingerprint(spread) == fingerprint(whole)

    def called(_):
        raise AssertionError("decomposed although the cache has it")

    monkeypatch.setattr(module, "decompose", called)
    engine = Engine(spread, tokenizer, {"mine": expert})
    assert torch.equal(engine.logits(IDS), exact.logits(IDS))
    for mix in ("mine", [Mix.one("mine"), Mix.base()]):
        torch.testing.assert_close(engine.logits(IDS, None, mix), exact.logits(IDS, None, mix), rtol=1e-4, atol=1e-5)
    mixes = [Mix.one("mine"), Mix.base()]
    found = engine.generate(["hi", "you"], mixes, max_new_tokens=5)
    assert [one.ids for one in found] == [one.ids for one in exact.generate(["hi", "you"], mixes, max_new_tokens=5)]
    assert spread.model.layers[1].mlp.up_proj.weight.is_meta  # nothing stays in memory between passes
    assert fingerprint(spread) == fingerprint(whole)
    with pytest.raises(ConfigError, match="factored"):
        engine.logits(IDS, None, "mine", form="factored")


def test_what_lies_on_the_disk_is_named_without_reading_it(folder, tmp_path, monkeypatch):
    spread = load_base(folder, "float32", device_map=DISK, offload_folder=tmp_path / "offloaded")[0]
    layer = spread.model.layers[1].mlp.up_proj
    with monkeypatch.context() as patch:
        patch.setattr(OffloadedWeightsLoader, "__getitem__", None)  # what accelerate reads the disk with
        found = readers(spread)
        patch.setattr(PrefixedDataset, "__getitem__", None)
        assert readers(spread).keys() == found.keys()
    assert torch.equal(found[id(layer.weight)](), load_base(folder, "float32")[0].model.layers[1].mlp.up_proj.weight)


def test_a_bfloat16_base_on_the_disk_is_that_base(folder, tmp_path):
    whole = load_base(folder, "bfloat16")[0]
    spread = load_base(folder, "bfloat16", device_map=DISK, offload_folder=tmp_path / "offloaded")[0]
    assert spread.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert fingerprint(spread) == fingerprint(whole)
    expert_on(spread).check(whole)


def test_z_learns_on_layers_that_are_on_the_disk(folder, tmp_path):
    grads = {}
    for where in (None, DISK):
        base = load_base(folder, "float32", device_map=where, offload_folder=tmp_path / "offloaded")[0]
        model = get_peft_model(base, SVFConfig())
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads[where is None] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(grads[True]) == 14
    for name, grad in grads[True].items():
        torch.testing.assert_close(grads[False][name], grad, rtol=1e-3, atol=1e-6)


def test_one_device_by_name_is_as_without_a_map(folder):
    found = load_base(folder, "float32", device_map={"": "cpu"})[0]
    with torch.no_grad():
        assert torch.equal(found(IDS).logits, load_base(folder, "float32")[0](IDS).logits)
    expert_on(found).check(load_base(folder, "float32")[0])


def test_maps_that_cannot_work(folder, tmp_path):
    with pytest.raises(BaseModelError, match="device map"):
        load_base(folder, device_map={"": "nowhere"})
    with pytest.raises(BaseModelError, match="embed_tokens"):
        load_base(folder, device_map={"": "disk"}, offload_folder=tmp_path / "o")


def test_a_config_object_of_transformers_is_taken(folder):
    pytest.importorskip("torchao")
    by_name = load_base(folder, "float32", quantization_config="int8")[0]
    config = named_config("int8", torch.float32, torch.device("cpu"))
    by_object = load_base(folder, "float32", quantization_config=config)[0]
    assert fingerprint(by_object) == fingerprint(by_name)
    assert (by_name.sigmix_base["quantization"], by_object.sigmix_base["quantization"]) == ("int8", "int8")


def test_llm_int8_is_refused(folder):
    with pytest.raises(ConfigError, match="int8"):
        load_base(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


# --- checkpoints that are stored quantized


def stored(folder, config, dtype=torch.float32):
    """A folder with the weights of ``folder`` as transformers stores them under ``config``."""
    path = folder.with_name("stored")
    options = {"quantization_config": config, "dtype": dtype, "device_map": {"": "cpu"}}
    AutoModelForCausalLM.from_pretrained(folder, **options).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def four_bits(**changes):
    return BitsAndBytesConfig(load_in_4bit=True, **{"bnb_4bit_quant_type": "nf4", **changes})


def torchao(name):
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(getattr(quantization, name)()) if name[0].isupper() else named_config(
        name, torch.float32, torch.device("cpu")
    )  # fmt: skip


STORED = [
    ("nf4", lambda: four_bits()),
    ("fp4", lambda: four_bits(bnb_4bit_quant_type="fp4")),
    ("nf4-double", lambda: four_bits(bnb_4bit_use_double_quant=True)),
    ("nf4", lambda: four_bits(bnb_4bit_quant_storage=torch.bfloat16)),
    ("nf4", lambda: four_bits(bnb_4bit_compute_dtype=torch.bfloat16)),  # as most on the hub
    ("int8", lambda: torchao("int8")),
    ("int4", lambda: torchao("int4")),
    ("Float8WeightOnlyConfig", lambda: torchao("Float8WeightOnlyConfig")),
]


@pytest.mark.parametrize(("name", "config"), STORED, ids=[f"{n}-{name}" for n, (name, _) in enumerate(STORED)])
def test_a_stored_quantization_is_recorded_and_no_work_is_lost_on_it(folder, name, config):
    path = stored(folder, config())
    model, tokenizer = load_base(path, "float32")
    assert model.sigmix_base["quantization"] == name
    with torch.no_grad():
        before = model(IDS).logits
    expert = expert_on(model)  # after a pass
    assert expert.base["dtype"] == f"float32 in {name}"
    expert.save_pretrained(folder.with_name("expert"))
    again, _ = load_base(path, "float32", quantization_config=name if name in QUANTIZATIONS else config())
    assert again.sigmix_base == model.sigmix_base
    engine = Engine(again, tokenizer, {"mine": Expert.from_pretrained(folder.with_name("expert"))})
    assert torch.equal(engine.logits(IDS), before)
    assert float((engine.logits(IDS, mix="mine") - before).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (four_bits(), "int8", "is stored quantized to nf4.*'int8'"),
        (four_bits(bnb_4bit_quant_type="fp4"), "nf4", "is stored quantized to fp4.*'nf4'"),
        (four_bits(bnb_4bit_use_double_quant=True), four_bits(), "is stored quantized to nf4-double.*'nf4'"),
        (four_bits(), "bogus", "is stored quantized to nf4.*'bogus'"),
    ],
)
def test_a_quantization_that_contradicts_the_stored_one_is_refused(folder, config, given, message):
    with pytest.raises(ConfigError, match=f"{message} -> leave quantization_config"):
        load_base(stored(folder, config), quantization_config=given)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"bitsandbytes' LLM\.int8\(\)"),
        ({"bits": 4}, "an unknown format"),
    ],
)
def test_other_stored_formats_are_refused_by_name(folder, config, name):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": config}))
    with pytest.raises(BaseModelError, match=f"stored quantized by {name}.* -> .*original checkpoint.*int8"):
        load_base(folder)


def test_packed_weights_without_a_quantization_config_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(8, 96, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"stored quantized.*up_proj\.qweight"):
        load_base(folder)


def test_svf_on_a_model_loaded_by_transformers_can_be_saved_after_a_pass(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bits(), dtype=torch.float32)
    adapted = get_peft_model(model, SVFConfig())
    with torch.no_grad():
        adapted.eval()(IDS)  # bitsandbytes would repack the weights of some CPUs here
    Expert.from_model(adapted, name="mine").save_pretrained(folder.with_name("expert"))
