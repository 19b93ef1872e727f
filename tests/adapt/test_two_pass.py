"""Two-pass inference: decisions and the answers under them."""

from __future__ import annotations

import pytest
from helpers_adapt import bank_of, engine_of

from sigmix.adapt import (
    OTHER,
    ClassifierDispatch,
    Decision,
    PromptDispatch,
    RouterDispatch,
    TwoPass,
    request_statistics,
)
from sigmix.adapt.two_pass import letter_of, open_strategy
from sigmix.errors import ConfigError, UnknownNameError
from sigmix.experts.bank import Bank
from sigmix.experts.mix import Mix

pytestmark = pytest.mark.usefixtures("cache")
REQUESTS = ["What is 17 + 25?", "Who has the pen?", "x"]


class Fixed:
    """Strategy with a given mixture for each request."""

    name = "fixed"

    def __init__(self, *mixes):
        self.mixes = mixes

    def decide(self, prompts):
        return [Decision(mix, "x", "fixed") for mix, _ in zip(self.mixes, prompts, strict=True)]


def test_the_second_pass_answers_under_each_decision_and_from_the_start(tiny, tiny_tokenizer):
    """Not from the KV cache of the first pass: answers equal those of the mixtures alone."""
    engine = engine_of(tiny, tiny_tokenizer)
    mixes = [Mix.one("adder"), Mix.base(), Mix.parse("adder:0.5+finder:0.5")]
    runner = TwoPass(engine, Fixed(*mixes))
    answers = runner.generate(REQUESTS, max_new_tokens=5)
    for answer, request, mix in zip(answers, REQUESTS, mixes, strict=True):
        (one,) = engine.generate([request], mix, max_new_tokens=5)
        assert (answer.generation.ids, answer.decision.mix, answer.text) == (one.ids, mix, one.text)
    assert all(seconds > 0 for seconds in runner.seconds)
    for answer, request in zip(TwoPass(engine, "A").generate(REQUESTS, max_new_tokens=3), REQUESTS, strict=True):
        (one,) = engine.generate([request], answer.decision.mix, max_new_tokens=3)
        assert answer.generation.ids == one.ids


def test_explicit_mixtures_need_no_strategy(tiny, tiny_tokenizer):
    runner = TwoPass(engine_of(tiny, tiny_tokenizer), "router")  # there are no statistics
    for mix in ("adder", Mix.one("adder"), ["adder", Mix.one("adder"), "adder:1"]):
        decisions = runner.decide(REQUESTS, mix)
        assert [(one.mix, one.reason) for one in decisions] == [(Mix.one("adder"), "given")] * 3
    assert runner.decide(REQUESTS, "base")[0].mix == Mix.base()
    with pytest.raises(ConfigError, match="2 mixes for 3"):
        runner.decide(REQUESTS, ["base", "adder"])
    with pytest.raises(ConfigError):
        runner.decide(REQUESTS, "adder:x")
    with pytest.raises(ConfigError):
        runner.decide(REQUESTS)


def test_automatic_and_explicit_requests_in_one_batch(tiny, tiny_tokenizer):
    runner = TwoPass(engine_of(tiny, tiny_tokenizer), Fixed(Mix.one("finder")))
    answers = runner.generate(["a", "b", " "], ["adder", "auto", "auto"], max_new_tokens=2)
    decisions = [answer.decision for answer in answers]
    assert [one.mix.id for one in decisions] == ["adder", "finder", "base"]
    assert [one.label for one in decisions] == ["adder", "x", OTHER]


def test_inputs_replace_the_prompts_of_the_second_pass(tiny, tiny_tokenizer):
    engine = engine_of(tiny, tiny_tokenizer)
    row = engine.encode("x", "You are brief.")
    (answer,) = TwoPass(engine).generate(["x"], "adder", inputs=[row], max_new_tokens=4)
    assert answer.generation.ids == engine.generate([row], "adder", max_new_tokens=4)[0].ids


def test_strategies_by_letter_and_name():
    assert [letter_of(text) for text in ("a", "B", "router", "Prompt", "AUTO")] == ["A", "B", "D", "A", "auto"]
    for choice in ("C", "", "routers"):
        with pytest.raises(UnknownNameError):
            letter_of(choice)
    with pytest.raises(UnknownNameError, match="router"):
        TwoPass(None, "route")


def test_auto_is_the_strategy_that_the_bank_has_something_for(tiny, tiny_tokenizer, tmp_path, cache):
    assert isinstance(open_strategy(engine_of(tiny, tiny_tokenizer)), PromptDispatch)
    experts = bank_of(tiny, adder="arithmetic", judge="dispatch")
    engine = engine_of(tiny, tiny_tokenizer, experts)
    assert isinstance(TwoPass(engine).strategy, ClassifierDispatch)
    bank = Bank(tmp_path / "bank", create=True)
    for expert in experts.values():
        bank.add(expert)
    engine.bank = bank
    bank.set_requests("adder", request_statistics(engine, ["1 + 2", "3 + 4"], ["5 + 6"]))
    assert isinstance(open_strategy(engine), RouterDispatch)
