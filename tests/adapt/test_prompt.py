"""Strategies A (prompt) and B (classifier)."""

from __future__ import annotations

import pytest
import torch
from helpers_adapt import bank_of, big, engine_of
from helpers_engine import alone, answer_scores, dense
from helpers_experts import at

from sigmix.adapt import OTHER, ClassifierDispatch, PromptDispatch
from sigmix.adapt.base import labels
from sigmix.adapt.prompt import question
from sigmix.engine import Engine
from sigmix.errors import ConfigError, FingerprintError
from sigmix.experts.mix import Mix

pytestmark = pytest.mark.usefixtures("cache")
REQUESTS = ["What is 17 + 25?", "Who has the pen?", "x"]


def likelihoods(engine, request, mix):
    """Constrained log-likelihoods of the labels by whole forward passes, letter by letter."""
    kinds = labels(engine.bank)
    ids = [[*engine.tokenizer.encode(one.name, add_special_tokens=False), 2] for one in kinds]
    row = engine.encode(question(kinds, request))
    found = []
    for own in ids:
        total = 0.0
        for place, token in enumerate(own):
            allowed = sorted({other[place] for other in ids if other[:place] == own[:place]})
            with torch.no_grad(), engine.under([mix]):
                scores = alone(engine.model, row + own[:place])[-1]
            total += float(scores[token] - scores[allowed].logsumexp(0))
        found.append(total)
    return found


@pytest.mark.parametrize(
    "domains", [{"adder": "arithmetic", "finder": "reading"}, {"adder": "reads", "finder": "reading"}]
)
def test_scores_are_constrained_likelihoods(tiny, tiny_tokenizer, domains):
    """Also where labels begin alike ("reads", "reading"), so that one token does not tell them apart."""
    engine = engine_of(tiny, tiny_tokenizer, bank_of(tiny, **domains))
    strategy = PromptDispatch(engine, calibrate=False)
    scores, tokens = strategy.scores(REQUESTS)
    for request, found in zip(REQUESTS, scores.tolist(), strict=True):
        assert found == pytest.approx(likelihoods(engine, request, Mix.base()), abs=1e-3)
    assert scores.exp().sum(1).tolist() == pytest.approx([1.0] * 3, abs=1e-4)  # the labels are all there is
    # the template was read before; a second branch reads the request again
    fresh = [len(engine.encode(question(strategy.labels, request))) - len(strategy.prefix) for request in REQUESTS]
    branch = len("read") if domains["adder"] == "reads" else 0
    assert tokens == ([2 * count + branch for count in fresh] if branch else fresh)
    decisions = strategy.decide(REQUESTS)
    for row, decision in zip(scores, decisions, strict=True):
        best = strategy.labels[int(row.argmax())]
        assert (decision.label, decision.mix) == (best.name, best.mix)
        assert decision.evidence["probabilities"][best.name] == pytest.approx(float(row.max().exp()), abs=1e-4)
        assert best.name in decision.reason
        assert decision.tokens > 0 < decision.seconds


def test_calibration_takes_the_liking_for_a_label_out(tiny, tiny_tokenizer):
    engine = engine_of(tiny, tiny_tokenizer)
    plain, fair = PromptDispatch(engine, calibrate=False), PromptDispatch(engine)
    scores, _ = plain.scores(REQUESTS)
    wanted = (scores - fair.prior).softmax(-1)
    for row, decision in zip(wanted.tolist(), fair.decide(REQUESTS), strict=True):
        assert list(decision.evidence["probabilities"].values()) == pytest.approx(row, abs=1e-4)
    assert float(fair.prior.exp().sum()) == pytest.approx(1.0, abs=1e-5)


def test_more_labels_than_the_context_holds_mean_the_base(tiny, tiny_tokenizer):
    strategy = PromptDispatch(Engine(tiny(max_position_embeddings=128), tiny_tokenizer, bank_of(tiny)))
    assert {(decision.label, decision.mix) for decision in strategy.decide(REQUESTS)} == {(OTHER, Mix.base())}


def test_a_request_gets_the_same_decision_alone_and_in_a_batch(tiny, tiny_tokenizer):
    strategy = PromptDispatch(engine_of(tiny, tiny_tokenizer))
    together = strategy.decide(REQUESTS)
    for request, decision in zip(REQUESTS, together, strict=True):
        (one,) = strategy.decide([request])
        assert one.mix == decision.mix
        assert one.evidence["probabilities"] == pytest.approx(decision.evidence["probabilities"], abs=1e-4)
    assert strategy.decide([]) == []


def test_a_request_over_the_context_length_gets_the_base(tiny, tiny_tokenizer):
    strategy = PromptDispatch(engine_of(tiny, tiny_tokenizer))
    first, long, last = strategy.decide(["hello", "x" * 4090, "What is 17 + 25?"])
    assert (long.mix, long.label) == (Mix.base(), OTHER)
    together = strategy.decide(["hello", "What is 17 + 25?"])
    assert [first.mix, last.mix] == [one.mix for one in together]


