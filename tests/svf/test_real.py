"""SmolLM2-135M in bfloat16: the counts, the exact base, and the forms among each other."""

from __future__ import annotations

import pytest
import torch
from helpers_svf import randomise, set_form
from peft import get_peft_model

from sigmix.models.loading import load_base
from sigmix.svf.config import SVFConfig
from sigmix.svf.tuner import base_path, svf_layers

pytestmark = pytest.mark.real

TEXTS = [
    "The capital of France is",
    "Q: What is 17 + 25?\nA:",
    "def add(a, b):\n    return",
    "Water boils at a temperature of one hundred",
]


@pytest.fixture(scope="module")
def base():
    """A copy of its own, as adapters are injected into it: (model, batch, the base's logits)."""
    model, tokenizer = load_base("smollm2-135m", dtype="bfloat16", device="cpu")
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**batch).logits
    return model, batch, logits


@pytest.fixture(scope="module")
def adapted(base):
    return get_peft_model(base[0], SVFConfig(inference_mode=True)).eval()


@pytest.fixture
def run(adapted, base):
    """Call for the logits of the batch; afterwards z is 1 and nothing is merged, whatever the test did."""

    @torch.no_grad()
    def logits(form: str) -> torch.Tensor:
        if form == "merged":
            adapted.merge_adapter()
            try:
                return adapted(**base[1]).logits
            finally:
                adapted.unmerge_adapter()
        set_form(adapted, form)
        return adapted(**base[1]).logits

    yield logits
    adapted.unmerge_adapter()
    set_form(adapted, "factored")
    for layer in svf_layers(adapted).values():
        layer.svf_z["default"].weight.data.fill_(1)


def divergence(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL of the next token, per text, in nats."""
    p, q = (t[:, -1].double().log_softmax(-1) for t in (one, other))
    return (p.exp() * (p - q)).sum(-1)


def test_the_count_of_the_paper_s_parameters(adapted):
    layers = svf_layers(adapted)
    assert len(layers) == 30 * 7
    inside = {id(layer.get_base_layer().weight) for layer in layers.values()}
    others = [name for name, p in adapted.named_parameters() if p.ndim > 1 and id(p) not in inside]
    assert [base_path(name) for name in others] == ["model.embed_tokens.weight"]
    assert sum(p.numel() for n, p in adapted.named_parameters() if ".svf_z." in n) == 97_920


def test_the_base_bit_for_bit(base, run):
    for form in ("gain", "merged"):
        assert torch.equal(run(form), base[2]), form
    # the factored form multiplies by the rounded short side twice; a bfloat16 logit of 16 has a step of 0.125.
    # Measured: up to 0.003
    assert divergence(base[2], run("factored")).max() < 0.02


def test_the_forms_agree_at_small_gains(base, adapted, run):
    randomise(adapted, spread=0.05)
    outputs = {form: run(form) for form in ("merged", "factored", "gain")}
    for form, output in outputs.items():
        away = divergence(base[2], output)
        # 30 layers in bfloat16 differ by some 1e-3 nats between any two orders of summation; measured: up to 0.006
        near = divergence(outputs["merged"], output)
        assert near.max() < 0.02, form
        assert near.max() < 0.2 * away.max(), f"{form}: the forms are nearer to each other than to the base"


def test_merges_leave_the_weights_as_they_were(base, adapted, run):
    weights = {n: p.detach().clone() for n, p in adapted.named_parameters() if ".svf_z." not in n}
    for seed in (1, 2, 3):
        randomise(adapted, seed=seed, spread=0.2)
        assert not torch.equal(run("merged"), base[2])
    after = {n: p for n, p in adapted.named_parameters() if ".svf_z." not in n}
    assert weights.keys() == after.keys()
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    with adapted.disable_adapter():
        set_form(adapted, "factored")
        with torch.no_grad():
            assert torch.equal(adapted(**base[1]).logits, base[2])
