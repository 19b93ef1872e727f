"""Strategy C (Transformer², section 3.2): search mixing weights α on a few labelled examples.

A candidate's value is its accuracy on the examples, with ties (frequent on ten examples) broken by the mean
log-likelihood of the gold answers. A population is scored in mixed batches, one row per example and candidate, so that
no weights are swapped. The search starts from the base model, every expert alone and their average, so on the examples
its result is never worse than the best of these.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from sigmix.adapt.base import Decision, skills
from sigmix.adapt.search import SEARCHERS, Searcher
from sigmix.engine import Engine
from sigmix.engine.base import InferenceEngine
from sigmix.engine.prefix_cache import common_prefix
from sigmix.engine.tokenization import reply_ids
from sigmix.errors import ConfigError, UnknownNameError
from sigmix.experts.expert import Expert
from sigmix.experts.mix import LAYER, Layout, Mix

SETTINGS: dict[str, dict[str, int]] = {
    "full": {"population": 32, "iterations": 100, "patience": 15},
    "light": {"population": 16, "iterations": 8, "patience": 4},
}

GRANULARITIES = ("model", "layer", "matrix")
REACH = 2.0  # bound of a particle's gain in `ZSpace`, in multiples of the largest gain of any expert


@dataclass(frozen=True)
class Example:
    """Labelled example: user turn or messages, gold answer, data for the scorer, images and system turn."""

    prompt: str | Sequence[Mapping[str, str]]
    gold: str
    extra: Any = None
    images: tuple[Any, ...] = ()
    system: str | None = None


Score = Callable[[Example, str], float]  # (example, reply) -> score in [0, 1]


@dataclass(frozen=True)
class AlphaSpace:
    """Vectors of mixing weights.

    Attributes:
        experts: names. matrices: paths of all adapted matrices.
        granularity: one α per expert for the "model", each "layer" or each "matrix".
        normalised: Σα = 1. low, high: bounds of each α.

    Raises:
        ConfigError: no experts, unknown granularity, invalid bounds, or α per layer for matrices outside layers.
    """

    experts: tuple[str, ...]
    matrices: tuple[str, ...] = ()
    granularity: str = "model"
    normalised: bool = False
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.experts:
            raise ConfigError("a search needs at least one expert to mix", remedy="give a bank with experts")
        if self.granularity not in GRANULARITIES:
            raise ConfigError(f"granularity must be one of {', '.join(GRANULARITIES)}, not {self.granularity!r}")
        if not np.isfinite([self.low, self.high]).all() or not self.low < self.high:
            raise ConfigError(f"weights need finite bounds, low below high, not {self.low} and {self.high}")
        if self.normalised and self.low < 0:
            raise ConfigError("normalised weights cannot be negative", remedy="set normalised=False, or low=0")
        if self.granularity == "layer" and (odd := [path for path in self.matrices if not LAYER.search(path)]):
            raise ConfigError(f"α per layer, but {odd[0]} is in no layer", remedy="use granularity='matrix'")

    @property
    def units(self) -> int:
        """Number of α per expert."""
        if self.granularity == "layer":
            return 1 + max((int(LAYER.search(path)[1]) for path in self.matrices), default=-1)  # type: ignore[index]
        return len(self.matrices) if self.granularity == "matrix" else 1

    @property
    def size(self) -> int:
        """Length of a vector."""
        return len(self.experts) * self.units

    def corners(self) -> list[np.ndarray]:
        """Return the base model, every expert alone and, of several experts, their average."""
        identity = self.high * np.eye(len(self.experts))
        rows = [np.zeros(len(self.experts)), *identity]
        if len(self.experts) > 1:
            rows.append(np.full(len(self.experts), 1 / len(self.experts)))
        return [np.clip(np.repeat(row, self.units), self.low, self.high) for row in rows]

    def mix(self, vector: Sequence[float] | np.ndarray) -> Mix:
        """Return the mixture of a vector [size], clipped to the bounds.

        Raises:
            ConfigError: wrong size, or values that are not finite.
        """
        table = np.clip(_checked(vector, self.size), self.low, self.high).reshape(len(self.experts), self.units)
        if self.normalised:
            total = table.sum(0)
            table = np.divide(table, total, out=np.zeros_like(table), where=total > 1e-9)
        rows = dict(zip(self.experts, table.tolist(), strict=True))
        if self.granularity == "model":
            return Mix({name: row[0] for name, row in rows.items()})
        if self.granularity == "layer":
            return Mix(rows)
        return Mix({name: dict(zip(self.matrices, row, strict=True)) for name, row in rows.items()})


class ZSpace:
    """Gains z - 1 over all adapted matrices of a model, [R]: every vector is a whole expert.

    Args:
        experts: {name: z, float32 [R]}, where the search starts.
        positions: of the new experts, see `SVFConfig`.

    Attributes:
        candidates: {name: Expert} of the vectors that became a mixture.

    Raises:
        ConfigError: no experts, or all of them equal the base model.
    """

    def __init__(self, layout: Layout, experts: Mapping[str, torch.Tensor], positions: str = "all") -> None:
        self.layout, self.positions = layout, positions
        self.starts = {name: (z.double() - 1).numpy() for name, z in experts.items()}
        if not self.starts:
            raise ConfigError("a search needs at least one expert to start from", remedy="give a bank with experts")
        largest = max(float(np.abs(gain).max(initial=0)) for gain in self.starts.values())
        if largest == 0:
            raise ConfigError("all experts equal the base model, so there is nothing to search between")
        self.high = REACH * largest
        self.low = max(-self.high, -1.0)  # z cannot be negative
        self.size = len(next(iter(self.starts.values())))
        self.candidates: dict[str, Expert] = {}

    def corners(self) -> list[np.ndarray]:
        """Return the base model, every expert and, of several experts, their mean."""
        alone = list(self.starts.values())
        return [np.zeros(self.size), *alone, *([np.mean(alone, 0)] if len(alone) > 1 else [])]

    def mix(self, vector: Sequence[float] | np.ndarray) -> Mix:
        """Return the mixture of a vector [R]: the base model, a starting expert, or a new one in ``candidates``.

        Raises:
            ConfigError: wrong size, or values that are not finite.
        """
        gain = _checked(vector, self.size)
        if not gain.any():
            return Mix.base()
        for name, start in self.starts.items():
            if np.array_equal(gain, start):
                return Mix.one(name)
        z = torch.from_numpy(1 + np.clip(gain, self.low, self.high)).float()
        name = f"z-{hashlib.sha256(z.numpy().tobytes()).hexdigest()[:16]}"
        if name not in self.candidates:
            self.candidates[name] = Expert(name, self.layout.split(z), {"positions": self.positions})
        return Mix.one(name)

    def keep(self, mix: Mix) -> None:
        """Drop all candidates except those of a mixture."""
        self.candidates = {name: expert for name, expert in self.candidates.items() if name in mix.weights}


def _common_positions(names: Sequence[str], bank: Mapping[str, Expert]) -> str:
    kinds = {name: bank[name].positions for name in names}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{name} has {kind}" for name, kind in kinds.items())
        raise ConfigError(
            f"granularity z makes one expert, which has one kind of positions, but {listed}",
            remedy="name experts of one kind with --expert, or use granularity model, layer or matrix",
        )
    return next(iter(kinds.values()), "all")


def _checked(vector: Sequence[float] | np.ndarray, size: int) -> np.ndarray:
    flat = np.asarray(vector, dtype=float)
    if flat.shape != (size,) or not np.isfinite(flat).all():
        raise ConfigError(f"expected a vector of {size} finite numbers, not one of shape {flat.shape}")
    return flat


class FewShotSearch:
    """Search for the mixture that answers labelled examples best.

    Args:
        examples: at least one. score: scores a reply.
        experts: names to mix; default: all skills of the engine's bank.
        granularity, normalised, low, high: see `AlphaSpace`. Granularity "z" searches z itself (`ZSpace`, only with the
            swarm); the result is a new expert, ``expert`` after `fit`.
        method: "cem", "cma-es" or "swarm". settings: "full" or "light".
        population, iterations, patience: override the settings; patience counts rounds without improvement.
        max_new_tokens: of a reply. seed: random seed. batch_size: rows per forward pass.
        progress: called with the new entry of ``trace`` after every round.

    Attributes:
        values: {mix id: (accuracy, mean log-likelihood per gold token)} of every candidate.
        trace: one JSON entry per round. result: best mixture, after `fit`.

    Raises:
        ContextError: an example that the model cannot read.
        ConfigError: no examples, or invalid options. UnknownNameError: unknown expert, method or settings.
    """

    name = "C (few-shot)"

    def __init__(
        self,
        engine: InferenceEngine,
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
            raise ConfigError("a search needs at least one example", remedy="give labelled examples, usually 3 to 10")
        if not all((one.prompt if isinstance(one.prompt, str) else "-").strip() and one.gold for one in self.examples):
            raise ConfigError("every example needs a prompt and a gold answer")
        if method not in SEARCHERS:
            raise UnknownNameError("search method", method, SEARCHERS)
        if settings not in SETTINGS:
            raise UnknownNameError("search settings", settings, SETTINGS)
        given = {"population": population, "iterations": iterations, "patience": patience}
        self.limits = {**SETTINGS[settings], **{key: value for key, value in given.items() if value is not None}}
        if min(self.limits.values()) < 1 or seed < 0:
            raise ConfigError(
                f"population, iterations and patience must be at least 1 and the seed at least 0, not {self.limits} "
                f"and {seed}"
            )
        self.method, self.seed = method, seed
        names = tuple(skills(engine.bank) if experts is None else experts)
        for name in names:
            engine.check_mix(Mix.one(name))
        self.space: AlphaSpace | ZSpace
        if granularity == "z":
            if method != "swarm":
                raise ConfigError(f"granularity z needs the swarm, not {method}", remedy="method='swarm'")
            if not isinstance(engine, Engine):
                raise ConfigError(
                    f"granularity z makes experts in memory, which {type(engine).__name__} does not read",
                    remedy="use sigmix's own engine: --engine own, or granularity model, layer or matrix",
                )
            starts = {name: engine.execution.z(Mix.one(name)) for name in names}
            self.space = ZSpace(engine.execution.layout, starts, _common_positions(names, engine.bank))
        else:
            self.space = AlphaSpace(names, tuple(engine.layers), granularity, normalised, low, high)
        self.max_new_tokens, self.batch_size, self.progress = max_new_tokens, batch_size, progress
        self.answers = [reply_ids(engine.tokenizer, one.gold, engine.eos_token_ids) for one in self.examples]
        self.rows = [engine.encode(one.prompt, one.system, images=one.images) for one in self.examples]
        for number, (row, answer) in enumerate(zip(self.rows, self.answers, strict=True)):
            engine.check_prompt([*row, *answer], max(max_new_tokens - len(answer), 0), f"example {number}")
        self.values: dict[str, tuple[float, float]] = {}
        self.trace: list[dict[str, Any]] = []
        self.result: Mix | None = None
        self.expert: Expert | None = None

    def evaluate(self, mixes: Sequence[Mix]) -> list[tuple[float, float]]:
        """Return (accuracy, mean log-likelihood per gold token) of each mixture; each one is evaluated once."""
        new = [mix for mix in dict.fromkeys(mixes) if mix.id not in self.values]
        if new:
            count = len(self.examples)
            # each candidate reads it once
            start = None if any(one.images for one in self.examples) else self.rows[0][: common_prefix(self.rows)]
            replies, logprobs = self.engine.replies_and_logprobs(
                self.rows * len(new), self.answers * len(new), [mix for mix in new for _ in range(count)],
                max_new_tokens=self.max_new_tokens, start=start, batch_size=self.batch_size,
            )  # fmt: skip
            for place, mix in enumerate(new):
                part = slice(place * count, (place + 1) * count)
                scores = [float(self.score(*pair)) for pair in zip(self.examples, replies[part], strict=True)]
                likelihood = sum(sum(tokens) / len(tokens) for tokens in logprobs[part]) / count
                # a mixture that breaks the model must lose; NaN has no order, and JSON no infinity
                lowest = -sys.float_info.max
                self.values[mix.id] = sum(scores) / count, likelihood if math.isfinite(likelihood) else lowest
        return [self.values[mix.id] for mix in mixes]

    def fit(self) -> Mix:
        """Return the best mixture. With granularity "z" it names ``expert``, which is not in the engine's bank."""
        space, engine = self.space, cast(Any, self.engine)  # a `ZSpace` sets the bank, which `Engine` has as a property
        bank = engine.bank
        free = isinstance(space, ZSpace)
        # noise on z would be larger than the differences between experts
        options: dict[str, Any] = {"noise": 0.0} if free else {}
        searcher: Searcher = SEARCHERS[self.method](
            space.size, space.low, space.high, population=max(self.limits["population"], 2), start=space.corners(),
            seed=self.seed, **options,
        )  # fmt: skip
        self.trace = []
        started, idle = time.perf_counter(), 0
        try:
            while len(self.trace) < self.limits["iterations"] and idle < self.limits["patience"]:
                candidates, before = searcher.ask(), searcher.best_value
                mixes = [space.mix(vector) for vector in candidates]
                if isinstance(space, ZSpace):
                    engine.bank = ChainMap(space.candidates, bank)
                values = self.evaluate(mixes)
                searcher.tell(candidates, values)
                assert searcher.best is not None
                self.result = space.mix(searcher.best)
                if isinstance(space, ZSpace):
                    space.keep(self.result)
                idle = 0 if before is None or searcher.best_value > before else idle + 1
                self.trace.append(
                    {
                        "round": len(self.trace), "best": searcher.best_value[0],
                        "best_loglik": searcher.best_value[1],
                        "mean": sum(value[0] for value in values) / len(values), "spread": searcher.spread,
                        "seconds": round(time.perf_counter() - started, 3),
                    }
                )  # fmt: skip
                if self.progress is not None:
                    self.progress(self.trace[-1])
        finally:
            if free:
                engine.bank = bank
        assert self.result is not None
        if isinstance(space, ZSpace):
            self.expert = space.candidates.get(next(iter(self.result.weights), ""))
        return self.result

    def evidence(self) -> dict[str, Any]:
        """Return JSON values about the search: values of the corners and of the result, counts, a warning if due."""
        assert self.result is not None
        accuracy, likelihood = self.values[self.result.id]
        corners = {mix.id: self.values[mix.id] for mix in map(self.space.mix, self.space.corners())}
        figures = {
            "examples": len(self.examples), "accuracy": accuracy, "loglik": likelihood,
            "corners": {name: {"accuracy": a, "loglik": b} for name, (a, b) in corners.items()},
            "rounds": len(self.trace), "candidates": len(self.values), "method": self.method, "seed": self.seed,
        }  # fmt: skip
        if len({value[0] for value in self.values.values()}) == 1:
            verdict = {1.0: "right", 0.0: "wrong"}.get(accuracy, "scored alike")
            figures["warning"] = f"the examples are {verdict} under every mixture; only the log-likelihood decided"
        return figures

    def decide(self, prompts: Sequence[str]) -> list[Decision]:
        """Return the mixture found for every request of the examples' task; the first call runs the search.

        Raises:
            ConfigError: a new expert (granularity "z") that the bank lacks.
        """
        mix = self.result if self.result is not None else self.fit()
        if self.expert is not None and self.expert.name not in self.engine.bank:
            raise ConfigError("the bank lacks the expert that the search created", remedy="add search.expert to it")
        reason = f"the best of {len(self.values)} mixtures on {len(self.examples)} examples"
        evidence = self.evidence()
        return [Decision(mix, "few-shot", reason, evidence) for _ in prompts]
