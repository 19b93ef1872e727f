"""Packed weights compute the same numbers, are made once, and leave no trace."""

from __future__ import annotations

import pytest
import torch
from helpers_engine import expert, rows

from sigmix.engine import Engine
from sigmix.engine import cpu_kernels as packing
from sigmix.experts.mix import Mix

pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.skipif(not packing.available(), reason="this torch cannot pack bfloat16 weights on this CPU"),
]
PROMPTS = rows([9, 12, 10])
MIXES = [None, "a", ["a", "base", "b:0.5"]]


def engine_of(tiny, tokenizer, arch="llama", dtype=torch.bfloat16, **options):
    bank = {name: expert(tiny(arch).to(dtype), name, seed) for seed, name in enumerate("ab")}
    return Engine(tiny(arch).to(dtype), tokenizer, bank, **options)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("form", [None, "gain"])
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_packed_and_plain_give_the_same_tokens_and_logits(tiny, tiny_tokenizer, arch, mix, form):
    if form and not isinstance(mix, list):
        mix = [mix] * 3
    fast, plain = engine_of(tiny, tiny_tokenizer, arch), engine_of(tiny, tiny_tokenizer, arch, keep_packed=0)
    assert fast.execution.packing.on
    assert not plain.execution.packing.on
    for _ in range(2):
        ours = fast.generate(PROMPTS, mix, max_new_tokens=5, form=form)
        assert ours == plain.generate(PROMPTS, mix, max_new_tokens=5, form=form)
    ids = torch.tensor([row[:9] for row in PROMPTS])
    assert (fast.logits(ids, mix=mix, form=form) == plain.logits(ids, mix=mix, form=form)).all()


def test_packs_are_made_once_and_anew_when_a_weight_changes(tiny, tiny_tokenizer, monkeypatch):
    count = [0]
    plain = packing.pack

    def counting(weight):
        count[0] += 1
        return plain(weight)

    monkeypatch.setattr(packing, "pack", counting)
    engine = engine_of(tiny, tiny_tokenizer)
    for mix, form in ((None, None), ("a", "merged"), (["a", "b", None], None)) * 2:
        engine.generate(PROMPTS, mix, max_new_tokens=2, form=form)
    packs = engine.execution.packing
    inputs = len(packs.groups)  # base, merged, and the first factors: one for all layers with one input
    assert inputs < len(engine.layers)
    made = len(packs.others) + 3 * inputs + len(engine.layers)
    assert count[0] == made
    layer = next(iter(engine.layers.values())).get_base_layer()
    with torch.no_grad():
        layer.weight.mul_(2)
    engine.generate(PROMPTS, max_new_tokens=2)
    assert count[0] == made + 1


def test_nothing_is_left_in_the_model(tiny, tiny_tokenizer):
    engine = engine_of(tiny, tiny_tokenizer)
    before = {name: p.clone() for name, p in engine.model.named_parameters()}
    for mix in MIXES:
        engine.generate(PROMPTS, mix, max_new_tokens=2)
    with pytest.raises(RuntimeError, match="inside"), engine.under([Mix.one("a")]):
        raise RuntimeError("inside")
    for module in engine.model.modules():
        assert "forward" not in vars(module)
        assert "_factored" not in vars(module)
    assert all((p == before[name]).all() for name, p in engine.model.named_parameters())


def test_gradients_flow_past_the_packs(tiny, tiny_tokenizer):
    engine = engine_of(tiny, tiny_tokenizer)
    embeddings = engine.model.get_input_embeddings()(torch.tensor([[5, 6, 7]])).detach().requires_grad_()
    with engine.under([Mix.base()]):
        engine.model(inputs_embeds=embeddings).logits.float().sum().backward()
    assert embeddings.grad.abs().sum() > 0


def test_no_packs_in_float32_or_over_the_budget(tiny, tiny_tokenizer):
    assert not engine_of(tiny, tiny_tokenizer, dtype=torch.float32).execution.packing.on
    assert not engine_of(tiny, tiny_tokenizer, keep_packed=1000).execution.packing.on
