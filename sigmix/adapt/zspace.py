"""Searching z itself, not mixing weights: every vector is a whole expert, near those that there are.

After Model Swarms (arXiv 2410.11163), where the particles are models. They start at the experts and between pairs of
them, and the result is a new expert.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sigmix.errors import ConfigError
from sigmix.experts.expert import Expert
from sigmix.experts.layout import Layout
from sigmix.experts.mix import Mix

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