def test_an_empty_bank_and_one_expert(tiny, tiny_tokenizer):
    (decision,) = PromptDispatch(engine_of(tiny, tiny_tokenizer, {})).decide(["x"])
    assert (decision.mix, decision.label) == (Mix.base(), OTHER)
    (decision,) = PromptDispatch(engine_of(tiny, tiny_tokenizer, bank_of(tiny, adder="arithmetic"))).decide(["x"])
    assert set(decision.evidence["probabilities"]) == {"arithmetic", OTHER}


def test_an_expert_of_another_base_is_named_before_anything_is_decided(tiny, tiny_tokenizer):
    bank = bank_of(tiny)
    with pytest.raises(FingerprintError, match="adder"):
        PromptDispatch(Engine(tiny("llama", seed=7, max_position_embeddings=4096), tiny_tokenizer, bank))


def test_the_classifier_runs_under_its_expert_and_is_never_chosen(tiny, tiny_tokenizer):
    engine = engine_of(tiny, tiny_tokenizer, bank_of(tiny, adder="arithmetic", finder="reading", judge="dispatch"))
    strategy = ClassifierDispatch(engine)
    assert [one.name for one in strategy.labels] == ["arithmetic", "reading", OTHER]
    scores, _ = strategy.scores(REQUESTS[:1])
    assert scores[0].tolist() == pytest.approx(likelihoods(engine, REQUESTS[0], Mix.one("judge")), abs=1e-3)
    assert scores[0].tolist() != pytest.approx(likelihoods(engine, REQUESTS[0], Mix.base()), abs=1e-2)
    assert "judge" in strategy.decide(["x"])[0].reason


def test_a_classifier_for_prompts_reads_the_beginnings_of_labels_as_answers(tiny, tiny_tokenizer):
    bank = bank_of(tiny, adder="reads", finder="reading", judge="dispatch")  # "read" comes before they differ
    engine = engine_of(tiny, tiny_tokenizer, {**bank, "judge": at("prompt", bank["judge"])})
    scores, _ = ClassifierDispatch(engine).scores(REQUESTS[:1])
    read, write = dense(big(tiny), bank["judge"].z), big(tiny)
    row = engine.encode(question(labels(engine.bank), REQUESTS[0]))
    kinds = [[*tiny_tokenizer.encode(one.name, add_special_tokens=False), 2] for one in labels(engine.bank)]
    for own, found in zip(kinds, scores[0].tolist(), strict=True):
        total = 0.0
        for place, (token, logprobs) in enumerate(zip(own, answer_scores(read, write, row, own), strict=True)):
            allowed = sorted({other[place] for other in kinds if other[:place] == own[:place]})
            total += float(logprobs[token] - logprobs[allowed].logsumexp(0))
        assert found == pytest.approx(total, abs=1e-3)
    everywhere, _ = ClassifierDispatch(engine_of(tiny, tiny_tokenizer, bank)).scores(REQUESTS[:1])
    assert scores[0].tolist() != pytest.approx(everywhere[0].tolist(), abs=1e-2)


def test_a_new_expert_of_the_same_name_does_not_read_the_old_ones_prefix(tiny, tiny_tokenizer):
    bank = bank_of(tiny, adder="arithmetic", judge="dispatch")
    engine = engine_of(tiny, tiny_tokenizer, bank)
    ClassifierDispatch(engine).decide(["x"])
    bank["judge"] = bank_of(tiny, first="x", second="x", judge="dispatch")["judge"]
    again = ClassifierDispatch(engine).scores(["x"])[0]
    fresh = ClassifierDispatch(engine_of(tiny, tiny_tokenizer, bank)).scores(["x"])[0]
    torch.testing.assert_close(again, fresh)


def test_a_classifier_that_does_not_fit_the_bank(tiny, tiny_tokenizer):
    bank = bank_of(tiny, adder="arithmetic", judge="dispatch")
    with pytest.raises(ConfigError, match="sigmix train --task dispatch"):
        ClassifierDispatch(engine_of(tiny, tiny_tokenizer))
    foreign = {**bank, "judge": bank["judge"].with_meta(training={"labels": ["code", OTHER]})}
    with pytest.raises(ConfigError, match="sigmix train --task dispatch"):
        ClassifierDispatch(engine_of(tiny, tiny_tokenizer, foreign))
    two = bank_of(tiny, adder="arithmetic", judge="dispatch", jury="dispatch")
    with pytest.raises(ConfigError, match="judge, jury"):
        ClassifierDispatch(engine_of(tiny, tiny_tokenizer, two))
