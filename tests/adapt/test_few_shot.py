"""Strategy C: what a candidate is worth, and that the search ends at the best."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from helpers_adapt import bank_of, engine_of
from helpers_experts import at

from sigmix.adapt import Example, FewShotSearch
from sigmix.engine.scoring import replies_and_logprobs
from sigmix.errors import ConfigError, UnknownNameError
from sigmix.experts.mix import Mix

pytestmark = pytest.mark.usefixtures("cache")
EXAMPLES = [("What is 1?", "one"), ("and 22?", "two"), ("x", "x")]


def letters(example, reply):
    """Something a random model can be better or worse at."""
    return float(reply[:1] > "M")


def search(engine, score=letters, examples=EXAMPLES, **options):
    return FewShotSearch(engine, examples, score, max_new_tokens=3, **{"settings": "light", **options})


def test_a_candidate_is_worth_accuracy_and_likelihood_and_runs_once(tiny, tiny_tokenizer, monkeypatch):
    engine = engine_of(tiny, tiny_tokenizer)
    one = search(engine)
    mixes = [Mix.base(), Mix.one("adder"), Mix.parse("adder:0.5+finder:0.5"), Mix.one("adder")]
    values = one.evaluate(mixes)
    for mix, (accuracy, likelihood) in zip(mixes, values, strict=True):
        replies = [engine.generate([prompt], mix, max_new_tokens=3)[0].text for prompt, _ in EXAMPLES]
        assert accuracy == sum(letters(None, reply) for reply in replies) / 3
        gold = [[*tiny_tokenizer.encode(gold, add_special_tokens=False), 2] for _, gold in EXAMPLES]
        logprobs = [
            replies_and_logprobs(engine, [prompt], [ids], mix, max_new_tokens=1)[1][0]
            for (prompt, _), ids in zip(EXAMPLES, gold, strict=True)
        ]
        assert likelihood == pytest.approx(sum(sum(row) / len(row) for row in logprobs) / 3, abs=1e-4)
    monkeypatch.setattr(engine, "replies_and_logprobs", None)
    assert one.evaluate(mixes) == values


@pytest.mark.parametrize("method", ["cem", "cma-es", "swarm"])
@pytest.mark.parametrize("granularity", ["model", "layer", "matrix"])
def test_the_result_is_the_best_that_was_tried(tiny, tiny_tokenizer, method, granularity):
    engine = engine_of(tiny, tiny_tokenizer)
    before = {name: p.clone() for name, p in engine.model.named_parameters()}
    one = search(engine, method=method, granularity=granularity, population=8, iterations=3)
    mix = one.fit()
    assert one.values[mix.id] == max(one.values.values())
    corners = [space_mix.id for space_mix in map(one.space.mix, one.space.corners())]
    assert {"base", *corners} <= set(one.values)
    assert len(one.trace) == 3
    best = [(entry["best"], entry["best_loglik"]) for entry in one.trace]
    assert best == sorted(best)
    assert one.evidence()["corners"]["base"]["accuracy"] == one.values["base"][0]
    assert all((p == before[name]).all() for name, p in engine.model.named_parameters())
    assert [decision.mix for decision in one.decide(["a", "b"])] == [mix, mix]


def test_a_search_that_can_only_go_by_likelihood_improves_it(tiny, tiny_tokenizer):
    """All wrong, and all right, under every α: said so, and the likelihood of the right answers still chooses."""
    engine = engine_of(tiny, tiny_tokenizer)
    for value, what in ((0.0, "wrong"), (1.0, "right")):
        one = search(engine, lambda example, reply, value=value: value)
        mix = one.fit()
        assert what in one.evidence()["warning"]
        assert one.values[mix.id][1] >= max(found["loglik"] for found in one.evidence()["corners"].values())


def test_a_seed_decides_the_search(tiny, tiny_tokenizer):
    engine = engine_of(tiny, tiny_tokenizer)
    assert search(engine, seed=3).fit() == search(engine, seed=3).fit()


def test_one_example_one_expert_normalised(tiny, tiny_tokenizer):
    engine = engine_of(tiny, tiny_tokenizer, bank_of(tiny, adder="arithmetic"))
    mix = search(engine, examples=[Example("x", "y")], normalised=True, iterations=2).fit()
    assert mix in (Mix.base(), Mix.one("adder"))


def test_a_swarm_can_move_z_itself_and_makes_a_new_expert(tiny, tiny_tokenizer):
    engine = engine_of(tiny, tiny_tokenizer)
    bank, before = engine.bank, {name: p.clone() for name, p in engine.model.named_parameters()}
    # only the likelihood tells candidates apart, so moving between the experts must improve it
    one = search(engine, lambda *_: 0.0, method="swarm", granularity="z", population=10, iterations=8, patience=8)
    mix = one.fit()
    assert engine.bank is bank
    assert one.values[mix.id] == max(one.values.values())
    starts = [one.values[corner.id] for corner in map(one.space.mix, one.space.corners()[:-1])]
    assert one.values[mix.id] > max(starts), "no particle was better than the base and every expert"
    assert list(mix.weights) == [one.expert.name]
    assert not any(torch.equal(one.expert.z[path], bank[name].z[path]) for name in bank for path in one.expert.z)
    with pytest.raises(ConfigError, match="search.expert"):
        one.decide(["a"])
    engine.bank = {**bank, one.expert.name: one.expert}
    assert one.decide(["a"])[0].mix == mix
    assert one.evidence()["loglik"] == one.values[mix.id][1]
    again = search(engine_of(tiny, tiny_tokenizer), lambda *_: 0.0, method="swarm", granularity="z", population=10,
                   iterations=8, patience=8)  # fmt: skip
    assert again.fit() == mix
    assert all((p == before[name]).all() for name, p in engine.model.named_parameters())


@pytest.mark.parametrize("positions", ["all", "prompt"])
def test_a_new_expert_has_the_positions_of_those_it_was_found_between(tiny, tiny_tokenizer, positions):
    engine = engine_of(tiny, tiny_tokenizer)
    engine.bank = {name: at(positions, one) for name, one in engine.bank.items()}
    space = search(engine, method="swarm", granularity="z").space
    mix = space.mix(0.5 * space.corners()[-1])
    assert [space.candidates[name].positions for name in mix.weights] == [positions]
    first = next(iter(engine.bank))
    engine.bank = {**engine.bank, first: at("prompt" if positions == "all" else "all", engine.bank[first])}
    with pytest.raises(ConfigError, match=f"{first} has"):
        search(engine, method="swarm", granularity="z")


def test_z_is_moved_by_the_swarm_only(tiny, tiny_tokenizer):
    with pytest.raises(ConfigError, match="method='swarm'"):
        search(engine_of(tiny, tiny_tokenizer), granularity="z")


def test_patience_ends_a_search(tiny, tiny_tokenizer, monkeypatch):
    one = search(engine_of(tiny, tiny_tokenizer), iterations=50, patience=2)
    monkeypatch.setattr(
        one, "evaluate", lambda mixes: one.values.update({m.id: (0.0, 0.0) for m in mixes}) or [(0.0, 0.0)] * len(mixes)
    )
    one.fit()
    assert len(one.trace) == 3


def test_a_mixture_that_breaks_the_model_loses(tiny, tiny_tokenizer, monkeypatch):
    engine = engine_of(tiny, tiny_tokenizer)
    broken = lambda *a, **k: (["x"] * len(a[1]), [[math.nan]] * len(a[1]))  # noqa: E731
    monkeypatch.setattr(engine, "replies_and_logprobs", broken)
    one = search(engine)
    assert one.evaluate([Mix.base()])[0][1] == -sys.float_info.max


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"examples": []}, ConfigError, "example"),
        ({"examples": [("x", "")]}, ConfigError, "prompt"),
        ({"method": "cme"}, UnknownNameError, "cem"),
        ({"settings": "fast"}, UnknownNameError, "light"),
        ({"population": 0}, ConfigError, "population"),
        ({"experts": ["nobody"]}, UnknownNameError, "nobody"),
        ({"experts": []}, ConfigError, "bank"),
        ({"low": float("nan")}, ConfigError, "bounds"),
    ],
)
def test_bad_input(tiny, tiny_tokenizer, options, error, message):
    with pytest.raises(error, match=message):
        search(engine_of(tiny, tiny_tokenizer), **options)
