"""LinUCB (Li et al., A Contextual-Bandit Approach to Personalized News Article Recommendation, 2010): feedback teaches
which expert answers what.

The context x is what the probe (strategy D) says of a request: its probabilities by label. Every expert, and the base,
is an arm with a linear estimate of its reward, θ·x. To begin with θ is 1 at the arm's own label and 0 elsewhere, so the
bandit starts as the probe's choice; rewards move it from there.

Our own, because no library that was looked at fits: MABWiser has no prior for an arm, is stored as a pickle, which a
server should not load, and brings seaborn; contextualbandits takes rewards of 0 and 1 only and needs a compiler; river
calls its own LinUCB too slow for use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PRIOR = 4.0
"""Observations that the beginning counts as."""


EXPLORE = 0.3
"""Weight of what is not known yet; rewards are in [-1, 1]."""


class LinUCB:
    """Arms over labels.

    Args:
        labels: the context's names, d of them. own: {arm: its label, or None}.
    """

    def __init__(self, labels: Sequence[str], own: Mapping[str, str | None]) -> None:
        self.labels = list(labels)
        self._a: dict[str, np.ndarray] = {}
        self._b: dict[str, np.ndarray] = {}
        self.count: dict[str, int] = {}
        for arm, label in own.items():
            self.add(arm, label)

    def add(self, arm: str, label: str | None = None) -> None:
        """A new arm; one that is there stays as it is."""
        if arm in self._a:
            return
        start = np.array([float(name == label) for name in self.labels])
        self._a[arm], self._b[arm] = PRIOR * np.eye(len(start)), PRIOR * start
        self.count[arm] = 0

    def scores(self, x: np.ndarray, arms: Sequence[str]) -> dict[str, tuple[float, float]]:
        """{arm: (expected reward, how little is known: sqrt(xᵀ A⁻¹ x))} of a context [d]."""
        found = {}
        for arm in arms:
            solved = np.linalg.solve(self._a[arm], np.stack([self._b[arm], x], 1))
            found[arm] = float(solved[:, 0] @ x), math.sqrt(max(float(solved[:, 1] @ x), 0.0))
        return found

    def choose(self, x: np.ndarray, arms: Sequence[str]) -> tuple[str, dict[str, tuple[float, float]]]:
        """The arm with the highest upper bound, and all scores."""
        found = self.scores(x, arms)
        return max(found, key=lambda arm: found[arm][0] + EXPLORE * found[arm][1]), found

    def learn(self, arm: str, x: np.ndarray, reward: float) -> None:
        """Count a reward in [-1, 1]."""
        self.add(arm)
        self._a[arm] += np.outer(x, x)
        self._b[arm] += reward * x
        self.count[arm] += 1

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads."""
        arms = {
            arm: {"a": self._a[arm].tolist(), "b": self._b[arm].tolist(), "count": self.count[arm]} for arm in self._a
        }
        return {"labels": self.labels, "arms": arms}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LinUCB:
        """The inverse of `to_json`; raises ValueError, KeyError or TypeError for anything else."""
        made = cls(value["labels"], {})
        size = len(made.labels)
        for arm, state in value["arms"].items():
            a, b = np.array(state["a"], dtype=float), np.array(state["b"], dtype=float)
            if a.shape != (size, size) or b.shape != (size,) or not (np.isfinite(a).all() and np.isfinite(b).all()):
                raise ValueError(f"the state of {arm} is damaged")
            made._a[arm], made._b[arm], made.count[arm] = a, b, int(state["count"])
        return made
