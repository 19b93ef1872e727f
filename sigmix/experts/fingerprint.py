"""Fingerprints of base models and sketches of experts.

The **fingerprint** is a SHA-256 over the path, shape and values of every parameter. Values are hashed as float32, so an
exact upcast (bfloat16 loaded as float32) is the same base and a rounding is another one. A quantized weight counts as
its dequantized values, an offloaded one as its values on disk.

A **sketch** holds 8 random projections qᵀ Δ p and the norm ‖Δ‖_F of an expert's change of a matrix,
Δ = U diag(s(z - 1)) Vᵀ. It detects a decomposition with other singular vectors than those that z was trained in.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sigmix.errors import ExpertError, FingerprintError
from sigmix.models.digests import parameter_digest
from sigmix.svf.decomposition import Factors
from sigmix.svf.linears import dtype_and_quantization, parameters, readers


def fingerprint(model: nn.Module, fresh: bool = False) -> str:
    """Return the hex SHA-256 of a base, the same whether it is plain, PEFT-wrapped, adapted or merged.

    Adapter parameters (z too) do not count; tied weights count once. Digests of unchanged parameters are remembered
    (`sigmix.models.digests`).

    Args:
        fresh: hash all values again.

    Raises:
        ExpertError: weights on the meta device.
    """
    weights, read = parameters(model), readers(model)
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:  # hashlib releases the GIL
        digests = pool.map(lambda one: parameter_digest(one, read.get(id(one)), fresh), weights.values())
        pairs = zip(weights.items(), digests, strict=True)
        return combined((name, tuple(parameter.shape), digest) for (name, parameter), digest in pairs)


def combined(parts: Iterable[tuple[str, tuple[int, ...], str]]) -> str:
    """Return the fingerprint of (name, shape, digest) of every parameter, sorted by name, tied ones once."""
    total = hashlib.sha256(b"sigmix-base-v1\n")
    for name, shape, digest in parts:
        total.update(f"{name} {shape} {digest}\n".encode())
    return total.hexdigest()


def short(full: str | None) -> str:
    """Return the first twelve digits of a fingerprint, for messages."""
    return full[:12] if full else "unknown"


def mismatch(name: str, recorded: Mapping[str, Any], present: Mapping[str, Any]) -> FingerprintError:
    """Return the error for an expert of another base.

    ``name`` is the expert's; ``recorded`` is its base, ``present`` the loaded one: name, dtype, fingerprint.
    """

    def describe(base: Mapping[str, Any]) -> str:
        dtype = f" in {base['dtype']}" if base.get("dtype") else ""
        return f"{base.get('name', 'an unnamed base')}{dtype} (fingerprint {short(base.get('fingerprint'))})"

    if recorded.get("name") != present["name"]:
        remedy = f"load the base that it was made on: load_base({recorded.get('name')!r})"
    else:
        remedy = "same name, other weights: "
        dtype, quantization = dtype_and_quantization(recorded.get("dtype"))
        if quantization is not None and recorded["dtype"] != present["dtype"]:
            remedy += f"load it with dtype={dtype!r}, quantization_config={quantization!r}"
        elif " in " in present["dtype"]:
            remedy += (
                "this one is quantized; to use the expert in the basis of the original weights, call "
                "sigmix.experts.original_basis.use_original_basis(model), or add --basis original"
            )
        elif recorded.get("dtype") not in (None, present["dtype"]):
            remedy += f"load it with dtype={recorded['dtype']!r}, in which the expert was made, or wider"
        else:
            remedy += "another revision, or weights changed after loading; load the base again"
    message = f"expert {name!r} was made on {describe(recorded)}, but this base is {describe(present)}"
    return FingerprintError(message, remedy=remedy)


PROBES = 8
TOLERANCE = 1e-3
"""Largest deviation that passes, as a share of ‖Δ‖_F. Measured on 20 matrices of SmolLM2-135M: another algorithm in
float64 deviates by at most 5e-8, LAPACK's float32 SVD by 3e-4. Half a unit in the last place of bfloat16 is 2e-3, so a
deviation that passes is below what a bfloat16 merge resolves. One average pair of 576 vectors, rotated by 45 degrees,
gives about 4e-2."""


@dataclass(frozen=True)
class Sketch:
    """Probes of the change of one matrix.

    Attributes:
        norm: ‖Δ‖_F = √Σ (s(z - 1))².
        values: the eight numbers qᵢᵀ Δ pᵢ.
    """

    norm: float
    values: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"norm": self.norm, "values": list(self.values)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], owner: str = "sigmix.json") -> Sketch:
        """Parse `to_json`'s result; ``owner`` is for the message.

        Raises:
            ExpertError: not a norm and eight finite numbers.
        """
        try:
            parsed = cls(float(value["norm"]), tuple(float(number) for number in value["values"]))
            if len(parsed.values) == PROBES and all(map(math.isfinite, (parsed.norm, *parsed.values))):
                return parsed
        except (KeyError, TypeError, ValueError):
            pass
        raise ExpertError(
            f"{owner}: a sketch has a norm and {PROBES} finite values, not {value!r}",
            remedy="restore sigmix.json, or seal the expert again",
        )


def sketch(
    path: str, weight: torch.Tensor, factors: Factors, z: torch.Tensor, dtype: torch.dtype = torch.float64
) -> Sketch:
    """Return the sketch of z [r] on a weight [out, in] with its factors; z = 1 gives zeros.

    Only one side of the factors is square: U diag(s) is W V, and V diag(s) is Wᵀ U. The probes are multiplied by W
    first, so the cost is 16 matrix-vector products, in ``dtype``.
    """
    first = left_probes(path, weight, factors, dtype)
    return sketch_of(path, first, (weight.shape[0], weight.shape[1]), factors, z)


def left_probes(path: str, weight: torch.Tensor, factors: Factors, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return qᵀ W V [8, r] if the short side is V, pᵀ Wᵀ U [8, r] if it is U: all a sketch needs of W."""
    left, right = (probe.to(dtype) for probe in probes(path, weight.shape[0], weight.shape[1]))
    values, basis = weight.detach().to(dtype).cpu(), factors.short.to(dtype).cpu()
    return ((left @ values) if factors.side == "in" else (right @ values.T)) @ basis


