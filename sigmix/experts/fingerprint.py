"""The fingerprint of a base: SHA-256 over the path, shape and values of every parameter.

It answers one question: is this the base that the expert was made on? Values are hashed as float32, so an exact upcast
(bfloat16 loaded as float32) is the same base, and a rounding (float32 loaded as bfloat16) is another one. A quantised
weight counts as its dequantised values, so a quantised base is another base than the one that it was made of, and an
offloaded weight as what lies on the disk.
"""

from __future__ import annotations

import hashlib
import math
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sigmix.errors import ExpertError, FingerprintError
from sigmix.models.weights import is_quantised
from sigmix.svf.decomposition import Factors, weight_digest
from sigmix.svf.linears import dtype_and_quantization, parameters, readers

SAMPLES = 64


# id of a tensor -> (the tensor, weakly, so that a reused id is noticed; its state when it was hashed; its digest)
_KNOWN: dict[int, tuple[weakref.ref, tuple, str]] = {}


def fingerprint(model: nn.Module, fresh: bool = False) -> str:
    """Hex SHA-256 of a base, the same whether it is plain, PEFT-wrapped, adapted or merged.

    Digests are remembered per parameter until it changes: an in-place operation, another storage, or other values at
    64 places spread over it (edits through ``.data`` leave no other trace; PEFT's merging of a LoRA is such an edit).

    Args:
        model: the base, in any of these states. Adapter parameters (z too) do not count; tied weights count once.
        fresh: read all values again, whatever is remembered.

    Raises:
        ExpertError: weights on the meta device.
    """
    found, elsewhere = parameters(model), readers(model)
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:  # hashlib releases the GIL
        digests = pool.map(lambda one: _digest(one, fresh, elsewhere.get(id(one))), found.values())
        pairs = zip(found.items(), digests, strict=True)
        return combined((name, tuple(parameter.shape), digest) for (name, parameter), digest in pairs)


def combined(parts: Iterable[tuple[str, tuple[int, ...], str]]) -> str:
    """The fingerprint of (name, shape, digest) of every parameter, sorted by name, tied ones once."""
    total = hashlib.sha256(b"sigmix-base-v1\n")
    for name, shape, digest in parts:
        total.update(f"{name} {shape} {digest}\n".encode())
    return total.hexdigest()


def short(full: str | None) -> str:
    """The first twelve digits of a fingerprint, for messages."""
    return full[:12] if full else "unknown"


def _digest(parameter: torch.Tensor, fresh: bool, read: Callable[[], torch.Tensor] | None) -> str:
    state = _state(parameter)
    known = _KNOWN.get(id(parameter))
    if not fresh and known is not None and known[0]() is parameter and known[1] == state:
        return known[2]
    digest = weight_digest(parameter if read is None else read())
    key = id(parameter)
    _KNOWN[key] = (weakref.ref(parameter, lambda _: _KNOWN.pop(key, None)), state, digest)
    return digest


def _state(parameter: torch.Tensor) -> tuple:
    about = parameter._version, parameter.dtype, tuple(parameter.shape)
    if parameter.is_meta:
        return about
    if is_quantised(parameter) and parameter.is_floating_point():  # torchao's: the numbers lie in tensors inside
        return *about, *(getattr(parameter, name).data_ptr() for name in parameter.__tensor_flatten__()[0])  # type: ignore[attr-defined]
    flat = parameter.detach().reshape(-1) if parameter.is_contiguous() else parameter.detach().flatten()
    sample = flat[:: max(1, flat.numel() // SAMPLES)][: SAMPLES + 1].float().cpu().numpy().tobytes()
    return *about, parameter.data_ptr(), sample


def foreign(name: str, mine: Mapping[str, Any], found: Mapping[str, Any]) -> FingerprintError:
    """The error for an expert that was made on another base, with what to do about it.

    Args:
        name: the expert's. mine, found: its base and the one at hand: name, dtype, fingerprint.
    """

    def shown(base: Mapping[str, Any]) -> str:
        dtype = f" in {base['dtype']}" if base.get("dtype") else ""
        return f"{base.get('name', 'an unnamed base')}{dtype} (fingerprint {short(base.get('fingerprint'))})"

    remedy = f"load the base that it was made on: load_base({mine.get('name')!r})"
    if mine.get("name") == found["name"]:
        remedy = "the name is the same, but the weights are not: "
        dtype, quantization = dtype_and_quantization(mine.get("dtype"))
        if quantization is not None and mine["dtype"] != found["dtype"]:
            remedy += f"load it as the expert had it, with dtype={dtype!r}, quantization_config={quantization!r}"
        elif " in " in found["dtype"]:
            remedy += (
                "this one is quantised; to use the expert in its own basis here, call "
                "sigmix.experts.original_basis.use_original_basis(model), or on the command line add --basis original"
            )
        elif mine.get("dtype") not in (None, found["dtype"]):
            remedy += f"load it with dtype={mine['dtype']!r}, in which the expert was made, or wider"
        else:
            remedy += "another revision, or weights changed after loading; load the base afresh"
    what = f"expert {name!r} was made on {shown(mine)}, but this base is {shown(found)}"
    return FingerprintError(what, remedy=remedy)


# --- Sketches: eight numbers per matrix that tell whether a z still means what it meant where it was trained.


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
