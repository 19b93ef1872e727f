"""Strategy C (paper, section 3.2): search the mixing weights on a few labelled examples.

A candidate α is worth its accuracy on the examples; ties, which are many with ten examples, are broken by the mean
log-likelihood of the right answers. The whole population is scored in mixed batches: every row of a batch is one
example under one candidate, so no weights are ever swapped.

The search starts from the base, every expert alone and all in equal shares, so on the examples its result is never
worse than the best of these.
"""

from __future__ import annotations

import math
import time
from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sigmix.adapt.decision import Decision
from sigmix.adapt.labels import skills
from sigmix.adapt.search import SEARCHERS, Searcher
from sigmix.adapt.spaces import AlphaSpace
from sigmix.adapt.zspace import ZSpace
from sigmix.engine.scoring import replies_and_logprobs
from sigmix.errors import ConfigError, UnknownNameError
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix

SETTINGS: dict[str, dict[str, int]] = {
    "full": {"population": 32, "iterations": 100, "patience": 15},
    "light": {"population": 16, "iterations": 8, "patience": 4},
}


@dataclass(frozen=True)
class Example:
    """A labelled example: the user's turn, a right reply, whatever the scorer needs beside them, images to show."""

    prompt: str
    gold: str
    extra: Any = None
    images: tuple[Any, ...] = ()


Score = Callable[[Example, str], float]
"""(example, reply) -> how right the reply is, in [0, 1]."""