def sketch_of(path: str, first: torch.Tensor, shape: tuple[int, int], factors: Factors, z: torch.Tensor) -> Sketch:
    """Return the sketch of z [r] from the `left_probes` of a weight of this shape, without the weight."""
    left, right = probes(path, *shape)
    dtype = first.dtype
    second = (right if factors.side == "in" else left).to(dtype) @ factors.short.to(dtype).cpu()
    gain = z.detach().double().cpu() - 1
    norm = float((factors.s.double().cpu() * gain).norm())
    return Sketch(norm, tuple((first * gain * second).sum(1).tolist()))


def deviation(stored: Sketch, current: Sketch) -> float:
    """Return the estimated ‖Δ - Δ'‖_F as a share of the larger norm; 0 if both changes are zero."""
    scale = max(stored.norm, current.norm)
    if scale == 0:
        return 0.0
    squares = [(a - b) ** 2 for a, b in zip(stored.values, current.values, strict=True)]
    return math.sqrt(sum(squares) / PROBES) / scale


def compare(owner: str, path: str, stored: Sketch, current: Sketch, tolerance: float = TOLERANCE) -> float:
    """Return the `deviation` of one matrix.

    Args:
        owner: name of the expert, path: of the matrix, for the message.

    Raises:
        ExpertError: above ``tolerance``.
    """
    share = deviation(stored, current)
    if not share <= tolerance:
        raise ExpertError(
            f"expert {owner!r}: the singular vectors of {path} are not those that it was trained in: its weight change "
            f"deviates by {share:.2g} of its norm (tolerance {tolerance:.2g})",
            remedy="run `sigmix cache clear` to recompute the decomposition; if that does not help, this machine "
            "rotates near-equal singular values: copy the cache of the machine that trained the expert",
        )
    return share


def probes(path: str, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return standard normal probes q [8, rows] and p [8, columns], float64, determined by path and shape.

    They come from SHAKE-256 and Box-Muller, because a library's generator may change between versions.
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
