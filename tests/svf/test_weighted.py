"""`add_weighted_adapter`, names of parameters, and training through the plain PEFT model."""

from __future__ import annotations

import pytest
import torch
from helpers_svf import IDS, logits, randomise, weights
from peft import PeftModel, get_peft_model

from sigmix.svf.config import SVFConfig
from sigmix.svf.functional import mix_z
from sigmix.svf.tuner import svf_layers


@pytest.fixture
def pair(tiny):
    """A model with the adapters "default" (attention, active) and "second" (all linear layers)."""
    model = get_peft_model(tiny(), SVFConfig(target_modules="attention")).eval()
    randomise(model, seed=1)
    model.add_adapter("second", SVFConfig())
    randomise(model, "second", 2)
    return model


@pytest.mark.parametrize("weights_", [[0.7, 0.3], [1.0, 1.0], [-0.5, 0.0], [0.0, 1.0], [0.0, 0.0]])
def test_a_weighted_adapter_is_the_mixture_of_z(pair, weights_):
    before = logits(pair, IDS)
    pair.add_weighted_adapter(["default", "second"], weights_, "both")
    assert torch.equal(logits(pair, IDS), before), "the active adapter stays what it was"
    for layer in svf_layers(pair).values():
        first = layer.svf_z["default"].weight.detach() if "default" in layer.svf_z else torch.ones(layer.r)
        parts = [first, layer.svf_z["second"].weight.detach()]
        assert torch.equal(layer.svf_z["both"].weight, mix_z(parts, weights_))
        assert not layer.svf_z["both"].weight.requires_grad
    pair.set_adapter("both")
    both = logits(pair, IDS)
    pair.set_adapter("second")
    second = logits(pair, IDS)
    assert torch.equal(both, second) is (weights_ == [0.0, 1.0])


def test_a_weighted_adapter_is_saved_and_loaded_whole(pair, tiny, tmp_path):
    pair.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")
    pair.set_adapter("both")
    expected = logits(pair, IDS)
    pair.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "both")
    assert torch.equal(logits(loaded, IDS), expected)


def test_a_weighted_adapter_has_a_config_of_its_own(pair):
    pair.add_weighted_adapter(["default"], [0.5], "less")
    assert pair.peft_config["less"] is not pair.peft_config["default"]
    assert {p for p, m in svf_layers(pair).items() if "less" in m.svf_z} == {
        p for p, m in svf_layers(pair).items() if "default" in m.svf_z
    }
    pair.delete_adapter("default")
    pair.set_adapter("less")
    assert logits(pair, IDS).isfinite().all()


@pytest.mark.parametrize(
    "names, alphas, new",
    [
        (["default", "nobody"], [1.0, 1.0], "x"),
        (["default", "second"], [1.0], "x"),
        ([], [], "x"),
        (["default"], [1.0], "second"),
        (["default"], [float("nan")], "x"),
    ],
)
def test_weighted_adapters_that_cannot_be(pair, names, alphas, new):
    adapters, second = set(pair.peft_config), logits(pair, IDS)
    with pytest.raises(ValueError):
        pair.add_weighted_adapter(names, alphas, new)
    assert set(pair.peft_config) == adapters
    assert not any("x" in layer.svf_z for layer in svf_layers(pair).values())
    assert torch.equal(logits(pair, IDS), second)


def test_names_hold_the_adapter_between_dots(pair):
    """TRL copies a reference adapter by replacing ".default." in names of parameters."""
    names = [name for name, _ in pair.named_parameters() if ".svf_z." in name]
    assert {name.split(".svf_z.")[1] for name in names} == {"default.weight", "second.weight"}
    for name in names:
        assert ".default." in name or ".second." in name
        assert name.replace(".default.", ".second.") in dict(pair.named_parameters())


ARCHES = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2", "mixtral"]


# GPT-2 alone drops out by default, and random losses prove nothing
STILL = {"gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}}


def train(model, steps: int = 6) -> list[float]:
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("arch", ARCHES)
def test_a_few_steps_reduce_the_loss_and_leave_the_base_alone(arch, tiny):
    model = get_peft_model(tiny(arch, **STILL.get(arch, {})), SVFConfig())
    before = weights(model)
    losses = train(model)
    assert losses[-1] < 0.95 * losses[0]
    after = weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(not torch.equal(m.svf_z["default"].weight, torch.ones(m.r)) for m in svf_layers(model).values())
    with torch.no_grad(), model.disable_adapter():
        base = model.eval()(input_ids=IDS).logits
    assert torch.equal(base, logits(tiny(arch), IDS))


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(arch, reentrant, tiny):
    plain = get_peft_model(tiny(arch, **STILL.get(arch, {})), SVFConfig())
    saving = get_peft_model(tiny(arch, **STILL.get(arch, {})), SVFConfig())
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    saving.enable_input_require_grads()
    assert saving.is_gradient_checkpointing
    assert train(saving, 3) == pytest.approx(train(plain, 3), rel=1e-6)
    for one, other in zip(svf_layers(plain).values(), svf_layers(saving).values(), strict=True):
        assert torch.allclose(one.svf_z["default"].weight, other.svf_z["default"].weight, atol=1e-6)


def test_training_one_adapter_changes_no_bit_of_another(pair):
    before = logits(pair, IDS)
    pair.set_adapter("second")
    losses = train(pair)
    assert losses[-1] < losses[0]
    pair.set_adapter("default")
    assert torch.equal(logits(pair.eval(), IDS), before)


def test_training_a_bfloat16_base_moves_float32_z(tiny):
    model = get_peft_model(tiny().to(torch.bfloat16), SVFConfig())
    losses = train(model, 8)
    assert losses[-1] < 0.95 * losses[0]
    assert {p.dtype for n, p in model.named_parameters() if p.requires_grad} == {torch.float32}
