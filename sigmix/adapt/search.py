"""Gradient-free search over vectors: cross-entropy method, CMA-ES and particle swarm behind one ask-and-tell interface.

    searcher = CEM(size, low, high, start=corners, seed=0)
    while not done:
        candidates = searcher.ask()                  # [P, size]
        searcher.tell(candidates, values)            # one value each, larger is better
    searcher.best                                    # best vector so far

Values only need an order, so they may be tuples: accuracy first, then a tie-break.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from sigmix.errors import ConfigError
from sigmix.utils.optional import optional

Value = Any  # anything with an order: a float, or a tuple of floats


class Searcher(ABC):
    """Base of all searchers: bounds, random seed, starting candidates and the best vector so far.

    Args:
        size: length of a vector. low, high: bounds of each number. population: candidates per `ask`.
        start: vectors of the first round besides drawn ones, such as each expert alone.
        seed: random seed.
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
            raise ConfigError(
                f"a search needs size >= 1, population >= 2 and low < high, not {size}, {population}, {low} and {high}"
            )
        self.size, self.low, self.high, self.population = size, low, high, population
        self.start = [np.clip(np.asarray(vector, float), low, high) for vector in start]
        self.random = np.random.default_rng(seed)
        self.seed, self.rounds = seed, 0
        self.best: np.ndarray | None = None
        self.best_value: Value = None

    def ask(self) -> np.ndarray:
        """Return candidates [P, size] within the bounds; the first round begins with ``start``."""
        drawn = self._draw(self.population)
        if self.rounds == 0 and self.start:
            drawn = np.concatenate([np.stack(self.start), drawn])[: max(self.population, len(self.start))]
        return np.clip(drawn, self.low, self.high)

    def tell(self, candidates: np.ndarray, values: Sequence[Value]) -> None:
        """Update the search with the values of the candidates of the last `ask`."""
        if len(candidates) != len(values):
            raise ConfigError(f"{len(values)} values for {len(candidates)} candidates")
        order = sorted(range(len(values)), key=values.__getitem__, reverse=True)  # stable: the earlier wins a tie
        if self.best is None or values[order[0]] > self.best_value:
            self.best, self.best_value = candidates[order[0]].copy(), values[order[0]]
        self._update(candidates, list(values), order)
        self.rounds += 1

    @abstractmethod
    def _draw(self, count: int) -> np.ndarray:
        """Return vectors [count, size], before clipping."""

    @abstractmethod
    def _update(self, candidates: np.ndarray, values: list[Value], order: list[int]) -> None:
        """Update the distribution; ``order`` lists candidates from best to worst."""

    @property
    @abstractmethod
    def spread(self) -> float:
        """Mean standard deviation of the distribution."""


class CEM(Searcher):
    """Cross-entropy method (Transformer², section 3.2): draw from a Gaussian, refit it to the elite.

    It keeps the share `ELITE` of the candidates and the weight `SMOOTH` of the old Gaussian. The standard deviation is
    at least `FLOOR`, so that a search with tied values does not freeze.
    """

    ELITE, SMOOTH, FLOOR = 0.2, 0.1, 0.02

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.mean = np.full(self.size, (self.low + self.high) / 2)
        self.std = np.full(self.size, 0.5)

    def _draw(self, count: int) -> np.ndarray:
        return self.random.normal(self.mean, self.std, (count, self.size))

    def _update(self, candidates: np.ndarray, values: list[Value], order: list[int]) -> None:
        elite = candidates[order[: max(2, round(self.ELITE * len(order)))]]
        self.mean = self.SMOOTH * self.mean + (1 - self.SMOOTH) * elite.mean(0)
        self.std = np.maximum(self.SMOOTH * self.std + (1 - self.SMOOTH) * elite.std(0), self.FLOOR)

    @property
    def spread(self) -> float:
        return float(self.std.mean())


