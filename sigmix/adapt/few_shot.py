"""Strategy C (paper, section 3.2): search the mixing weights on a few labelled examples.

A candidate α is worth its accuracy on the examples; ties, which are many with ten examples, are broken by the mean
log-likelihood of the right answers. The whole population is scored in mixed batches: every row of a batch is one
example under one candidate, so no weights are ever swapped.

The search starts from the base, every expert alone and all in equal shares, so on the examples its result is never
worse than the best of these.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sigmix.adapt.base import Decision, skills
from sigmix.adapt.search import SEARCHERS, Searcher
from sigmix.engine.scoring import replies_and_logprobs
from sigmix.errors import ConfigError, UnknownNameError
from sigmix.experts.expert import Expert
from sigmix.experts.mix import LAYER, Layout, Mix

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


# --- Where a search looks: vectors of mixing weights α, and what they mean.


GRANULARITIES = ("model", "layer", "matrix")


@dataclass(frozen=True)
class AlphaSpace:
    """Mixtures of some experts.

    Attributes:
        experts: their names. matrices: paths of all adapted matrices. granularity: see above.
        normalised: Σα = 1. low, high: bounds of every number.

    Raises:
        ConfigError: no experts, an unknown granularity, bounds that are none, or α per layer for matrices outside of
            layers.
    """

    experts: tuple[str, ...]
    matrices: tuple[str, ...] = ()
    granularity: str = "model"
    normalised: bool = False
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.experts:
            raise ConfigError("a search needs at least one expert to mix", remedy="give a bank that has one")
        if self.granularity not in GRANULARITIES:
            raise ConfigError(f"granularity must be one of {', '.join(GRANULARITIES)}, not {self.granularity!r}")
        if not np.isfinite([self.low, self.high]).all() or not self.low < self.high:
            raise ConfigError(f"weights need finite bounds, low below high, not {self.low} and {self.high}")
        if self.normalised and self.low < 0:
            raise ConfigError("normalised weights cannot be negative", remedy="use free ones, or low=0")
        if self.granularity == "layer" and (odd := [path for path in self.matrices if not LAYER.search(path)]):
            raise ConfigError(f"α per layer, but {odd[0]} is in no layer", remedy="use α per matrix")

    @property
    def units(self) -> int:
        """How many numbers an expert has."""
        if self.granularity == "layer":
            return 1 + max((int(LAYER.search(path)[1]) for path in self.matrices), default=-1)  # type: ignore[index]
        return len(self.matrices) if self.granularity == "matrix" else 1

    @property
    def size(self) -> int:
        """Numbers in a vector."""
        return len(self.experts) * self.units

    def constant(self, weights: Mapping[str, float]) -> np.ndarray:
        """The vector of weights per expert, the same everywhere."""
        return np.repeat([float(weights.get(name, 0.0)) for name in self.experts], self.units)

    def corners(self) -> list[np.ndarray]:
        """The base, every expert alone, and all experts in equal shares: what a search should never end below."""
        alone = [self.constant({name: self.high}) for name in self.experts]
        equal = self.constant(dict.fromkeys(self.experts, 1 / len(self.experts)))
        found = [self.constant({}), *alone, *([equal] if len(self.experts) > 1 else [])]
        return [np.clip(vector, self.low, self.high) for vector in found]

    def mix(self, vector: Sequence[float] | np.ndarray) -> Mix:
        """The mixture that a vector [size] means.

        Raises:
            ConfigError: another size, or NaN.
        """
        flat = np.asarray(vector, dtype=float)
        if flat.shape != (self.size,) or not np.isfinite(flat).all():
            raise ConfigError(f"a vector of this space has {self.size} finite numbers, not {flat.tolist()}")
        table = np.clip(flat, self.low, self.high).reshape(len(self.experts), self.units)
        if self.normalised:
            total = table.sum(0)
            table = np.divide(table, total, out=np.zeros_like(table), where=total > 1e-9)
        if self.granularity == "model":
            return Mix({name: float(row[0]) for name, row in zip(self.experts, table, strict=True)})
        if self.granularity == "layer":
            return Mix({name: row.tolist() for name, row in zip(self.experts, table, strict=True)})
        return Mix(
            {
                name: dict(zip(self.matrices, row.tolist(), strict=True))
                for name, row in zip(self.experts, table, strict=True)
            }
        )


# --- Searching z itself, not mixing weights: every vector is a whole expert, near those that there are.


REACH = 2.0
"""Times the largest gain of any expert: how far a particle may go."""


class ZSpace:
    """Gains z - 1 over all adapted matrices of a model, [R].

    Args:
        layout: of the model's matrices. experts: {name: float32 [R], z}, where the search starts.

    Attributes:
        made: {name: Expert} of the vectors that became a mix and were not forgotten.

    Raises:
        ConfigError: no experts, or all of them are the base.
    """

    def __init__(self, layout: Layout, experts: Mapping[str, torch.Tensor]) -> None:
        self.layout = layout
        self.starts = {name: (z.double() - 1).numpy() for name, z in experts.items()}
        if not self.starts:
            raise ConfigError("a search needs at least one expert to start from", remedy="give a bank that has one")
        largest = max(float(np.abs(gain).max(initial=0)) for gain in self.starts.values())
        if largest == 0:
            raise ConfigError("all experts are the base, so there is nothing to search between")
        self.high = REACH * largest
        self.low = max(-self.high, -1.0)  # z cannot be negative
        self.size = len(next(iter(self.starts.values())))
        self.made: dict[str, Expert] = {}

    def corners(self) -> list[np.ndarray]:
        """The base, every expert, and their mean."""
        alone = list(self.starts.values())
        return [np.zeros(self.size), *alone, *([np.mean(alone, 0)] if len(alone) > 1 else [])]

    def mix(self, vector: Sequence[float] | np.ndarray) -> Mix:
        """The mix of the expert that a vector [R] is; it is in ``made``, unless it is the base or one of the starts.

        Raises:
            ConfigError: another size, or NaN.
        """
        gain = np.asarray(vector, dtype=float)
        if gain.shape != (self.size,) or not np.isfinite(gain).all():
            raise ConfigError(f"a vector of this space has {self.size} finite numbers")
        if not gain.any():
            return Mix.base()
        for name, start in self.starts.items():
            if np.array_equal(gain, start):
                return Mix.one(name)
        z = torch.from_numpy(1 + np.clip(gain, self.low, self.high)).float()
        name = f"z-{hashlib.sha256(z.numpy().tobytes()).hexdigest()[:16]}"
        if name not in self.made:
            self.made[name] = Expert(name, self.layout.split(z))
        return Mix.one(name)

    def forget(self, but: Any) -> None:
        """Drop all made experts except those of some mixes."""
        kept = {name for mix in but for name in mix.weights}
        self.made = {name: expert for name, expert in self.made.items() if name in kept}
