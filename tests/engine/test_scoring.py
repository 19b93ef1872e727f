"""Scoring without generating: against whole forward passes of single rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers_engine import TOLERANCE, alone, expert, rows

from sigmix.engine import Engine
from sigmix.engine import prefix_cache as prefixes
from sigmix.engine.scoring import decoder_layers, hidden_states, next_logits, replies_and_logprobs
from sigmix.errors import ConfigError, ContextError, PromptError
from sigmix.experts.mix import Mix

pytestmark = pytest.mark.usefixtures("cache")
PROMPTS = rows([14, 22, 12, 17], shared=10)
ANSWERS = [[5, 6], [7], [8, 9, 10, 2], [11, 12, 13]]


@pytest.fixture(params=["llama", "gpt2", "gemma3"])
def scorer(request, tiny, tiny_tokenizer):
    bank = {name: expert(tiny(request.param), name, seed) for name, seed in (("math", 1), ("code", 2))}
    return Engine(tiny(request.param), tiny_tokenizer, bank)


def logits(engine, ids, mix):
    with torch.no_grad(), engine.under([mix]):
        return alone(engine.model, ids)


MIXES = [Mix.one("math"), Mix.base(), Mix.parse("code:-0.4"), Mix.parse("math:0.7+code:0.3")]


@pytest.mark.parametrize("mixes", [[Mix.base()] * 4, [Mix.one("math")] * 4, MIXES])
def test_next_logits_are_those_of_each_row_alone(scorer, mixes):
    found = next_logits(scorer, PROMPTS, mixes, batch_size=3)
    for row, mix, one in zip(PROMPTS, mixes, found, strict=True):
        torch.testing.assert_close(one, logits(scorer, row, mix)[-1], **TOLERANCE)


@pytest.mark.parametrize("mixes", [[Mix.base()] * 4, MIXES])
def test_replies_and_answers_logprobs_are_those_of_each_row_alone(scorer, mixes):
    texts, found = replies_and_logprobs(scorer, PROMPTS, ANSWERS, mixes, max_new_tokens=5, batch_size=3)
    assert texts == [one.text for one in scorer.generate(PROMPTS, mixes, max_new_tokens=5)]
    for row, answer, mix, one in zip(PROMPTS, ANSWERS, mixes, found, strict=True):
        whole = logits(scorer, row + answer, mix).log_softmax(-1)
        wanted = [float(whole[len(row) - 1 + place, token]) for place, token in enumerate(answer)]
        assert one == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    for one, again in zip(found, scorer.score(PROMPTS, ANSWERS, mixes), strict=True):
        assert again == pytest.approx(one, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("positions", ["all", "prompt"])
def test_replies_that_equal_their_answers_are_not_decoded(scorer, positions):
    """Nor does an end token inside an answer, or an answer longer than a reply may be, count as one."""
    scorer.execution.bank = {name: replace(one, meta={"positions": positions}) for name, one in scorer.bank.items()}
    (first,) = scorer.generate(PROMPTS[:1], MIXES[:1], max_new_tokens=3)
    scorer.eos_token_ids = [first.ids[-1]]
    ended = first.ids[: first.ids.index(first.ids[-1]) + 1]
    whole = [scorer.generate([row], mix, max_new_tokens=5)[0] for row, mix in zip(PROMPTS, MIXES, strict=True)]
    assert whole[0].ids == ended
    answers = [ended, [*ended, 7], whole[2].ids[:2], [scorer.eos_token_ids[0], *ended]]
    rows_read = []
    hook = scorer.model.register_forward_pre_hook(
        lambda _, __, given: rows_read.append(len(given["input_ids"])), with_kwargs=True
    )
    texts, _ = replies_and_logprobs(scorer, PROMPTS, answers, MIXES, max_new_tokens=5)
    hook.remove()
    assert texts == [one.text for one in whole]
    if positions == "prompt":
        assert rows_read[-1] < 4
    short = replies_and_logprobs(scorer, PROMPTS[:1], [ended], MIXES[:1], max_new_tokens=1)[0]
    assert short == [scorer.generate(PROMPTS[:1], MIXES[:1], max_new_tokens=1)[0].text]


@pytest.mark.parametrize("mix", [Mix.base(), Mix.one("math"), MIXES])
def test_a_kept_prefix_changes_no_logits_and_is_read_once(scorer, mix, monkeypatch):
    start = PROMPTS[0][:10]
    plain = torch.stack([logits(scorer, row, one)[-1] for row, one in zip(PROMPTS, scorer.mixes(mix, 4), strict=True)])
    scorer.prefix_cache.clear()
    torch.testing.assert_close(next_logits(scorer, PROMPTS, mix, start=start), plain, **TOLERANCE)
    if scorer.prefix_cache.usable(start):  # gemma3 has sliding windows
        assert len(scorer.prefix_cache) == len(set(scorer.mixes(mix, 4)))
        monkeypatch.setattr(prefixes, "read_prefix", None)
    for _ in range(2):  # its cache must not grow with use
        torch.testing.assert_close(next_logits(scorer, PROMPTS, mix, start=start), plain, **TOLERANCE)
        one = scorer.mixes(mix, 4)[1]
        torch.testing.assert_close(next_logits(scorer, PROMPTS[1:2], one, start=start), plain[1:2], **TOLERANCE)


def test_a_start_that_a_prompt_does_not_have_is_not_used(scorer):
    other = rows([14, 20], shared=3, seed=5)
    plain = next_logits(scorer, other)
    torch.testing.assert_close(next_logits(scorer, other, start=PROMPTS[0][:10]), plain, **TOLERANCE)


def test_a_prefix_is_read_once_for_each_distinct_mix(scorer, monkeypatch):
    sizes = []
    real = prefixes.read_prefix

    def counted(model, ids, cache, count=1):
        sizes.append(count)
        real(model, ids, cache, count)

    monkeypatch.setattr(prefixes, "read_prefix", counted)
    scorer.prefix_cache.clear()
    mixes = [Mix.one("math"), Mix.base(), Mix.one("math"), Mix.base()]
    found = next_logits(scorer, PROMPTS, mixes, start=PROMPTS[0][:10])
    assert sizes == ([2] if scorer.prefix_cache.usable(PROMPTS[0][:10]) else [])
    for row, mix, logits_ in zip(PROMPTS, mixes, found, strict=True):
        torch.testing.assert_close(logits_, logits(scorer, row, mix)[-1], **TOLERANCE)


def test_weights_changed_in_place_have_other_prefixes(tiny, tiny_tokenizer):
    engine = Engine(tiny("llama"), tiny_tokenizer)
    before = next_logits(engine, PROMPTS, start=PROMPTS[0][:10])
    with torch.no_grad():
        engine.model.get_input_embeddings().weight.mul_(1.5)
    after = next_logits(engine, PROMPTS, start=PROMPTS[0][:10])
    assert not torch.allclose(before, after)
    plain = torch.stack([logits(engine, row, Mix.base())[-1] for row in PROMPTS])
    torch.testing.assert_close(after, plain, **TOLERANCE)


def test_prefixes_stay_within_their_budget(tiny, tiny_tokenizer):
    engine = Engine(tiny("llama"), tiny_tokenizer)
    next_logits(engine, PROMPTS, start=PROMPTS[0][:10])
    one = engine.prefix_cache.entries.nbytes
    assert one > 0
    engine = Engine(tiny("llama"), tiny_tokenizer, keep_prefixes=int(1.5 * one))
    for length in (10, 9, 8):
        next_logits(engine, PROMPTS, start=PROMPTS[0][:length])
        assert 0 < engine.prefix_cache.entries.nbytes <= 1.5 * one
    assert len(engine.prefix_cache) == 1
    none = Engine(tiny("llama"), tiny_tokenizer, keep_prefixes=0)
    next_logits(none, PROMPTS, start=PROMPTS[0][:10])
    assert none.prefix_cache.entries.nbytes == len(none.prefix_cache) == 0


def test_what_cannot_be_kept(tiny, tiny_tokenizer):
    assert not Engine(tiny("gemma3"), tiny_tokenizer).prefix_cache.usable(PROMPTS[0][:10])  # sliding windows
    assert not Engine(tiny("llama"), tiny_tokenizer).prefix_cache.usable(PROMPTS[0][:3])


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_hidden_states_are_transformers_own_and_later_layers_do_not_run(tiny, tiny_tokenizer, arch):
    model = tiny(arch, **{"n_layer" if arch == "gpt2" else "num_hidden_layers": 4})
    engine = Engine(model, tiny_tokenizer)
    ran = []
    for number, layer in enumerate(decoder_layers(model)):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    found = hidden_states(engine, PROMPTS, [1, 3], batch_size=3)
    assert set(ran) == {0, 1, 2}
    for row, states in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            whole = model(input_ids=torch.tensor([[1, *row]]), output_hidden_states=True).hidden_states
        means = torch.stack([whole[1][0, 1:].mean(0), whole[3][0, 1:].mean(0)])  # 1 begins a text
        torch.testing.assert_close(states, means, **TOLERANCE)
    text = hidden_states(engine, ["a b"], [2])
    torch.testing.assert_close(text, hidden_states(engine, [engine.encode("a b", chat=False)], [2]))
    with pytest.raises(PromptError, match="prompt 1"):
        hidden_states(engine, ["a", ""], [1])
    out = engine.generate(PROMPTS[:1], max_new_tokens=2)  # the hooks are gone
    assert len(out[0].ids) <= 2


def test_bad_scoring_input(tiny, tiny_tokenizer):
    engine = Engine(tiny("llama", max_position_embeddings=32), tiny_tokenizer)
    with pytest.raises(ConfigError):
        replies_and_logprobs(engine, PROMPTS, [[5], [], [5], [5]], max_new_tokens=1)
    with pytest.raises(ConfigError, match="from 1 to 2"):
        hidden_states(engine, PROMPTS, [3])
    with pytest.raises(ContextError, match="prompt 1"):
        next_logits(engine, [[5, 6], list(range(4, 40))])
    with pytest.raises(ContextError):
        replies_and_logprobs(engine, [[5] * 30], [[6] * 4], max_new_tokens=1)
