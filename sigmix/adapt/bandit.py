"""Contextual bandit over experts: feedback on earlier replies shifts the choice of strategy D.

LinUCB (Li et al., A Contextual-Bandit Approach to Personalized News Article Recommendation, 2010), with the router's
probabilities as context and one arm per expert, plus the base model. θ of an arm starts at 1 for the arm's own label
and 0 elsewhere, so without feedback the bandit agrees with the router.

Not a library: MABWiser has no per-arm prior and serializes as a pickle; contextualbandits only takes binary rewards
and needs a compiler; river's own documentation calls its LinUCB too slow for use.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from sigmix.adapt.base import Decision, skills
from sigmix.adapt.router import RouterDispatch
from sigmix.errors import ConfigError, reraised
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix

BASE = Mix.base().id  # arm of the base model
PRIOR = 4.0  # weight of the prior, in observations
EXPLORE = 0.3  # exploration weight α of the upper confidence bound; rewards are in [-1, 1]


class LinUCB:
    """Disjoint LinUCB over named context features.

    Args:
        labels: names of the d context features.
        own: {arm: its label, or None for a zero prior}.
    """

    def __init__(self, labels: Sequence[str], own: Mapping[str, str | None]) -> None:
        self.labels = list(labels)
        self._a: dict[str, np.ndarray] = {}
        self._b: dict[str, np.ndarray] = {}
        self.count: dict[str, int] = {}
        for arm, label in own.items():
            self.add(arm, label)

    def add(self, arm: str, label: str | None = None) -> None:
        """Add an arm; an existing one keeps its state."""
        if arm in self._a:
            return
        prior = np.array([float(name == label) for name in self.labels])
        self._a[arm], self._b[arm] = PRIOR * np.eye(len(prior)), PRIOR * prior
        self.count[arm] = 0

    def choose(self, x: np.ndarray, arms: Sequence[str]) -> tuple[str, dict[str, tuple[float, float]]]:
        """Return the arm with the highest upper confidence bound for a context [d], and all scores.

        A score is (expected reward θᵀx, uncertainty sqrt(xᵀA⁻¹x)).
        """
        scores = {}
        for arm in arms:
            solved = np.linalg.solve(self._a[arm], np.stack([self._b[arm], x], 1))
            scores[arm] = float(solved[:, 0] @ x), math.sqrt(max(float(solved[:, 1] @ x), 0.0))
        return max(scores, key=lambda arm: scores[arm][0] + EXPLORE * scores[arm][1]), scores

    def learn(self, arm: str, x: np.ndarray, reward: float) -> None:
        """Update an arm with a reward in [-1, 1]."""
        self.add(arm)
        self._a[arm] += np.outer(x, x)
        self._b[arm] += reward * x
        self.count[arm] += 1

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        arms = {
            arm: {"a": self._a[arm].tolist(), "b": self._b[arm].tolist(), "count": self.count[arm]} for arm in self._a
        }
        return {"labels": self.labels, "arms": arms}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LinUCB:
        """Restore the state of `to_json`.

        Raises:
            ValueError, KeyError, TypeError: malformed state.
        """
        bandit = cls(value["labels"], {})
        size = len(bandit.labels)
        for arm, state in value["arms"].items():
            a, b = np.array(state["a"], dtype=float), np.array(state["b"], dtype=float)
            if a.shape != (size, size) or b.shape != (size,) or not (np.isfinite(a).all() and np.isfinite(b).all()):
                raise ValueError(f"malformed state of arm {arm!r}")
            bandit._a[arm], bandit._b[arm], bandit.count[arm] = a, b, int(state["count"])
        return bandit


class BanditStore(Protocol):
    """Persistent state of a bandit."""

    def learned(self, name: str) -> Any:
        """Return the value last saved under a name, or None."""

    def learn(self, reply_id: str, reward: float, name: str, value: Any) -> bool:
        """Save a reply's reward and the new state in one transaction; return False if the reply has a reward."""


class BanditDispatch:
    """Strategy that chooses by LinUCB on the router's probabilities and learns from feedback.

    Args:
        router: strategy D, for the context.
        bank: experts that may be chosen; may change between calls.
        store: persistent state, saved with every reward.

    Raises:
        ConfigError: malformed saved state.
    """

    name = "bandit (LinUCB on the router)"

    def __init__(self, router: RouterDispatch, bank: Mapping[str, Expert], store: BanditStore) -> None:
        self.router, self.bank, self.store = router, bank, store
        self._lock = threading.Lock()
        labels = [label.name for label in router.labels]
        self.key = "bandit:" + "|".join(labels)  # weights are only valid for the labels they were learned on
        saved = store.learned(self.key)
        with reraised(ConfigError, f"malformed bandit state {self.key!r}", "use another --state"):
            self.model = LinUCB(labels, {}) if saved is None else LinUCB.from_json(saved)
        self.own = {next(iter(label.mix.weights), BASE): label.name for label in router.labels}

    def decide(self, prompts: Sequence[str]) -> list[Decision]:
        """Return one decision per request."""
        return [self._decide(decision) for decision in self.router.decide(prompts)]

    def _decide(self, decision: Decision) -> Decision:
        probabilities = decision.evidence.get("probabilities")
        if probabilities is None:  # an empty request
            return decision
        started = time.perf_counter()
        x = np.array([probabilities.get(label, 0.0) for label in self.model.labels])  # the bank may have changed
        with self._lock:
            arms = [arm for arm in dict.fromkeys([*self.own, *skills(self.bank)]) if arm == BASE or arm in self.bank]
            for arm in arms:
                self.model.add(arm, self.own.get(arm))
            best, scores = self.model.choose(x, arms)
            count = self.model.count[best]
        expected, uncertainty = scores[best]
        bounds = {arm: {"expected": mean, "bound": mean + EXPLORE * std} for arm, (mean, std) in scores.items()}
        return replace(
            decision,
            mix=Mix.base() if best == BASE else Mix.one(best),
            label=self.own.get(best, best),
            reason=f"expected reward {expected:+.2f} ± {EXPLORE * uncertainty:.2f} for {best}, from {count} rewards",
            evidence={**decision.evidence, "bandit": bounds},
            seconds=decision.seconds + time.perf_counter() - started,
        )

    def learn(self, reply_id: str, arm: str, context: Mapping[str, float], reward: float) -> bool:
        """Update the arm that gave a reply, and save the state.

        Args:
            arm: expert name or "base". context: the router's probabilities by label. reward: in [-1, 1].

        Returns:
            False if the reply already has a reward; nothing changes then.

        Raises:
            OutputError: the state cannot be saved; nothing changes then.
        """
        x = np.array([float(context.get(label, 0.0)) for label in self.model.labels])
        with self._lock:
            updated = LinUCB.from_json(self.model.to_json())
            updated.add(arm, self.own.get(arm))
            updated.learn(arm, x, reward)
            saved = self.store.learn(reply_id, reward, self.key, updated.to_json())
            if saved:
                self.model = updated
            return saved


def arm_and_context(decision: Decision) -> tuple[str | None, dict[str, float] | None]:
    """Return what a reward for a decision can update: (arm, probabilities by label).

    The arm is None for a mixture of several experts or with a weight other than 1; the context is None for decisions
    that the router did not take part in.
    """
    weights = decision.mix.weights
    arm = None if len(weights) > 1 or any(alpha != 1 for alpha in weights.values()) else next(iter(weights), BASE)
    probabilities = decision.evidence.get("probabilities")
    return arm, dict(probabilities) if probabilities else None
