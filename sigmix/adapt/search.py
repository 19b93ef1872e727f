"""Gradient-free search over vectors: the cross-entropy method, CMA-ES and a particle swarm behind one interface.

    searcher = CEM(size, low, high, start=corners, seed=0)
    while not done:
        candidates = searcher.ask()                  # [P, size]
        searcher.tell(candidates, values)            # a value for each, larger is better; tuples compare in order
    searcher.best                                    # the best vector that was ever told

A searcher knows nothing of models. Values need only an order, so they may be tuples: accuracy first, then a tie-break.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from sigmix.errors import ConfigError

Value = Any
"""Anything that orders: a float, or a tuple of floats."""


class Searcher(ABC):
    """What all searchers share: bounds, a seed, given starting candidates, and memory of the best.

    Args:
        size: numbers in a vector. low, high: bounds of each. population: candidates per `ask`.
        start: vectors to try in the first round beside drawn ones, such as each expert alone.
        seed: of everything random.
    """

    def __init__(
        self,
        size: int,
        low: float = 0.0,
        high: float = 1.0,
        *,
        population: int = 32,
        start: Sequence[np.ndarray] = (),
        seed: int = 0,
    ) -> None:
        if size < 1 or population < 2 or not low < high:
            raise ConfigError(f"a search needs a size, a population of 2 or more and bounds, not {size}, {population}")
        self.size, self.low, self.high, self.population = size, low, high, population
        self.start = [np.clip(np.asarray(vector, float), low, high) for vector in start]
        self.random = np.random.default_rng(seed)
        self.seed, self.rounds = seed, 0
        self.best: np.ndarray | None = None
        self.best_value: Value = None

    def ask(self) -> np.ndarray:
        """Candidates [P, size] within the bounds; the given starts come first, in the first round only."""
        drawn = self._draw(self.population)
        if self.rounds == 0 and self.start:
            drawn = np.concatenate([np.stack(self.start), drawn])[: max(self.population, len(self.start))]
        return np.clip(drawn, self.low, self.high)

    def tell(self, candidates: np.ndarray, values: Sequence[Value]) -> None:
        """What the candidates of the last `ask` are worth."""
        if len(candidates) != len(values):
            raise ConfigError(f"{len(values)} values for {len(candidates)} candidates")
        order = sorted(range(len(values)), key=values.__getitem__, reverse=True)  # stable: the earlier wins a tie
        if self.best is None or values[order[0]] > self.best_value:
            self.best, self.best_value = candidates[order[0]].copy(), values[order[0]]
        self._learn(candidates, list(values), order)
        self.rounds += 1

    @abstractmethod
    def _draw(self, count: int) -> np.ndarray:
        """Vectors [count, size], not clipped yet."""

    @abstractmethod
    def _learn(self, candidates: np.ndarray, values: list[Value], order: list[int]) -> None:
        """Take in what candidates are worth; ``order`` has the best first."""

    @property
    @abstractmethod
    def spread(self) -> float:
        """Mean standard deviation of what would be drawn: how undecided the search is."""


class CEM(Searcher):
    """Cross-entropy method (paper, section 3.2 C): draw from a Gaussian, refit it to the elite.

    Args:
        mean: of the first Gaussian; None: the middle of the bounds. std: its standard deviation.
        elite: share of the candidates that is kept. floor: least standard deviation, so that a search with tied
            values does not freeze. smooth: weight of the old Gaussian in the new one.
    """

    def __init__(
        self, *args: Any, mean: float | None = None, std: float = 0.5, elite: float = 0.2, floor: float = 0.02,
        smooth: float = 0.1, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **options)
        if not 0 < elite <= 1 or not std > 0 or not 0 <= smooth < 1 or floor < 0:
            raise ConfigError("CEM needs an elite in (0, 1], std above 0, smooth in [0, 1) and a floor of 0 or more")
        self.mean = np.full(self.size, (self.low + self.high) / 2 if mean is None else mean)
        self.std = np.full(self.size, std)
        self.elite, self.floor, self.smooth = elite, floor, smooth

    def _draw(self, count: int) -> np.ndarray:
        return self.random.normal(self.mean, self.std, (count, self.size))

    def _learn(self, candidates: np.ndarray, values: list[Value], order: list[int]) -> None:
        chosen = candidates[order[: max(2, round(self.elite * len(order)))]]
        self.mean = self.smooth * self.mean + (1 - self.smooth) * chosen.mean(0)
        self.std = np.maximum(self.smooth * self.std + (1 - self.smooth) * chosen.std(0), self.floor)

    @property
    def spread(self) -> float:
        return float(self.std.mean())


class CMAES(Searcher):
    """CMA-ES, by the ``cma`` package (Hansen). It sees ranks only, so tuples are as good as numbers.

    Args:
        std: first step size.

    Raises:
        ConfigError: the package is not installed.
    """

    def __init__(self, *args: Any, std: float = 0.3, **options: Any) -> None:
        super().__init__(*args, **options)
        try:
            import cma
        except ImportError as error:
            raise ConfigError("CMA-ES needs the package cma", remedy='pip install "sigmix[adapt]"') from error
        middle = np.full(max(self.size, 2), (self.low + self.high) / 2)  # cma has no one-dimensional search
        given = {
            "seed": self.seed + 1, "popsize": self.population, "verbose": -9,
            "bounds": [self.low, self.high], "CMA_diagonal": self.size > 200,
        }  # fmt: skip
        self._cma = cma.CMAEvolutionStrategy(middle, std * (self.high - self.low), given)
        self._asked: list[np.ndarray] = []

    def _draw(self, count: int) -> np.ndarray:
        self._asked = self._cma.ask(count)
        return np.stack(self._asked)[:, : self.size]

    def _learn(self, candidates: np.ndarray, values: list[Value], order: list[int]) -> None:
        rank = {number: place for place, number in enumerate(order)}
        given = len(self.start) if self.rounds == 0 else 0
        told = []
        for number, vector in enumerate(candidates):
            if number < given:  # ours: cma takes foreign solutions in its own coordinates
                wide = np.full(max(self.size, 2), (self.low + self.high) / 2)
                wide[: self.size] = vector
                told.append((wide, rank[number]))
            else:
                told.append((self._asked[number - given], rank[number]))
        self._cma.tell([vector for vector, _ in told], [float(place) for _, place in told])

    @property
    def spread(self) -> float:
        return float(np.mean(self._cma.stds))


class Swarm(Searcher):
    """Particle swarm after Model Swarms (arXiv 2410.11163): inertia, cognitive, social and repel terms.

    v ← (r_v φ_v v + r_p φ_p (p_i - x) + r_g φ_g (g - x) - r_w φ_w (g_worst - x)) / Σ r φ
    x ← x + λ v, λ shrinking each round; p_i is a particle's own best, g the swarm's best and g_worst its worst, and the
    r are drawn uniformly for every particle and round.

    Args:
        inertia, cognitive, social, repel: the φ. step: first λ. shrink: its factor per round.
        noise: added to drawn starting places, a standard deviation as a share of the bounds' distance.
    """

    def __init__(
        self, *args: Any, inertia: float = 0.2, cognitive: float = 0.3, social: float = 0.4, repel: float = 0.1,
        step: float = 1.0, shrink: float = 0.97, noise: float = 0.05, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **options)
        if min(inertia, cognitive, social, repel) < 0 or inertia + cognitive + social <= 0 or not step > 0:
            raise ConfigError("a swarm needs coefficients of 0 or more, not all of them 0, and a step above 0")
        self.force = np.array([inertia, cognitive, social, repel])
        self.step, self.shrink, self.noise = step, shrink, noise
        self.place: np.ndarray | None = None

    def _draw(self, count: int) -> np.ndarray:
        if self.place is None:
            if self.start:  # between random pairs of starts, as Model Swarms fills up its population
                starts = np.stack(self.start)
                pairs = self.random.integers(0, len(starts), (2, count))
                share = self.random.random((count, 1))
                mixed = share * starts[pairs[0]] + (1 - share) * starts[pairs[1]]
                return mixed + self.random.normal(0, self.noise * (self.high - self.low), mixed.shape)
            return self.random.uniform(self.low, self.high, (count, self.size))
        return self.place

    def _learn(self, candidates: np.ndarray, values: list[Value], order: list[int]) -> None:
        if self.place is None:
            self.own, self.own_value = candidates.copy(), list(values)
            self.velocity = self.random.permutation(candidates) - candidates
            self.worst, self.worst_value = candidates[order[-1]].copy(), values[order[-1]]
        for number, value in enumerate(values):
            if value > self.own_value[number]:
                self.own[number], self.own_value[number] = candidates[number], value
        if values[order[-1]] < self.worst_value:
            self.worst, self.worst_value = candidates[order[-1]].copy(), values[order[-1]]
        assert self.best is not None
        r = self.random.random((4, len(candidates), 1)) * self.force[:, None, None]
        pull = r[1] * (self.own - candidates) + r[2] * (self.best - candidates) - r[3] * (self.worst - candidates)
        self.velocity = (r[0] * self.velocity + pull) / r.sum(0).clip(1e-12)
        self.place = np.clip(candidates + self.step * self.velocity, self.low, self.high)
        self.step *= self.shrink

    @property
    def spread(self) -> float:
        return float(self.place.std(0).mean()) if self.place is not None else self.high - self.low


SEARCHERS: dict[str, type[Searcher]] = {"cem": CEM, "cma-es": CMAES, "swarm": Swarm}
