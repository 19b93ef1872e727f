"""LinUCB, and the bandit strategy on a router."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from sigmix.adapt import OTHER, Decision
from sigmix.adapt.bandit import BanditDispatch, LinUCB, arm_and_context
from sigmix.errors import ConfigError
from sigmix.experts.mix import Mix


def context(draw, sure=0.8):
    """The true class of a request, and the probabilities of a router that is often right."""
    truth = draw.integers(3)
    x = draw.dirichlet(np.ones(3)) * (1 - sure)
    x[truth] += sure
    return truth, x


def test_without_feedback_the_bandit_agrees_with_the_router():
    bandit, draw = LinUCB(["a", "b", "other"], {"A": "a", "B": "b", "base": "other"}), np.random.default_rng(0)
    for _ in range(50):
        truth, x = context(draw)
        assert bandit.choose(x, ["A", "B", "base"])[0] == ["A", "B", "base"][truth]


def test_feedback_changes_the_choice():
    bandit, draw = LinUCB(["a", "b", "other"], {"A": "a", "B": "b", "base": "other"}), np.random.default_rng(1)
    right = {0: "B", 1: "B", 2: "base"}  # expert A fails on its own label
    rewards = []
    for _ in range(300):
        truth, x = context(draw)
        arm, _ = bandit.choose(x, ["A", "B", "base"])
        reward = 1.0 if arm == right[truth] else -1.0
        bandit.learn(arm, x, reward)
        rewards.append(reward)
    assert np.mean(rewards[-100:]) > 0.9
    again = LinUCB.from_json(json.loads(json.dumps(bandit.to_json())))
    _, x = context(draw)
    assert again.choose(x, ["A", "B", "base"]) == bandit.choose(x, ["A", "B", "base"])
    assert again.count == bandit.count


def test_a_new_arm_is_explored():
    bandit, draw = LinUCB(["a", "other"], {"A": "a", "base": "other"}), np.random.default_rng(2)
    x = np.array([0.9, 0.1])
    for _ in range(200):
        arm, _ = bandit.choose(x, ["A", "base"])
        bandit.learn(arm, x, -0.5 + 0.1 * draw.standard_normal())
    bandit.add("new")
    assert bandit.choose(x, ["A", "base", "new"])[0] == "new"


DAMAGED = [
    {},
    {"labels": 3},
    {"labels": ["a"], "arms": {"A": {"a": [[1, 2]], "b": [1], "count": 0}}},
    {"labels": ["a"], "arms": {"A": {"a": [[float("nan")]], "b": [1], "count": 0}}},
]


@pytest.mark.parametrize("state", DAMAGED)
def test_damaged_state(state):
    with pytest.raises((ValueError, KeyError, TypeError)):
        LinUCB.from_json(state)


class Router:
    """Router with fixed probabilities, for labels "math" and "other"."""

    labels = (SimpleNamespace(name="math", mix=Mix.one("math")), SimpleNamespace(name="other", mix=Mix.base()))

    def decide(self, prompts):
        evidence = {"probabilities": {"math": 0.9, "other": 0.1}}
        return [Decision(Mix.one("math"), "math", "fixed", evidence if text else {}, 5, 0.0) for text in prompts]


class Store(dict):
    """Store in memory."""

    def learned(self, name):
        return self.get(name)

    def learn(self, reply_id, reward, name, value):
        if reply_id in self.setdefault("rewards", {}):
            return False
        self["rewards"][reply_id] = reward
        self[name] = value
        return True


def test_strategy_learns_from_feedback_and_keeps_it():
    bank = {"math": SimpleNamespace(meta={})}
    store = Store()
    strategy = BanditDispatch(Router(), bank, store)
    (decision,) = strategy.decide(["17 + 25"])
    assert (decision.mix, decision.label) == (Mix.one("math"), "math")
    arm, probabilities = arm_and_context(decision)
    for number in range(20):
        assert strategy.learn(str(number), arm, probabilities, -1.0)
    assert not strategy.learn("0", arm, probabilities, 1.0)
    (decision,) = BanditDispatch(Router(), bank, store).decide(["17 + 25"])
    assert (decision.mix, decision.label) == (Mix.base(), OTHER)
    assert decision.evidence["bandit"]["math"]["expected"] < 0
    assert strategy.decide([""])[0].reason == "fixed"  # empty: no probabilities


def test_an_unloaded_expert_is_no_arm():
    strategy = BanditDispatch(Router(), {}, Store())
    assert strategy.decide(["17 + 25"])[0].mix == Mix.base()


def test_an_expert_that_the_router_does_not_list_yet():
    router = Router()
    strategy = BanditDispatch(router, {"math": SimpleNamespace(meta={})}, Store())
    router.decide = lambda prompts: [Decision(Mix.one("math"), "math", "", {"probabilities": {"code": 1.0}})]
    (decision,) = strategy.decide(["x"])
    assert decision.mix in (Mix.one("math"), Mix.base())


def test_damaged_saved_state():
    with pytest.raises(ConfigError):
        BanditDispatch(Router(), {}, Store({"bandit:math|other": DAMAGED[1]}))


@pytest.mark.parametrize("mix, arm", [("base", "base"), ("math", "math"), ("math:0.5", None), ("math+code", None)])
def test_arm_of_a_decision(mix, arm):
    assert arm_and_context(Decision(Mix.parse(mix), "", ""))[0] == arm