class FewShotSearch:
    """Search a mixture on examples.

    Args:
        engine: an `Engine`. examples: at least one. score: judges a reply.
        experts: names to mix; None: all skills of the engine's bank.
        granularity, normalised, low, high: of the space, see `AlphaSpace`. Granularity "z" moves z itself (`ZSpace`,
            by the swarm only): the result is a new expert, in ``expert`` after `fit`.
        method: "cem", "cma-es" or "swarm". settings: "full" or "light".
        population, iterations, patience: override the settings'; patience is rounds without a new best.
        max_new_tokens: of a reply. seed: of everything random. batch_size: rows per pass.
        progress: called with an entry of the trace after every round.

    Raises:
        ConfigError: no examples, an unknown method, settings, or a space that cannot be. UnknownNameError: an expert.
    """

    name = "C (few-shot)"

    def __init__(
        self,
        engine: Any,
        examples: Sequence[Example | tuple[str, str]],
        score: Score,
        *,
        experts: Sequence[str] | None = None,
        granularity: str = "model",
        normalised: bool = False,
        low: float = 0.0,
        high: float = 1.0,
        method: str = "cem",
        settings: str = "full",
        population: int | None = None,
        iterations: int | None = None,
        patience: int | None = None,
        max_new_tokens: int = 16,
        seed: int = 0,
        batch_size: int = 320,
        progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.engine, self.score = engine, score
        self.examples = [one if isinstance(one, Example) else Example(*one) for one in examples]
        if not self.examples:
            raise ConfigError("a search needs at least one example", remedy="give labelled examples, 3 to 10 are usual")
        if not all(one.prompt.strip() and one.gold for one in self.examples):
            raise ConfigError("every example needs a prompt and a right reply")
        if method not in SEARCHERS:
            raise UnknownNameError("search method", method, SEARCHERS)
        if settings not in SETTINGS:
            raise UnknownNameError("search settings", settings, SETTINGS)
        given = {"population": population, "iterations": iterations, "patience": patience}
        limits = {**SETTINGS[settings], **{key: value for key, value in given.items() if value is not None}}
        if min(limits.values()) < 1:
            raise ConfigError(f"population, iterations and patience must be at least 1, not {limits}")
        self.limits, self.method, self.seed = limits, method, seed
        names = tuple(skills(engine.bank) if experts is None else experts)
        for name in names:
            engine.z(Mix.one(name))
        self.space: AlphaSpace | ZSpace
        self.expert: Expert | None = None
        if granularity == "z":
            if method != "swarm":
                raise ConfigError(f"z itself is moved by the swarm, not by {method}", remedy="method='swarm'")
            starts = {name: engine.states.z(Mix.one(name)) for name in names}
            self.space = ZSpace(engine.states.layout, starts)
        else:
            self.space = AlphaSpace(names, tuple(engine.layers), granularity, normalised, low, high)
        self.max_new_tokens, self.batch_size, self.progress = max_new_tokens, batch_size, progress
        end = engine.ends[:1]
        self.answers = [[*engine.tokenizer.encode(one.gold, add_special_tokens=False), *end] for one in self.examples]
        self.rows = [engine.encode(one.prompt, images=one.images) for one in self.examples]
        self.known: dict[str, tuple[float, float]] = {}
        self.trace: list[dict[str, Any]] = []
        self.result: Mix | None = None

    def values(self, mixes: Sequence[Mix]) -> list[tuple[float, float]]:
        """(accuracy, mean log-likelihood per answer token) of each mix on the examples; each mix is run once."""
        fresh = [mix for mix in dict.fromkeys(mixes) if mix.id not in self.known]
        if fresh:
            count = len(self.examples)
            rows, answers = self.rows * len(fresh), self.answers * len(fresh)
            wide = [mix for mix in fresh for _ in range(count)]
            replies, logprobs = replies_and_logprobs(
                self.engine, rows, answers, wide, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size
            )
            for place, mix in enumerate(fresh):
                part = slice(place * count, (place + 1) * count)
                scores = [
                    float(self.score(example, reply))
                    for example, reply in zip(self.examples, replies[part], strict=True)
                ]
                each = [sum(tokens) / len(tokens) for tokens in logprobs[part]]
                likelihood = sum(each) / count
                # a broken mixture must lose, and NaN has no order
                self.known[mix.id] = (sum(scores) / count, likelihood if math.isfinite(likelihood) else -math.inf)
        return [self.known[mix.id] for mix in mixes]

    def fit(self) -> Mix:
        """The best mixture that the search found; how it went is in ``trace``.

        With granularity "z" the mix names ``expert``, which is not in the engine's bank.
        """
        if isinstance(self.space, AlphaSpace):
            return self._fit(self.space)
        bank = self.engine.bank
        try:
            mix = self._fit(self.space)
            self.expert = self.space.made.get(next(iter(mix.weights), ""))
        finally:
            self.engine.bank = bank
        return mix

    def _fit(self, space: AlphaSpace | ZSpace) -> Mix:
        limits, bank = self.limits, self.engine.bank
        # between experts noise would drown what the experts are
        still = {"noise": 0.0} if isinstance(space, ZSpace) else {}
        searcher: Searcher = SEARCHERS[self.method](
            space.size, space.low, space.high, population=max(limits["population"], 2), start=space.corners(),
            seed=self.seed, **still,
        )  # fmt: skip
        started, idle = time.perf_counter(), 0
        for number in range(limits["iterations"]):
            candidates = searcher.ask()
            before = searcher.best_value
            mixes = [space.mix(vector) for vector in candidates]
            if isinstance(space, ZSpace):
                self.engine.bank = ChainMap(space.made, bank)
            values = self.values(mixes)
            searcher.tell(candidates, values)
            if isinstance(space, ZSpace):
                assert searcher.best is not None  # it was told
                space.forget(but=[space.mix(searcher.best)])
            idle = 0 if before is None or searcher.best_value > before else idle + 1
            entry = {
                "round": number,
                "best": searcher.best_value[0],
                "best_loglik": searcher.best_value[1],
                "mean": sum(value[0] for value in values) / len(values),
                "spread": searcher.spread,
                "seconds": round(time.perf_counter() - started, 3),
            }
            self.trace.append(entry)
            if self.progress is not None:
                self.progress(entry)
            if idle >= limits["patience"]:
                break
        assert searcher.best is not None
        self.result = space.mix(searcher.best)
        return self.result

    def evidence(self) -> dict[str, Any]:
        """JSON values about the search: the corners' and the result's values, rounds, candidates, a warning if due."""
        assert self.result is not None
        corners = {mix.id: self.known[mix.id] for mix in map(self.space.mix, self.space.corners())}
        accuracies = {value[0] for value in self.known.values()}
        told = {
            "examples": len(self.examples),
            "accuracy": self.known[self.result.id][0],
            "loglik": self.known[self.result.id][1],
            "corners": {name: {"accuracy": a, "loglik": b} for name, (a, b) in corners.items()},
            "rounds": len(self.trace),
            "candidates": len(self.known),
            "method": self.method,
            "seed": self.seed,
        }
        if len(accuracies) == 1:
            what = "right" if accuracies == {1.0} else "wrong" if accuracies == {0.0} else "judged alike"
            told["warning"] = f"the examples are {what} under every mixture tried; only the log-likelihood chose"
        return told

    def decide(self, prompts: Sequence[str]) -> list[Decision]:
        """The mixture found, for every request of the task that the examples are of; searches on the first call."""
        mix = self.result if self.result is not None else self.fit()
        if self.expert is not None and self.expert.name not in self.engine.bank:
            raise ConfigError("the search made a new expert that the bank lacks", remedy="add search.expert to it")
        reason = f"the best of {len(self.known)} mixtures on {len(self.examples)} examples"
        return [Decision(mix, "few-shot", reason, self.evidence()) for _ in prompts]
