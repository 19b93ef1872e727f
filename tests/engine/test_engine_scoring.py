"""Scoring without generating: against whole forward passes of single rows."""

from __future__ import annotations

import pytest
import torch
from helpers_engine import TOLERANCE, alone, expert, rows

from sigmix.engine import Engine
from sigmix.engine.prefix import StoredPrefix
from sigmix.engine.scoring import answer_logprobs, decoder_layers, hidden, next_logits, stored_prefix
from sigmix.errors import ConfigError, ContextError
from sigmix.experts.mix import Mix

pytestmark = pytest.mark.usefixtures("cache")
PROMPTS = rows([14, 22, 12, 17], shared=10)
ANSWERS = [[5, 6], [7], [8, 9, 10, 2], [11, 12, 13]]


@pytest.fixture(params=["llama", "gpt2", "gemma3"])
def made(request, tiny, tiny_tokenizer):
    bank = {name: expert(tiny(request.param), name, seed) for name, seed in (("math", 1), ("code", 2))}
    return Engine(tiny(request.param), tiny_tokenizer, bank)


def logits(engine, ids, mix):
    with torch.no_grad(), engine.under([mix]):
        return alone(engine.model, ids)


MIXES = [Mix.one("math"), Mix.base(), Mix.parse("code:-0.4"), Mix.parse("math:0.7+code:0.3")]


@pytest.mark.parametrize("mixes", [[Mix.base()] * 4, [Mix.one("math")] * 4, MIXES])
def test_next_logits_are_those_of_each_row_alone(made, mixes):
    found = next_logits(made, PROMPTS, mixes, batch_size=3)
    for row, mix, one in zip(PROMPTS, mixes, found, strict=True):
        torch.testing.assert_close(one, logits(made, row, mix)[-1], **TOLERANCE)


@pytest.mark.parametrize("mixes", [[Mix.base()] * 4, MIXES])
def test_answer_logprobs_are_those_of_each_row_alone(made, mixes):
    found = answer_logprobs(made, PROMPTS, ANSWERS, mixes, batch_size=3)
    for row, answer, mix, one in zip(PROMPTS, ANSWERS, mixes, found, strict=True):
        whole = logits(made, row + answer, mix).log_softmax(-1)
        wanted = [float(whole[len(row) - 1 + place, token]) for place, token in enumerate(answer)]
        assert one == pytest.approx(wanted, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("mix", [Mix.base(), Mix.one("math")])
def test_a_stored_prefix_changes_no_logits_and_is_read_once(made, mix, monkeypatch):
    start = stored_prefix(made, PROMPTS[0][:10], mix)
    plain = next_logits(made, PROMPTS, mix)
    for _ in range(2):  # its cache must not grow with use
        torch.testing.assert_close(next_logits(made, PROMPTS, mix, start=start), plain, **TOLERANCE)
        torch.testing.assert_close(next_logits(made, PROMPTS[1:2], mix, start=start), plain[1:2], **TOLERANCE)
    other = rows([14, 20], shared=3, seed=5)  # does not begin with it
    torch.testing.assert_close(next_logits(made, other, mix, start=start), next_logits(made, other, mix), **TOLERANCE)
    monkeypatch.setattr(StoredPrefix, "read", None)
    assert stored_prefix(made, PROMPTS[0][:10], mix) is start


def test_a_sliding_window_has_no_stored_prefix(tiny, tiny_tokenizer):
    assert stored_prefix(Engine(tiny("gemma3"), tiny_tokenizer), PROMPTS[0][:10], Mix.base()) is None
    assert stored_prefix(Engine(tiny("llama"), tiny_tokenizer), PROMPTS[0][:3], Mix.base()) is None


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_hidden_states_are_transformers_own_and_later_layers_do_not_run(tiny, tiny_tokenizer, arch):
    model = tiny(arch, **{"n_layer" if arch == "gpt2" else "num_hidden_layers": 4})
    engine = Engine(model, tiny_tokenizer)
    ran = []
    for number, layer in enumerate(decoder_layers(model)):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    found = hidden(engine, PROMPTS, [1, 3], batch_size=3)
    assert set(ran) == {0, 1, 2}
    for row, states in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            whole = model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(states, torch.stack([whole[1][0, -1], whole[3][0, -1]]), **TOLERANCE)
    out = engine.generate(PROMPTS[:1], max_new_tokens=2)  # the hooks are gone
    assert len(out[0].ids) <= 2


def test_bad_scoring_input(tiny, tiny_tokenizer):
    engine = Engine(tiny("llama", max_position_embeddings=32), tiny_tokenizer)
    with pytest.raises(ConfigError, match="at least one token"):
        answer_logprobs(engine, PROMPTS, [[5], [], [5], [5]])
    with pytest.raises(ConfigError, match="from 1 to 2"):
        hidden(engine, PROMPTS, [3])
    with pytest.raises(ContextError, match="prompt 1"):
        next_logits(engine, [[5, 6], list(range(4, 40))])
    with pytest.raises(ContextError):
        answer_logprobs(engine, [[5] * 30], [[6] * 4])
