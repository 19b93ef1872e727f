"""Sketches: eight numbers per matrix that tell whether a z still means what it meant where it was trained.

z is written in the basis of its base. That basis is unique up to signs only where singular values are well separated;
elsewhere another LAPACK, thread count or device may return rotated vectors, and the same z then is another weight. So
an expert stores, for each matrix, eight bilinear probes of its delta Δ = U diag(s ⊙ (z - 1)) Vᵀ,

    qᵢᵀ Δ pᵢ,   i = 1…8,   q, p standard normal, fixed by the module's path and shape,

and its norm ‖Δ‖_F. On load they are computed again from the basis in use. Since E[(qᵀ E p)²] = ‖E‖_F² for any fixed E,
the root mean square of the differences estimates ‖Δ - Δ'‖_F itself: the weight error, not a proxy. Signs cancel in Δ,
so another sign convention changes nothing. The same probes make the inner product of two experts' sketches an estimate
of their deltas' inner product (`sigmix.experts.inspect`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sigmix.errors import ExpertError
from sigmix.svf.decompose import Factors

PROBES = 8

TOLERANCE = 1e-3
"""Largest deviation that passes, as a share of ‖Δ‖_F. Measured on 20 matrices of SmolLM2-135M against our own factors:
another algorithm in float64 deviates by at most 5e-8, LAPACK's float32 SVD by 3e-4, so every honest decomposition
passes. Half a unit in the last place of bfloat16 is 2e-3 (a basis rounded to it: 1e-3 to 3e-3), so what passes is less
than a bfloat16 merge could tell apart. One average pair of 576 vectors, turned by 45 degrees, gives about 4e-2."""


@dataclass(frozen=True)
class Sketch:
    """Probes of one matrix's delta.

    Attributes:
        norm: ‖Δ‖_F = √Σ (s(z - 1))².
        values: the eight numbers qᵢᵀ Δ pᵢ.
    """

    norm: float
    values: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return {"norm": self.norm, "values": list(self.values)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], owner: str = "sigmix.json") -> Sketch:
        """The inverse of `to_json`; ``owner`` is for the message.

        Raises:
            ExpertError: not a norm and eight finite numbers.
        """
        try:
            made = cls(float(value["norm"]), tuple(float(number) for number in value["values"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ExpertError(
                f"{owner}: not a sketch: {value!r}", remedy="restore sigmix.json, or seal the expert again"
            ) from error
        if len(made.values) != PROBES or not all(map(math.isfinite, (made.norm, *made.values))):
            raise ExpertError(
                f"{owner}: a sketch has a norm and {PROBES} finite numbers, not {value!r}",
                remedy="restore sigmix.json, or seal the expert again",
            )
        return made


def sketch(path: str, weight: torch.Tensor, factors: Factors, z: torch.Tensor) -> Sketch:
    """Sketch of z [r] on a weight [out, in] with its factors, in float64. z = 1 gives zeros.

    Only one side is square, so U diag(s) is W V (or V diag(s) is Wᵀ U), and the probes meet W before anything else:
    the cost is 16 products of W with a vector and no product of matrices.
    """
    return sketch_of(path, left_probes(path, weight, factors), (weight.shape[0], weight.shape[1]), factors, z)


def left_probes(path: str, weight: torch.Tensor, factors: Factors) -> torch.Tensor:
    """qᵀ W V [8, r] where the short side is V, pᵀ Wᵀ U [8, r] where it is U: all that a sketch needs of W; float64."""
    left, right = probes(path, weight.shape[0], weight.shape[1])
    wide, basis = weight.detach().double().cpu(), factors.short.double().cpu()
    return ((left @ wide) if factors.side == "in" else (right @ wide.T)) @ basis


def sketch_of(
    path: str, first: torch.Tensor, shape: tuple[int, int], factors: Factors, z: torch.Tensor
) -> Sketch:
    """Sketch of z [r] from the `left_probes` of a weight of this shape, without the weight."""
    left, right = probes(path, *shape)
    basis = factors.short.double().cpu()
    second = (right if factors.side == "in" else left) @ basis
    gain = z.detach().double().cpu() - 1
    values = (first * gain * second).sum(1)
    norm = float((factors.s.double().cpu() * gain).norm())
    return Sketch(norm, tuple(values.tolist()))


def deviation(stored: Sketch, found: Sketch) -> float:
    """Estimated ‖Δ - Δ'‖_F as a share of the larger norm; 0 where both deltas are zero."""
    scale = max(stored.norm, found.norm)
    if scale == 0:
        return 0.0
    squares = [(a - b) ** 2 for a, b in zip(stored.values, found.values, strict=True)]
    return math.sqrt(sum(squares) / PROBES) / scale


def compare(owner: str, path: str, stored: Sketch, found: Sketch, tolerance: float = TOLERANCE) -> float:
    """The deviation of one matrix.

    Args:
        owner: the expert's name, for the message. path: the matrix.

    Raises:
        ExpertError: it is above ``tolerance``; names the matrix and the figure.
    """
    share = deviation(stored, found)
    if not share <= tolerance:
        raise ExpertError(
            f"expert {owner!r}: the singular vectors of {path} are not those that it was trained in: its weight change "
            f"deviates by {share:.2g} of its own norm (tolerance {tolerance:.2g})",
            remedy="run `sigmix cache clear` to have the decomposition computed again; if that does not help, this "
            "machine rotates near-equal singular values: copy the cache of the machine that trained the expert",
        )
    return share


def probes(path: str, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard normal probes q [8, rows] and p [8, columns], float64, fixed by path and shape.

    They come from SHAKE-256 and Box-Muller, not from a library's generator, whose stream may change between versions.
    """
    numbers = torch.from_numpy(_normals(f"sigmix-sketch-v1:{path}:{rows}x{columns}", PROBES * (rows + columns)))
    left, right = numbers.split([PROBES * rows, PROBES * columns])
    return left.reshape(PROBES, rows), right.reshape(PROBES, columns)


def _normals(seed: str, count: int) -> np.ndarray:
    pairs = -(-count // 2)
    raw = np.frombuffer(hashlib.shake_256(seed.encode()).digest(8 * pairs), dtype="<u4").astype(np.float64)
    uniform = (raw + 0.5) / 2**32
    radius, angle = np.sqrt(-2 * np.log(uniform[:pairs])), 2 * np.pi * uniform[pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
