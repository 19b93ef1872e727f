"""Merged weights are kept by mix within a budget, and one bad prompt does not stop the others."""

from __future__ import annotations

import pytest
import torch
from helpers_engine import expert, rows

from sigmix.engine import Engine
from sigmix.errors import ContextError
from sigmix.experts.mix import Mix
from sigmix.svf.layer import SVFLinear

pytestmark = pytest.mark.usefixtures("cache")
PROMPTS = rows([9, 12])


@pytest.fixture
def composed(monkeypatch):
    """How many matrices have been composed."""
    count = [0]
    plain = SVFLinear.merged_weight

    def counting(self, z):
        count[0] += 1
        return plain(self, z)

    monkeypatch.setattr(SVFLinear, "merged_weight", counting)
    return count


def engine_of(tiny, tokenizer, arch="llama", **options):
    bank = {name: expert(tiny(arch), name, seed) for seed, name in enumerate(("a", "b", "c"))}
    return Engine(tiny(arch), tokenizer, bank, **options)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_mix_that_comes_back_is_not_composed_again(tiny, tiny_tokenizer, composed, arch):
    engine = engine_of(tiny, tiny_tokenizer, arch)
    before = {name: (p.data_ptr(), p.clone()) for name, p in engine.model.named_parameters()}
    first = engine.generate(PROMPTS, "a", max_new_tokens=4)
    once = composed[0]
    assert once == len(engine.layers)
    base = engine.generate(PROMPTS, max_new_tokens=4)
    assert engine.generate(PROMPTS, "a", max_new_tokens=4) == first
    assert engine.generate(PROMPTS, "a:0.5", max_new_tokens=4) != first
    assert composed[0] == 2 * once
    assert base == engine.generate(PROMPTS, max_new_tokens=4)
    for name, parameter in engine.model.named_parameters():  # the very tensors, bit for bit
        assert parameter.data_ptr() == before[name][0]
        assert (parameter == before[name][1]).all()


def test_the_budget_holds_and_the_oldest_goes_first(tiny, tiny_tokenizer, composed):
    engine = engine_of(tiny, tiny_tokenizer)
    engine.generate(PROMPTS, "a", max_new_tokens=1)
    size, once = engine.merged.bytes, composed[0]
    assert size == sum(layer.matrix().nbytes for layer in engine.layers.values())
    engine.merged.budget = 2 * size
    for mix in ("b", "a", "c"):  # c drives out b
        engine.generate(PROMPTS, mix, max_new_tokens=1)
        assert engine.merged.bytes <= 2 * size
    assert composed[0] == 3 * once
    engine.generate(PROMPTS, "a", max_new_tokens=1)
    assert composed[0] == 3 * once
    engine.generate(PROMPTS, "b", max_new_tokens=1)
    assert composed[0] == 4 * once
    engine.merged.clear()
    assert (len(engine.merged), engine.merged.bytes) == (0, 0)


def test_a_budget_of_nothing_keeps_nothing(tiny, tiny_tokenizer):
    engine = engine_of(tiny, tiny_tokenizer, keep_merged=0)
    plain = engine_of(tiny, tiny_tokenizer)
    assert engine.generate(PROMPTS, "a", max_new_tokens=4) == plain.generate(PROMPTS, "a", max_new_tokens=4)
    assert len(engine.merged) == 0


def test_another_expert_of_the_same_name_is_not_the_old_one(tiny, tiny_tokenizer):
    engine = engine_of(tiny, tiny_tokenizer)
    engine.generate(PROMPTS, "a", max_new_tokens=4)
    engine.bank["a"] = expert(tiny("llama"), "a", 9)
    fresh = Engine(tiny("llama"), tiny_tokenizer, engine.bank)
    assert engine.generate(PROMPTS, "a", max_new_tokens=4) == fresh.generate(PROMPTS, "a", max_new_tokens=4)


def test_a_model_that_was_cast_gets_weights_of_its_own(tiny, tiny_tokenizer):
    engine = engine_of(tiny, tiny_tokenizer)
    engine.generate(PROMPTS, "a", max_new_tokens=4)
    engine.model.to(torch.float64)
    weights = {path: layer.merged_weight(engine.bank["a"].z[path]) for path, layer in engine.layers.items()}
    with engine.under([Mix.one("a")]):
        for path, layer in engine.layers.items():
            assert (layer.get_base_layer().weight == weights[path]).all()


def test_one_prompt_over_the_context_gets_an_error_and_the_others_answers(tiny, tiny_tokenizer):
    engine = Engine(tiny("llama", max_position_embeddings=32), tiny_tokenizer)
    prompts = [PROMPTS[0], [5] * 40, [], PROMPTS[1]]
    answers = engine.generate(prompts, max_new_tokens=4, keep_errors=True, batch_size=1)
    assert [one.finish == "error" for one in answers] == [False, True, True, False]
    assert "prompt 1 has 40 tokens" in str(answers[1].error)
    assert "prompt 2 is empty" in str(answers[2].error)
    alone = engine.generate([PROMPTS[0], PROMPTS[1]], max_new_tokens=4, batch_size=1)
    assert [answers[0], answers[3]] == alone
    with pytest.raises(ContextError, match="prompt 1"):
        engine.generate(prompts, max_new_tokens=4)
