"""Pass one for a server: strategies A, B and D by name, and `bandit`, which learns from feedback."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sigmix.adapt import OTHER, Decision, ProbeDispatch, Strategy
from sigmix.adapt.labels import skills
from sigmix.errors import ConfigError, UnknownNameError
from sigmix.experts.mix import Mix
from sigmix.serve.bandit import EXPLORE, LinUCB
from sigmix.serve.catalogue import BASE, Catalogue
from sigmix.serve.jobs import Job
from sigmix.serve.state import State

BANDIT = "bandit"


class Bandit:
    """`LinUCB` over what a probe says, saved with every reward.

    Args:
        probe: strategy D. catalogue: the experts there are. state: where it is saved.
    """

    name = "bandit (LinUCB on the probe)"

    def __init__(self, probe: ProbeDispatch, catalogue: Catalogue, state: State) -> None:
        self.probe, self.catalogue, self.state = probe, catalogue, state
        self._lock = threading.Lock()
        labels = list(probe.probe.labels)
        self.key = "bandit:" + "|".join(labels)  # what was learned about other labels is another thing
        saved = state.learned(self.key)
        try:
            self.model = LinUCB(labels, {}) if saved is None else LinUCB.from_json(saved)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"what was learned from feedback cannot be read: {error}", remedy=f"move {state.path} away"
            ) from error
        self.own = {self._arm(label.mix): label.name for label in probe.labels}

    @staticmethod
    def _arm(mix: Mix) -> str:
        return next(iter(mix.weights), BASE)

    def decide(self, prompts: Sequence[str]) -> list[Decision]:
        """The probe's probabilities are the context; the arm with the highest upper bound answers."""
        return [self._decision(found) for found in self.probe.decide(prompts)]

    def _decision(self, found: Decision) -> Decision:
        chances = found.evidence.get("probabilities")
        if chances is None:
            return found  # too long to ask about
        started = time.perf_counter()
        x = np.array([chances[label] for label in self.model.labels])
        with self._lock:
            arms = [arm for arm in [*self.own, *skills(self.catalogue)] if arm == BASE or arm in self.catalogue]
            arms = list(dict.fromkeys(arms))
            for arm in arms:
                self.model.add(arm, self.own.get(arm))
            best, scores = self.model.choose(x, arms)
            count = self.model.count[best]
        expected, unknown = scores[best]
        reason = f"feedback on {count} replies expects {expected:+.2f} of {best}, give or take {EXPLORE * unknown:.2f}"
        told = {arm: {"expected": e, "bound": e + EXPLORE * u} for arm, (e, u) in scores.items()}
        mix = Mix.base() if best == BASE else Mix.one(best)
        seconds = found.seconds + time.perf_counter() - started
        evidence = {**found.evidence, "bandit": told}
        return replace(
            found, mix=mix, label=self.own.get(best, best), reason=reason, evidence=evidence, seconds=seconds
        )

    def learn(self, reply: str, arm: str, context: Mapping[str, float], reward: float) -> bool:
        """Count a reply's reward, and save it; False for a reply that has one.

        Raises:
            OutputError: it cannot be saved; then nothing is learned either.
        """
        x = np.array([float(context.get(label, 0.0)) for label in self.model.labels])
        with self._lock:
            fresh = LinUCB.from_json(self.model.to_json())
            fresh.add(arm, self.own.get(arm))
            fresh.learn(arm, x, reward)
            first = self.state.learn(reply, reward, self.key, fresh.to_json())
            if first:
                self.model = fresh
            return first


class Decider:
    """Decides for jobs, each by the policy that it names.

    Args:
        strategies: {name: strategy}. default: the name that "auto" means. catalogue: experts that may be chosen.
    """

    def __init__(self, strategies: Mapping[str, Strategy], default: str, catalogue: Catalogue) -> None:
        self.strategies, self.catalogue = dict(strategies), catalogue
        if default not in self.strategies:
            raise UnknownNameError("policy", default, self.strategies)
        self.default = default

    def check(self, policy: str) -> str:
        """The name of a policy, where "" and "auto" are the default.

        Raises:
            UnknownNameError: there is none of that name.
        """
        name = self.default if policy in ("", "auto") else policy
        if name not in self.strategies:
            raise UnknownNameError("policy", policy, [*self.strategies, "auto"])
        return name

    def __call__(self, jobs: Sequence[Job]) -> list[Decision]:
        """A decision for each job, in order."""
        found: dict[int, Decision] = {}
        for policy in dict.fromkeys(job.policy for job in jobs):
            own = [job for job in jobs if job.policy == policy]
            decisions = self.strategies[policy].decide([job.text for job in own])
            found |= {id(job): self._present(decision) for job, decision in zip(own, decisions, strict=True)}
        return [found[id(job)] for job in jobs]

    def _present(self, decision: Decision) -> Decision:
        if self.catalogue.usable(decision.mix):
            return decision
        reason = f"{decision.reason}, but it is not loaded"
        return replace(decision, mix=Mix.base(), label=OTHER, reason=reason)


def arm_and_context(decision: Decision) -> tuple[str | None, dict[str, float] | None]:
    """What feedback on a reply can be learned from: the expert that gave it, and what the probe said."""
    names: list[Any] = list(decision.mix.weights)
    chances = decision.evidence.get("probabilities")
    single = not names or (len(names) == 1 and decision.mix.weights[names[0]] == 1)
    return (names[0] if names else BASE) if single else None, dict(chances) if chances else None
