"""Life of adapters through PEFT's own interface: save, load, switch, mix, delete, merge."""

from __future__ import annotations

import json

import pytest
import torch
from helpers_svf import IDS, logits, randomise, set_form, weights
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from sigmix.svf.config import SVFConfig
from sigmix.svf.tuner import svf_layers

ARCHES = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2", "mixtral"]
architectures = pytest.mark.parametrize("arch", ARCHES)


def adapt(model, spread: float = 0.3, seed: int = 1, **config):
    model = get_peft_model(model, SVFConfig(**config)).eval()
    randomise(model, seed=seed, spread=spread)
    return model


def add(model, name: str, seed: int, **config) -> None:
    model.add_adapter(name, SVFConfig(**config))
    randomise(model, name, seed)


def zs(model, adapter: str = "default") -> dict[str, torch.Tensor]:
    return {p: m.svf_z[adapter].weight.detach().clone() for p, m in svf_layers(model).items() if adapter in m.svf_z}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@architectures
def test_save_and_load(arch, tiny, tmp_path):
    model = adapt(tiny(arch))
    expected = logits(model, IDS)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    assert {n.removeprefix("base_model.model.").removesuffix(".svf_z.weight") for n in saved} == set(svf_layers(model))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SVF"

    loaded = PeftModel.from_pretrained(tiny(arch), tmp_path)
    assert same(zs(loaded), zs(model))
    assert torch.equal(logits(loaded, IDS), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.peft_config["default"].inference_mode


def test_the_config_survives(tiny, tmp_path):
    config = {"target_modules": "mlp", "layers_to_transform": "half", "exclude": ["up_proj"], "cache": False}
    model = adapt(tiny(num_hidden_layers=4), **config)
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, SVFConfig)
    assert config.layers_to_transform == [0, 2]
    assert config.cache is False
    loaded = PeftModel.from_pretrained(tiny(num_hidden_layers=4), tmp_path)
    assert set(svf_layers(loaded)) == {f"model.layers.{i}.mlp.{n}_proj" for i in (0, 2) for n in ("gate", "down")}
    assert same(zs(loaded), zs(model))


def test_loading_to_go_on_training(tiny_llama, tiny, tmp_path):
    adapt(tiny_llama).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, _ in loaded.named_parameters() if n.endswith(".svf_z.default.weight")
    }


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_auto_class_with_the_base_on_disk(arch, tiny, tmp_path):
    tiny(arch).save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    model = adapt(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    expected = logits(model, IDS)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, IDS), expected)


@pytest.mark.parametrize("low", [False, True], ids=["plain", "low_cpu_mem_usage"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_second_adapter_loads_beside_the_first(low, arch, tiny, tmp_path):
    other = adapt(tiny(arch), seed=2)
    other.save_pretrained(tmp_path)
    model = adapt(tiny(arch), seed=1)
    first = logits(model, IDS)
    model.load_adapter(tmp_path, "second", low_cpu_mem_usage=low)
    assert torch.equal(logits(model, IDS), first), "the first stays active, to the bit"
    model.set_adapter("second")
    assert torch.equal(logits(model, IDS), logits(other, IDS))
    model.set_adapter("default")
    assert torch.equal(logits(model, IDS), first)
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("arch", ["llama", "gpt2", "phi3"])
def test_low_cpu_mem_usage_gives_the_same_model(arch, tiny, tmp_path):
    adapt(tiny(arch)).save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(tiny(arch), tmp_path)
    low = PeftModel.from_pretrained(tiny(arch), tmp_path, low_cpu_mem_usage=True)
    assert not any(t.is_meta for t in [*low.parameters(), *low.buffers()])
    for form in ("factored", "gain"):
        set_form(plain, form)
        set_form(low, form)
        assert torch.equal(logits(low, IDS), logits(plain, IDS))


@pytest.mark.parametrize("form", ["factored", "gain"])
@pytest.mark.parametrize("targets", ["all-linear", "mlp"])
def test_an_adapter_added_later_changes_no_bit_of_another(form, targets, tiny):
    model = adapt(tiny(), target_modules="attention")
    set_form(model, form)
    before, z = logits(model, IDS), zs(model)
    add(model, "later", 5, target_modules=targets)  # reaches modules that the first one does not
    set_form(model, form)
    assert torch.equal(logits(model, IDS), before)
    model.set_adapter("later")
    assert not torch.equal(logits(model, IDS), before)
    model.set_adapter("default")
    model.delete_adapter("later")
    assert torch.equal(logits(model, IDS), before)
    assert same(zs(model), z)


@architectures
def test_disable_switch_and_delete(arch, tiny):
    base = logits(tiny(arch), IDS)
    model = adapt(tiny(arch))
    first = logits(model, IDS)
    assert not torch.allclose(first, base, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), base)
    assert torch.equal(logits(model, IDS), first)
    add(model, "second", 2)
    model.set_adapter("second")
    second = logits(model, IDS)
    assert not torch.allclose(second, first, atol=1e-2)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.endswith(".svf_z.second.weight")
    }
    model.delete_adapter("default")
    assert torch.equal(logits(model, IDS), second)
    assert not any("default" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="default"):
        model.set_adapter("default")


