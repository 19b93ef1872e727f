"""Device maps: layers left on the disk compute in the gain form, are read one at a time, and are the same base."""

from __future__ import annotations

import pytest
import torch
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from helpers_tiny import build_tiny, build_tokenizer
from peft import get_peft_model
from transformers import BitsAndBytesConfig

from sigmix import Engine, Expert, Mix, SVFConfig, load_base
from sigmix.errors import BaseModelError, ConfigError
from sigmix.experts.fingerprint import fingerprint
from sigmix.models.quantization import named_config
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
