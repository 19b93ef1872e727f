"""The bundled experts on the default model as it is loaded here: what every request may rely on."""

from __future__ import annotations

import pytest
import torch

from reproduction.bank import FILES, rows_of
from sigmix.adapt.base import skills
from sigmix.engine import Engine
from sigmix.engine.scoring import next_logits
from sigmix.experts.bank import Bank
from sigmix.experts.fingerprint import fingerprint
from sigmix.experts.mix import Mix
from sigmix.models.loading import load_base

pytestmark = [pytest.mark.real, pytest.mark.slow]
# cosines of logits in float32
LEAST_COSINE = 0.99999  # of a form and merged weights; measured: 0.999998
MOST_LIKE_THE_BASE = 0.99  # of a request under its expert and on the base; measured: at most 0.9875


@pytest.fixture(scope="module")
def engine():
    model, tokenizer = load_base()
    return Engine(model, tokenizer, Bank.bundled())


@pytest.fixture(scope="module")
def requests(engine):
    """A request for every expert, of different lengths, and one for the base; their mixes."""
    names = skills(engine.bank)
    texts = [rows_of(FILES[name])[0]["prompt"] for name in names]
    return [*texts, "Hello!"], [*map(Mix.one, names), Mix.base()]


def similar(a, b):
    return float(torch.cosine_similarity(a, b, dim=-1).min())


def test_one_hot_is_the_trained_expert_bit_for_bit(engine):
    for name in skills(engine.bank):
        z = engine.z(Mix.one(name))
        assert all(torch.equal(z[path], engine.bank[name].z[path]) for path in z)
        assert engine.z(Mix({name: 0.0})) == {}


def test_every_form_is_the_merged_one_and_a_row_is_the_request_alone(requests):
    texts, mixes = requests
    engine = Engine(*load_base(dtype="float32"), Bank.bundled())  # in bfloat16 rounding alone makes 0.998 of some rows
    names = skills(engine.bank)
    pairs = zip(texts, mixes, strict=True)
    alone = torch.cat([next_logits(engine, [text], mix, form="merged") for text, mix in pairs])
    base = next_logits(engine, texts)
    assert similar(alone[:-1], base[:-1]) < MOST_LIKE_THE_BASE, "the experts must matter, or agreement is nothing"
    for form in ("factored", "gain"):
        assert similar(next_logits(engine, texts, mixes, form=form), alone) > LEAST_COSINE, form
    mixed = [Mix(dict.fromkeys(names, 1 / len(names)))] * len(texts)
    merged = next_logits(engine, texts, mixed, form="merged")
    assert similar(next_logits(engine, texts, [*mixed[1:], Mix.base()])[:-1], merged[:-1]) > LEAST_COSINE


def test_the_base_is_the_base_before_between_and_after(engine, requests):
    texts, mixes = requests
    before, answers = fingerprint(engine.model, fresh=True), engine.generate(texts, max_new_tokens=6)
    engine.generate(texts, mixes, max_new_tokens=6)
    engine.generate(texts, "number-words", max_new_tokens=3)
    engine.generate(texts, [Mix({"compare-numbers": -1.0})] * len(texts), max_new_tokens=3, form="gain")
    assert engine.generate(texts, max_new_tokens=6) == answers
    assert fingerprint(engine.model, fresh=True) == before
    ids = torch.tensor([engine.encode(texts[0])])
    plain, _ = load_base()
    with torch.no_grad():
        wanted = plain(ids, use_cache=False).logits
    for form in (None, "gain"):
        assert torch.equal(engine.logits(ids, mix=None, form=form), wanted), form
    together = engine.logits(ids.repeat(2, 1), mix=["compare-numbers", None], form="gain")
    with torch.no_grad():
        assert torch.equal(together[1], plain(ids.repeat(2, 1), use_cache=False).logits[1])


def test_other_experts_in_the_bank_change_no_bit(engine, requests):
    texts, _ = requests
    # two fresh engines: what one has read and kept differs in rounding from what another batch would have read
    name = "compare-numbers"
    few = Engine(engine.model, engine.tokenizer, {name: engine.bank[name]})
    every = Engine(engine.model, engine.tokenizer, engine.bank)
    assert few.generate(texts, name, max_new_tokens=4) == every.generate(texts, name, max_new_tokens=4)
    rows = [name, None] * len(texts)
    twice = [text for text in texts for _ in range(2)]
    ours, theirs = (one.generate(twice, rows, max_new_tokens=4) for one in (every, few))
    assert ours == theirs