class CMAES(Searcher):
    """CMA-ES of the ``cma`` package (Hansen). It receives ranks, so values may be tuples."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        cma = optional("cma", "'sigmix[adapt]'", "CMA-ES")
        # cma has no one-dimensional search
        self._middle = np.full(max(self.size, 2), (self.low + self.high) / 2)
        settings = {
            "seed": self.seed + 1, "popsize": self.population, "verbose": -9,
            "bounds": [self.low, self.high], "CMA_diagonal": self.size > 200,
        }  # fmt: skip
        self._cma = cma.CMAEvolutionStrategy(self._middle, 0.3 * (self.high - self.low), settings)
        self._drawn: list[np.ndarray] = []

    def _draw(self, count: int) -> np.ndarray:
        self._drawn = self._cma.ask(count)
        return np.stack(self._drawn)[:, : self.size]

    def _update(self, candidates: np.ndarray, values: list[Value], order: list[int]) -> None:
        starts = len(self.start) if self.rounds == 0 else 0
        vectors = [np.concatenate([one, self._middle[self.size :]]) for one in candidates[:starts]]
        vectors += self._drawn[: len(candidates) - starts]  # unclipped, as cma drew them
        ranks = np.argsort(order)
        self._cma.tell(vectors, ranks.astype(float).tolist())

    @property
    def spread(self) -> float:
        return float(np.mean(self._cma.stds))


class Swarm(Searcher):
    """Particle swarm after Model Swarms (arXiv 2410.11163): inertia, cognitive, social and repel terms.

    v ← (r_v φ_v v + r_p φ_p (p_i - x) + r_g φ_g (g - x) - r_w φ_w (g_worst - x)) / Σ r φ
    x ← x + λ v, with λ shrinking every round. p_i is the particle's own best, g the swarm's best and g_worst its worst;
    the r are drawn uniformly for every particle and round.

    ``coefficients`` are φ_v, φ_p, φ_g and φ_w, ``step`` is λ; ``noise`` is the standard deviation added to drawn
    starting positions, as a fraction of the bounds' distance.
    """

    SHRINK = 0.97  # factor of λ per round

    def __init__(self, *args: Any, noise: float = 0.05, **options: Any) -> None:
        super().__init__(*args, **options)
        self.coefficients = np.array([0.2, 0.3, 0.4, 0.1])
        self.step, self.noise = 1.0, noise
        self.positions: np.ndarray | None = None

    def _draw(self, count: int) -> np.ndarray:
        if self.positions is not None:
            return self.positions
        if not self.start:
            return self.random.uniform(self.low, self.high, (count, self.size))
        starts = np.stack(self.start)  # between random pairs of starts, as in Model Swarms
        pairs = self.random.integers(0, len(starts), (2, count))
        share = self.random.random((count, 1))
        mixed = share * starts[pairs[0]] + (1 - share) * starts[pairs[1]]
        return mixed + self.random.normal(0, self.noise * (self.high - self.low), mixed.shape)

    def _update(self, candidates: np.ndarray, values: list[Value], order: list[int]) -> None:
        if self.positions is None:
            self.own, self.own_values = candidates.copy(), list(values)
            self.velocity = self.random.permutation(candidates) - candidates
            self.worst, self.worst_value = candidates[order[-1]].copy(), values[order[-1]]
        for number, value in enumerate(values):
            if value > self.own_values[number]:
                self.own[number], self.own_values[number] = candidates[number], value
        if values[order[-1]] < self.worst_value:
            self.worst, self.worst_value = candidates[order[-1]].copy(), values[order[-1]]
        r = self.random.random((4, len(candidates), 1)) * self.coefficients[:, None, None]
        pull = r[1] * (self.own - candidates) + r[2] * (self.best - candidates) - r[3] * (self.worst - candidates)
        self.velocity = (r[0] * self.velocity + pull) / r.sum(0).clip(1e-12)
        self.positions = np.clip(candidates + self.step * self.velocity, self.low, self.high)
        self.step *= self.SHRINK

    @property
    def spread(self) -> float:
        return self.high - self.low if self.positions is None else float(self.positions.std(0).mean())


SEARCHERS: dict[str, type[Searcher]] = {"cem": CEM, "cma-es": CMAES, "swarm": Swarm}
