"""Few-shot searches in the background, one at a time, between the steps of the batch (strategy C)."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sigmix.adapt import OTHER, Decision, Example, FewShotSearch, ProbeDispatch, Strategy
from sigmix.adapt.bandit import EXPLORE, LinUCB
from sigmix.adapt.base import skills
from sigmix.errors import ConfigError, SigmixError, UnknownNameError
from sigmix.experts.mix import Mix
from sigmix.serve.fair_queue import QueueFull
from sigmix.serve.registry import BASE, Catalogue
from sigmix.serve.scheduler import Job, SharedEngine
from sigmix.serve.store import State

log = logging.getLogger("sigmix.serve")


Judge = Callable[[str, str], float]
"""(reply, right answer) -> how right the reply is, in [0, 1]."""


WAITING, EACH, REMEMBERED = 8, 2, 256
"""Searches that wait in all, and of one client; searches that are remembered."""


BATCH = 32
"""Rows of a search's pass: the answers under way wait for one at most."""


@dataclass(eq=False)
class Adaptation:
    """One search.

    Attributes:
        state: "waiting", "running", "done", "failed" or "cancelled". trace: the search's, round by round.
        rounds: that it has at most. mix: what was found, saved under ``name``.
    """

    id: str
    client: str | None
    name: str
    examples: Sequence[Example]
    judge: Judge
    options: Mapping[str, Any]
    state: str = "waiting"
    rounds: int = 0
    trace: list[dict[str, Any]] = field(default_factory=list)
    mix: dict[str, Any] | None = None
    evidence: dict[str, Any] | None = None
    error: str | None = None
    made: float = field(default_factory=time.time)

    def to_json(self) -> dict[str, Any]:
        """As clients see it."""
        last = self.trace[-1] if self.trace else None
        return {
            "id": self.id, "object": "sigmix.adaptation", "created": int(self.made), "name": self.name,
            "status": self.state, "examples": len(self.examples),
            "progress": {"round": len(self.trace), "rounds": self.rounds, "best": last and last["best"]},
            "trace": self.trace, "mix": self.mix, "evidence": self.evidence, "error": self.error,
        }  # fmt: skip


class _Cancelled(Exception):
    pass


class Adaptations:
    """The thread that searches.

    Args:
        engine: shared with the batcher. catalogue: where mixes are saved. judges: by name.
    """

    def __init__(self, engine: SharedEngine, catalogue: Catalogue, judges: Mapping[str, Judge]) -> None:
        self.engine, self.catalogue, self.judges = engine, catalogue, dict(judges)
        self._queue: queue.Queue[Adaptation | None] = queue.Queue()
        self._known: OrderedDict[str, Adaptation] = OrderedDict()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._loop, name="sigmix-adaptations", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """End: what is under way is cancelled."""
        for found in list(self._known.values()):
            self.cancel(found)
        self._queue.put(None)
        self._thread.join()

    def submit(
        self, id: str, client: str | None, name: str, pairs: Sequence[tuple[str, str]], score: str, **options: Any
    ) -> Adaptation:
        """Queue a search for a client (None: an administrator); ``options`` are those of `FewShotSearch`.

        Raises:
            UnknownNameError: no such way to judge. QueueFull: too many wait. ConfigError, ExpertError: the name.
        """
        if score not in self.judges:
            raise UnknownNameError("way to judge replies", score, self.judges)
        if not len(self.catalogue):
            raise ConfigError("there are no experts to mix", remedy="load some first")
        self.catalogue.check_free(name, client)
        made = Adaptation(id, client, name, [Example(*pair) for pair in pairs], self.judges[score], options)
        with self._lock:
            waiting = [one for one in self._known.values() if one.state == "waiting"]
            own = client is not None and sum(one.client == client for one in waiting) >= EACH
            if own or len(waiting) >= WAITING:
                raise QueueFull(own)
            self._known[id] = made
            for old in [key for key, one in self._known.items() if one.state not in ("waiting", "running")]:
                if len(self._known) <= REMEMBERED:
                    break
                del self._known[old]
        self._queue.put(made)
        return made

    def get(self, id: str, client: str | None) -> Adaptation:
        """A search by its id; a client sees its own (None: all).

        Raises:
            UnknownNameError: there is none.
        """
        found = self._known.get(id)
        if found is None or client not in (None, found.client):
            raise UnknownNameError("adaptation", id, [])
        return found

    def cancel(self, found: Adaptation) -> None:
        """End a search after the pass that it is in."""
        if found.state in ("waiting", "running"):
            found.state = "cancelled"

    def _loop(self) -> None:
        while (job := self._queue.get()) is not None:
            if job.state != "waiting":
                continue
            job.state = "running"
            try:
                self._run(job)
            except _Cancelled:
                pass
            except SigmixError as error:
                job.state, job.error = "failed", str(error)
            except Exception:
                log.exception("an adaptation failed")
                job.state, job.error = "failed", "the server failed on this search"

    def _run(self, job: Adaptation) -> None:
        def judge(example: Example, reply: str) -> float:
            if job.state == "cancelled":
                raise _Cancelled
            return job.judge(reply, example.gold)

        search = FewShotSearch(
            self.engine, job.examples, judge, batch_size=BATCH, progress=job.trace.append, **job.options
        )
        job.rounds = search.limits["iterations"]
        mix = search.fit()
        evidence = search.evidence()
        about = {"made_by": "adapt", "examples": len(job.examples), "accuracy": evidence["accuracy"]}
        self.catalogue.save_mix(job.name, mix, about, job.client)
        job.mix, job.evidence = {"id": mix.id, **mix.to_json()}, evidence
        job.state = "done"


# --- Pass one for a server: strategies A, B and D by name, and `bandit`, which learns from feedback.


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
