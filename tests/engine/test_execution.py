"""`Engine` under mixes: forms agree with dense weights, rows keep to themselves, the base is never touched."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers_engine import TOLERANCE, alone, dense, expert, greedy, rows

from sigmix.engine import Engine
from sigmix.errors import ConfigError
from sigmix.experts.expert import Expert
from sigmix.experts.fingerprint import fingerprint
from sigmix.experts.mix import Mix
from sigmix.svf.layer import SVFLinear
from sigmix.svf.tuner import svf_layers

pytestmark = pytest.mark.usefixtures("cache")
PROMPTS = rows([14, 22, 11, 17], shared=9)
MIXES = ["math:0.7+code:0.3", None, "math", "code:-0.4"]
FORMS = ["factored", "gain"]


@pytest.fixture(params=["llama", "gpt2", "qwen2", "qwen3", "gemma3", "mistral", "phi3"])
def setup(request, tiny, tiny_tokenizer):
    """An engine, the experts behind it, and a factory of fresh copies of its base."""
    bank = {name: expert(tiny(request.param), name, seed) for name, seed in (("math", 1), ("code", 2))}
    model = tiny(request.param)
    return SimpleNamespace(
        engine=Engine(model, tiny_tokenizer, bank), model=model, bank=bank, fresh=lambda: tiny(request.param)
    )


def under(setup, mix):
    """A dense model under a mix, by the algebra of the paper."""
    weights = {} if mix is None else Mix.parse(mix).weights
    z = {path: torch.ones_like(factors) for path, factors in setup.bank["math"].z.items()}
    for name, alpha in weights.items():
        for path, factors in setup.bank[name].z.items():
            z[path] = z[path] + alpha * (factors.double() - 1)
    return dense(setup.fresh(), z) if weights else setup.fresh()


def padded(side: str):
    width = max(map(len, PROMPTS))
    ids, mask = torch.zeros(len(PROMPTS), width, dtype=torch.long), torch.zeros(len(PROMPTS), width, dtype=torch.long)
    for i, row in enumerate(PROMPTS):
        part = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, part], mask[i, part] = torch.tensor(row), 1
    return ids, mask


# ------------------------------------------------------------------ logits


def test_base_is_bit_for_bit(setup):
    ids = torch.tensor(rows([16, 16]))
    with torch.no_grad():
        plain = setup.fresh()(ids, use_cache=False).logits
    for mix in (None, Mix.base(), "math:0", [None, "code:0"]):
        assert torch.equal(setup.engine.logits(ids, mix=mix), plain)
    for form in ("merged", "gain"):
        assert torch.equal(setup.engine.logits(ids, mix=None, form=form), plain)
    mixed = setup.engine.logits(ids, mix=["math", None], form="gain")
    assert torch.equal(mixed[1], plain[1])
    assert not torch.equal(mixed[0], plain[0])


@pytest.mark.parametrize("form", ["merged", *FORMS])
@pytest.mark.parametrize("mix", ["math", "math:0.7+code:0.3", "math:2+code:-0.5"])
def test_forms_agree_with_dense_weights(setup, form, mix):
    ids = torch.tensor(rows([16, 16]))
    with torch.no_grad():
        slow = under(setup, mix)(ids, use_cache=False).logits
    torch.testing.assert_close(setup.engine.logits(ids, mix=mix, form=form), slow, **TOLERANCE)
    assert float((slow - setup.engine.logits(ids)).abs().max()) > 0.1  # the mix does something


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", [None, *FORMS])
def test_a_mix_per_row_of_a_ragged_batch(setup, side, form):
    ids, mask = padded(side)
    got = setup.engine.logits(ids, mask, mix=MIXES, form=form)
    for i, (row, mix) in enumerate(zip(PROMPTS, MIXES, strict=True)):
        with torch.no_grad():
            slow = alone(under(setup, mix), row)
        torch.testing.assert_close(got[i][mask[i].bool()], slow, **TOLERANCE)


def test_one_hot_is_the_trained_expert(setup):
    z = setup.engine.z(Mix.one("math"))
    assert z.keys() == setup.bank["math"].z.keys()
    assert all(torch.equal(z[path], setup.bank["math"].z[path]) for path in z)
    assert setup.engine.z(Mix.base()) == {}


# ------------------------------------------------------------------ generation


def tokens(generations):
    return [g.ids for g in generations]


def near(ours, theirs):
    return ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)  # float32, batched against alone


@pytest.mark.parametrize("form", [None, *FORMS])
def test_mixed_generation_equals_each_row_alone(setup, form):
    together = setup.engine.generate(PROMPTS, MIXES, max_new_tokens=10, form=form)
    for prompt, mix, answer in zip(PROMPTS, MIXES, together, strict=True):
        ids, logprobs = greedy(under(setup, mix), prompt, 10, ends=[2])
        assert answer.ids == ids
        assert near(answer.logprobs, logprobs)
        assert answer.mix == (Mix.base() if mix is None else Mix.parse(mix))
        assert answer.prompt_tokens == len(prompt)
        assert answer.finish == ("stop" if ids[-1] == 2 else "length")


def test_mixed_rows_keep_their_mix_when_others_leave(setup):
    # different texts of one batch end at different steps; every remaining row must go on with its own z
    free = setup.engine.generate(PROMPTS, MIXES, max_new_tokens=10)
    setup.engine.eos_token_ids = [free[0].ids[1], free[2].ids[4]]
    bounded = setup.engine.generate(PROMPTS, MIXES, max_new_tokens=10)
    assert len({len(answer.ids) for answer in bounded}) > 1
    for prompt, mix, answer in zip(PROMPTS, MIXES, bounded, strict=True):
        assert answer.ids == greedy(under(setup, mix), prompt, 10, setup.engine.eos_token_ids)[0]


@pytest.mark.parametrize("form", ["merged", *FORMS])
def test_one_mix_for_all_in_every_form(setup, form):
    answers = setup.engine.generate(PROMPTS, "math:0.7+code:0.3", max_new_tokens=8, form=form)
    model = under(setup, "math:0.7+code:0.3")
    assert tokens(answers) == [greedy(model, prompt, 8, ends=[2])[0] for prompt in PROMPTS]


def test_batches_do_not_matter(setup):
    whole = setup.engine.generate(PROMPTS, MIXES, max_new_tokens=8, do_sample=True, seeds=[5, 6, 7, 8])
    for size in (1, 3):
        parts = setup.engine.generate(
            PROMPTS, MIXES, max_new_tokens=8, do_sample=True, seeds=[5, 6, 7, 8], batch_size=size
        )
        assert tokens(parts) == tokens(whole)
    single = setup.engine.generate(PROMPTS[2:3], MIXES[2], max_new_tokens=8, do_sample=True, seeds=[7])
    assert tokens(single) == tokens(whole[2:3])


def test_default_seeds_are_the_rows_numbers(setup):
    given = setup.engine.generate(PROMPTS, do_sample=True, max_new_tokens=6, seeds=[0, 1, 2, 3])
    assert tokens(setup.engine.generate(PROMPTS, do_sample=True, max_new_tokens=6)) == tokens(given)
    assert tokens(setup.engine.generate(PROMPTS, do_sample=True, max_new_tokens=6, batch_size=2)) == tokens(given)


# ------------------------------------------------------------------ the base stays


def test_base_weights_are_bit_for_bit_what_they_were(setup):
    before = fingerprint(setup.model, fresh=True)
    storages = {path: layer.get_base_layer().weight.data_ptr() for path, layer in svf_layers(setup.model).items()}
    assert before == fingerprint(setup.fresh(), fresh=True)
    for mix in ("math", "math:3", MIXES, "code:-1+math:0.5", None, MIXES[::-1], "code"):
        for form in (None, "gain"):
            setup.engine.generate(PROMPTS, mix, max_new_tokens=4, form=form)
        next(setup.engine.stream(PROMPTS[0], "math", max_new_tokens=64), None)  # abandoned half-way
    with pytest.raises(IndexError), setup.engine.under([Mix.one("math")]):  # an error in the middle of a merged batch
        setup.model(torch.tensor([[1, 10_000]]))
    assert fingerprint(setup.model, fresh=True) == before
    now = {path: layer.get_base_layer().weight.data_ptr() for path, layer in svf_layers(setup.model).items()}
    assert now == storages
    ids = torch.tensor(rows([12]))
    with torch.no_grad():
        assert torch.equal(setup.engine.logits(ids), setup.fresh()(ids, use_cache=False).logits)


def test_an_expert_that_adapts_fewer_matrices(tiny, tiny_tokenizer):
    model = tiny("llama")
    part = expert(tiny("llama"), "part", 3, targets="mlp")
    engine = Engine(model, tiny_tokenizer, {"part": part})
    ids = torch.tensor(rows([12]))
    with torch.no_grad():
        slow = dense(tiny("llama"), part.z)(ids, use_cache=False).logits
    for form in ("merged", *FORMS):
        torch.testing.assert_close(engine.logits(ids, mix="part", form=form), slow, **TOLERANCE)


def test_two_engines_on_one_model(setup, tiny_tokenizer):
    other = Engine(setup.model, tiny_tokenizer, {"math": setup.bank["code"]})
    ids = torch.tensor(rows([12]))
    mine = setup.engine.logits(ids, mix="math")
    assert torch.equal(other.logits(ids, mix="math"), setup.engine.logits(ids, mix="code"))
    assert torch.equal(setup.engine.logits(ids, mix="math"), mine)


def test_mixes_with_many_rows_are_answered_apart_and_keep_their_places(setup, monkeypatch):
    prompts = [PROMPTS[i % 4] for i in range(10)]
    mixes = ["math" if i % 2 else None for i in range(10)]
    together = setup.engine.generate(prompts, mixes, max_new_tokens=6)
    execution, sizes = setup.engine.execution, []
    plain = execution.under
    monkeypatch.setattr(
        execution, "under", lambda mixes, *options: sizes.append(len(set(mixes))) or plain(mixes, *options)
    )
    monkeypatch.setattr("sigmix.engine.execution.ROWS_PER_MIX", 5)
    apart = setup.engine.generate(prompts, mixes, max_new_tokens=6)
    assert set(sizes) == {1}
    assert tokens(apart) == tokens(together)
    assert [one.mix for one in apart] == [one.mix for one in together]
    for a, b in zip(apart, together, strict=True):
        assert near(a.logprobs, b.logprobs)
    sizes.clear()
    setup.engine.generate(prompts, mixes, max_new_tokens=6, form="factored")
    assert max(sizes) == 2  # they decode together

# ------------------------------------------------------------------ merged weights


@pytest.fixture
def composed(monkeypatch):
    """Number of composed matrices."""
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
    first = engine.generate(PROMPTS[:2], "a", max_new_tokens=4, form="merged")
    once = composed[0]
    assert once == len(engine.layers)
    base = engine.generate(PROMPTS[:2], max_new_tokens=4)
    assert engine.generate(PROMPTS[:2], "a", max_new_tokens=4, form="merged") == first
    assert engine.generate(PROMPTS[:2], "a:0.5", max_new_tokens=4, form="merged") != first
    assert composed[0] == 2 * once
    assert base == engine.generate(PROMPTS[:2], max_new_tokens=4)
    for name, parameter in engine.model.named_parameters():  # the very tensors, bit for bit
        assert parameter.data_ptr() == before[name][0]
        assert (parameter == before[name][1]).all()


def test_the_budget_holds_and_the_oldest_goes_first(tiny, tiny_tokenizer, composed):
    engine = engine_of(tiny, tiny_tokenizer)
    engine.generate(PROMPTS[:2], "a", max_new_tokens=1, form="merged")
    size, once = engine.execution.merged.nbytes, composed[0]
    assert size == sum(layer.matrix().nbytes for layer in engine.layers.values())
    engine.execution.merged.max_bytes = 2 * size
    for mix in ("b", "a", "c"):  # c drives out b
        engine.generate(PROMPTS[:2], mix, max_new_tokens=1, form="merged")
        assert engine.execution.merged.nbytes <= 2 * size
    assert composed[0] == 3 * once
    engine.generate(PROMPTS[:2], "a", max_new_tokens=1, form="merged")
    assert composed[0] == 3 * once
    engine.generate(PROMPTS[:2], "b", max_new_tokens=1, form="merged")
    assert composed[0] == 4 * once
    engine.execution.merged.clear()
    assert (len(engine.execution.merged), engine.execution.merged.nbytes) == (0, 0)


def test_a_budget_of_nothing_keeps_nothing(tiny, tiny_tokenizer):
    engine = engine_of(tiny, tiny_tokenizer, keep_merged=0)
    plain = engine_of(tiny, tiny_tokenizer)
    options = {"max_new_tokens": 4, "form": "merged"}
    assert engine.generate(PROMPTS[:2], "a", **options) == plain.generate(PROMPTS[:2], "a", **options)
    assert len(engine.execution.merged) == 0


def test_another_expert_of_the_same_name_is_not_the_old_one(tiny, tiny_tokenizer):
    engine = engine_of(tiny, tiny_tokenizer)
    engine.generate(PROMPTS[:2], "a", max_new_tokens=4, form="merged")
    engine.bank["a"] = expert(tiny("llama"), "a", 9)
    fresh = Engine(tiny("llama"), tiny_tokenizer, engine.bank)
    options = {"max_new_tokens": 4, "form": "merged"}
    assert engine.generate(PROMPTS[:2], "a", **options) == fresh.generate(PROMPTS[:2], "a", **options)


def test_a_model_that_was_cast_gets_weights_of_its_own(tiny, tiny_tokenizer):
    engine = engine_of(tiny, tiny_tokenizer)
    engine.generate(PROMPTS[:2], "a", max_new_tokens=4, form="merged")
    engine.model.to(torch.float64)
    weights = {path: layer.merged_weight(engine.bank["a"].z[path]) for path, layer in engine.layers.items()}
    with engine.under([Mix.one("a")], "merged"):
        for path, layer in engine.layers.items():
            assert (layer.get_base_layer().weight == weights[path]).all()


# ------------------------------------------------------------------ the choice of a form


def test_a_short_answer_is_not_merged_and_repeated_use_is(tiny, tiny_tokenizer, composed):
    engine = engine_of(tiny, tiny_tokenizer)
    alone = engine_of(tiny, tiny_tokenizer)
    one = engine.generate(PROMPTS[:1], "a", max_new_tokens=4)
    assert composed[0] == 0
    assert one == alone.generate(PROMPTS[:1], "a", max_new_tokens=4, form="factored")
    for _ in range(10):
        again = engine.generate(PROMPTS[:1], "a", max_new_tokens=4)
        assert again[0].ids == one[0].ids
    assert composed[0] == len(engine.layers)
    assert engine.execution.choose([Mix.one("a")]) == "merged"
    assert engine.execution.choose([Mix.one("b")]) == "factored"
    assert engine.execution.choose([Mix.one("a"), Mix.one("b")]) == "factored"


def test_a_long_answer_is_merged_on_the_way(tiny, tiny_tokenizer, composed):
    engine = engine_of(tiny, tiny_tokenizer)
    engine.eos_token_ids = []
    (answer,) = engine.generate(PROMPTS[:1], "a", max_new_tokens=40)
    assert composed[0] == len(engine.layers)
    (whole,) = engine.generate(PROMPTS[:1], "a", max_new_tokens=40, form="factored")
    assert answer.ids == whole.ids
    assert near(answer.logprobs, whole.logprobs)


def test_many_prompt_tokens_are_merged_at_once_and_requested_forms_never(tiny, tiny_tokenizer, composed):
    engine = engine_of(tiny, tiny_tokenizer)
    prompts = rows([20] * 20)
    engine.generate(prompts, "a", max_new_tokens=1, form="factored")
    engine.generate(prompts, max_new_tokens=1)
    assert composed[0] == 0
    engine.generate(prompts, "a", max_new_tokens=1)
    assert composed[0] == len(engine.layers)


def test_an_expert_of_ones_is_the_base_bit_for_bit(tiny, tiny_tokenizer):
    engine = engine_of(tiny, tiny_tokenizer)
    ones = {path: torch.ones_like(z) for path, z in engine.bank["a"].z.items()}
    engine.bank["ones"] = Expert("ones", ones)
    ids = torch.tensor(rows([12]))
    assert torch.equal(engine.logits(ids, mix="ones"), engine.logits(ids))


@pytest.mark.parametrize(("mix", "form"), [("a", "dense"), (["a", "b"], "merged")])
def test_forms_that_cannot_run(tiny, tiny_tokenizer, mix, form):
    with pytest.raises(ConfigError, match=form):
        engine_of(tiny, tiny_tokenizer).generate(PROMPTS[:2], mix, form=form)
