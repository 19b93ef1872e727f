"""The engine on the default model: real tokenizer, real template, 210 matrices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers_engine import alone, expert

from sigmix.engine import Engine
from sigmix.engine.cpu import native
from sigmix.engine.prefix_cache import answer_logits, right_pad
from sigmix.errors import ConfigError
from sigmix.experts.fingerprint import fingerprint
from sigmix.experts.mix import Mix
from sigmix.svf.tuner import svf_layers

pytestmark = [pytest.mark.real, pytest.mark.slow]
PROMPTS = ["What is 17 + 25?", "Name three colours, please, and nothing else.", "Hi"]


@pytest.fixture(scope="module")
def real():
    """An engine in float32 on a model of its own, wrapped by PEFT while its adapter is not the base."""
    from sigmix.models.loading import load_base

    model, tokenizer = load_base(dtype="float32")
    plain = Engine(model, tokenizer).encode(PROMPTS[0])
    model, _ = load_base(dtype="float32")
    with torch.no_grad():
        logits = alone(model, plain)
    before = fingerprint(model)
    wobble = expert(model, "wobble", seed=0, width=0.2)
    engine = Engine(model, tokenizer, {"wobble": wobble})
    return SimpleNamespace(engine=engine, model=model, ids=plain, logits=logits, before=before)


def test_the_base_is_bit_for_bit(real):
    ids = torch.tensor([real.ids])
    assert torch.equal(real.engine.logits(ids)[0], real.logits)
    assert torch.equal(real.engine.logits(ids, mix="wobble:0")[0], real.logits)
    assert not torch.equal(real.engine.logits(ids, mix="wobble")[0], real.logits)


def test_rows_of_a_mixed_batch_equal_the_row_alone(real):
    mixes = ["wobble", None, "wobble:0.5"]
    together = real.engine.generate(PROMPTS, mixes, max_new_tokens=6)
    for prompt, mix, answer in zip(PROMPTS, mixes, together, strict=True):
        (single,) = real.engine.generate([prompt], mix, max_new_tokens=6, form="merged")
        assert single.ids == answer.ids
        # float32, 30 layers, merged against factored
        assert single.logprobs == pytest.approx(answer.logprobs, abs=1e-2)
        assert "".join(real.engine.stream(prompt, mix, max_new_tokens=6)) == single.text
    (base,) = real.engine.generate(PROMPTS[:1], max_new_tokens=6)
    assert abs(base.logprobs[0] - together[0].logprobs[0]) > 0.02  # twice what rounding may do


def test_the_weights_stay(real):
    real.engine.generate(PROMPTS[:2], ["wobble:2", "wobble:-1"], max_new_tokens=3)
    real.engine.generate(PROMPTS[:1], "wobble:0.3", max_new_tokens=3)
    assert fingerprint(real.model, fresh=True) == real.before
    assert all(layer._kept is None for layer in svf_layers(real.model).values())


@torch.no_grad()
def test_8_bit_decode_weights_stay_close(smollm):
    try:
        native.load_kernels()
    except ConfigError as error:
        pytest.skip(str(error))
    engine = Engine(*smollm, decode_weights="int8")
    rows, mixes = [engine.encode(prompt) for prompt in PROMPTS], [Mix.base()] * len(PROMPTS)
    answers = [one.ids for one in Engine(*smollm).generate(rows, max_new_tokens=32)]
    ids, mask = right_pad(answers, engine.pad_id, torch.device("cpu"))
    scores = []
    for decoding in (False, True):
        with engine.under(mixes) as select:
            state = engine.read(rows, mixes, select)
        with engine.under(mixes, decoding=decoding):
            scores.append(answer_logits(engine.model, state, ids, mask)[:, 1:][mask[:, 1:]].double().log_softmax(-1))
    exact, ours = scores
    # per token, in nats; measured 0.004 on 240 answers
    assert 0 < float((exact.exp() * (exact - ours)).sum(-1).mean()) < 0.01
    assert float((exact.argmax(-1) == ours.argmax(-1)).float().mean()) > 0.9