def test_disabling_a_merged_adapter_gives_the_base(tiny):
    base = logits(tiny(), IDS)
    model = adapt(tiny())
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), base)


def test_many_model_wide_merges_leave_the_base_as_it_was(tiny):
    model = adapt(tiny().to(torch.bfloat16))
    add(model, "second", 2)
    before, expected = weights(model), logits(model, IDS)
    for turn in range(20):
        model.merge_adapter([("default", "second")[turn % 2]])
        assert not same(weights(model), before)
        model.unmerge_adapter()
    assert same(weights(model), before)
    assert torch.equal(logits(model, IDS), expected)


@architectures
def test_merge_and_unload_gives_a_plain_model(arch, tiny, tmp_path):
    plain = tiny(arch)
    keys = set(plain.state_dict())
    model = adapt(plain, spread=0.1)
    expected = logits(model, IDS)
    merged = model.merge_and_unload(safe_merge=True)
    assert not svf_layers(merged)
    assert set(merged.state_dict()) == keys
    assert torch.allclose(logits(merged, IDS), expected, atol=2e-4, rtol=1e-3)  # float32, errors grow over layers
    merged.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, IDS), logits(merged, IDS))


def test_unload_gives_the_base_back(tiny):
    base = tiny()
    expected, state = logits(base, IDS), {n: t.clone() for n, t in base.state_dict().items()}
    model = adapt(base)
    model.merge_adapter()
    model.unmerge_adapter()
    plain = model.unload()
    assert same(plain.state_dict(), state)
    assert torch.equal(logits(plain, IDS), expected)


@pytest.mark.parametrize("form", ["factored", "gain"])
@architectures
def test_a_mixed_batch_equals_each_row_alone(form, arch, tiny):
    model = adapt(tiny(arch), spread=0.1)
    add(model, "second", 2)
    set_form(model, form)
    names = ["second", "__base__", "default"]
    mixed = logits(model, IDS, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = logits(model, IDS)[row]
        else:
            model.set_adapter(name)
            alone = logits(model, IDS)[row]
        # float32; the products with z of one row and of a batch may be summed in another order
        assert torch.allclose(mixed[row], alone, atol=2e-4, rtol=1e-3), name
        if name == "__base__" and form != "factored":
            assert torch.equal(mixed[row], alone)
    assert not torch.allclose(mixed[0], logits(model, IDS)[0], atol=1e-2), "the names must matter"
    assert not any(layer._forward_pre_hooks for layer in svf_layers(model).values()), "no hook is left behind"


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_mixed_batch_generates_what_each_row_does_alone(beams, arch, tiny):
    model = adapt(tiny(arch))
    add(model, "second", 2)
    names = ["second", "__base__", "default"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
    mask = torch.ones_like(IDS)
    mixed = model.generate(input_ids=IDS, attention_mask=mask, adapter_names=names, **options)
    alone = []
    for row, name in enumerate(names):
        one = {"input_ids": IDS[row : row + 1], "attention_mask": mask[row : row + 1]}
        if name == "__base__":
            with model.disable_adapter():
                alone.append(model.generate(**one, **options))
        else:
            model.set_adapter(name)
            alone.append(model.generate(**one, **options))
    assert torch.equal(mixed, torch.cat(alone))
    assert len({tuple(row[6:].tolist()) for row in mixed}) == 3, "three different continuations"


def test_mixed_batches_that_cannot_work(tiny):
    model = adapt(tiny())
    with pytest.raises(ValueError, match="nobody"):
        logits(model, IDS, adapter_names=["default", "nobody", "default"])
    with pytest.raises(Exception, match="2 entries for a batch of 3"):
        logits(model, IDS, adapter_names=["default", "default"])
    model.merge_adapter()
    with pytest.raises(Exception, match="merged"):
        logits(model, IDS, adapter_names=["default"] * 3)
    model.unmerge_adapter()
    model.train()
    with pytest.raises(ValueError, match="training"):
        logits(model, IDS, adapter_names=["default"] * 3)
