"""Where a search looks: vectors of mixing weights α, and what they mean.

granularity     α for                         numbers
model           an expert                     K
layer           an expert in a layer          K × L
matrix          an expert at a matrix         K × matrices

Free weights stand for themselves, clamped to [low, high]. Normalised ones sum to 1 over the experts in every layer or
matrix (the paper's Σα = 1), by dividing by their sum; where all are zero they stay zero, which is the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sigmix.errors import ConfigError
from sigmix.experts.mix import LAYER, Mix

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
