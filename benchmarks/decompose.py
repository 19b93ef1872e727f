"""``python -m benchmarks decompose``: decomposition of weights, cold, from the cache, and against LAPACK.

Base: every adapted matrix of the default base model, into an empty temporary cache (cold) and from it (warm: reading,
and hashing the weight that names the entry; files are in the page cache).

Large: one 4096×14336 float32 matrix, the shape of an 8-billion-parameter model's down projection, against
``torch.linalg.svd(full_matrices=False)``. Its singular values are those of the default base model's middle matrix of
the same kind, stretched to 4096 on a log scale. Its singular vectors are random: two rounds of random signs and a
Hartley transform on either side, which is exactly orthogonal and needs no QR.

Errors, in float64 on Gaussian probes X (in the mean the Frobenius norm's):
reconstruction ‖(W - U diag(s) Vᵀ)X‖ / ‖WX‖; orthogonality ‖(QᵀQ - I)X‖ / ‖X‖, the worse of U and V;
singular values max |s - s₀| / max s₀ against those that the matrix was built with.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.harness import Aim, device, interleaved, ratio, report, say
from sigmix.errors import ConfigError
from sigmix.models.default import DEFAULT
from sigmix.models.loading import load_base
from sigmix.svf.decomposition import cached_decompose, decompose, svd
from sigmix.svf.tuner import target_layers

AIMS = {"speedup_large": Aim(">=", 3.0), "error_ratio_large": Aim("<=", 2.0), "warm_seconds": Aim("<=", 2.0)}

LARGE = (4096, 14336)

PROBES = 32

WARM_READS = 3

Factors3 = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def run(
    repeats: int | None = None, dtype: str | None = None, base: str = DEFAULT, large: tuple[int, int] = LARGE
) -> dict[str, Any]:
    """Run the benchmark; see `harness.report` for the result.

    Args:
        repeats: decompositions of the large matrix by each, and of the base; default 1 (LAPACK takes about a minute).
        dtype: float32 or None. base: of the matrices. large: shape of the large matrix.
    """
    if dtype not in (None, "float32"):
        raise ConfigError(f"decompositions are float32, not {dtype}", remedy="leave --dtype out")
    repeats = 1 if repeats is None else repeats
    where = device("float32")
    model, _ = load_base(base, "float32", "cpu")
    weights = adapted(model)
    say(f"{len(weights)} matrices of {base}")
    cold, warm = base_seconds(list(weights.values()), repeats)
    like = middle(weights, large)
    spectrum = stretch(decompose(weights[like]).s, min(large))
    say(f"a {large[0]}×{large[1]} matrix with the spectrum of {like}")
    weight = with_spectrum(large, spectrum)
    for small in (svd, lapack):  # threads and code paths are ready before either is timed
        small(weight[:256, :512].contiguous())
    found: dict[str, Factors3] = {}

    def keep(name: str, work: Any) -> Any:
        def once(number: int) -> None:
            found.pop(name, None)
            found[name] = work(weight)

        return once

    seconds = interleaved({"sigmix": keep("sigmix", svd), "torch": keep("torch", lapack)}, repeats, warmup=0)
    error = {name: errors(weight, factors, spectrum) for name, factors in found.items()}
    kinds = ("reconstruction", "orthogonality")
    worst = max(error["sigmix"][kind] / error["torch"][kind] for kind in kinds)
    raw = {
        "base": {
            "name": base, "matrices": len(weights), "numbers": sum(min(w.shape) for w in weights.values()),
            "cold_seconds": cold, "warm_seconds_by_read": warm,
        },
        "large": {
            "shape": list(large), "spectrum_of": like, "s_max": float(spectrum[0]), "s_min": float(spectrum[-1]),
            "s_median": float(spectrum.median()), "seconds": seconds, "errors": error,
            "error_ratio_is": "the worse of reconstruction and orthogonality, sigmix over torch",
        },
    }  # fmt: skip
    ratios = {"speedup_large": ratio(seconds["torch"], seconds["sigmix"]), "error_ratio_large": [worst]}
    return report("decompose", where, ratios, AIMS, raw, {"warm_seconds": warm})


def lapack(weight: torch.Tensor) -> Factors3:
    """The peer: U, s, V of ``torch.linalg.svd``."""
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    return u, s, vt.T


def adapted(model: Any) -> dict[str, torch.Tensor]:
    """Weights [out, in] of the adapted layers by path."""
    return {path: layer.weight.detach() for path, layer in target_layers(model).items()}


def base_seconds(weights: list[torch.Tensor], repeats: int) -> tuple[list[float], list[float]]:
    """Seconds for all weights: cold, once per repeat with a fresh cache; warm, `WARM_READS` times per repeat."""
    cold: list[float] = []
    warm: list[float] = []
    for _ in range(repeats):
        with _empty_cache():
            for times in (cold, *[warm] * WARM_READS):
                start = time.perf_counter()
                for weight in weights:
                    cached_decompose(weight)
                times.append(time.perf_counter() - start)
        say(f"cold {cold[-1]:.3g} s, from the cache {warm[-1]:.3g} s")
    return cold, warm


@contextmanager
def _empty_cache() -> Iterator[None]:
    before = os.environ.get("SIGMIX_CACHE")
    with tempfile.TemporaryDirectory(prefix="sigmix-bench-") as folder:
        os.environ["SIGMIX_CACHE"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["SIGMIX_CACHE"]
            else:
                os.environ["SIGMIX_CACHE"] = before


def middle(weights: dict[str, torch.Tensor], shape: tuple[int, int]) -> str:
    """The path in the middle of the model's largest matrices that are wide or tall as ``shape`` is."""
    alike = {n: w for n, w in weights.items() if (w.shape[0] < w.shape[1]) == (shape[0] < shape[1])}
    alike = alike or weights
    most = max(w.numel() for w in alike.values())
    largest = [name for name, w in alike.items() if w.numel() == most]
    return largest[len(largest) // 2]


def stretch(s: torch.Tensor, r: int) -> torch.Tensor:
    """r singular values, float64, descending, that decay as ``s`` does (linear between its logarithms)."""
    logs = s.double().clamp_min(float(s.max()) * 1e-7).log()
    place = torch.linspace(0, len(logs) - 1, r, dtype=torch.float64)
    low = place.floor().long().clamp_max(max(len(logs) - 2, 0))
    high = (low + 1).clamp_max(len(logs) - 1)
    return torch.lerp(logs[low], logs[high], place - low).exp()


def with_spectrum(shape: tuple[int, int], s: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A float32 matrix with singular values ``s`` (to its rounding) and random singular vectors."""
    random = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(size, generator=random)[: len(s)] for size in shape)
    matrix = torch.zeros(shape, dtype=torch.float64)
    matrix[rows, columns] = s.double()
    return _rotated(_rotated(matrix, random).T, random).T.float().contiguous()


def _rotated(x: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """x Q for a random orthogonal Q; in blocks of rows, to bound memory."""
    size = x.shape[1]
    signs = [torch.randint(0, 2, (size,), generator=random).double() * 2 - 1 for _ in range(2)]
    out = torch.empty(x.shape, dtype=torch.float64)
    for start in range(0, len(x), 1024):
        block = x[start : start + 1024]
        for sign in signs:
            wave = torch.fft.fft(block * sign)
            block = (wave.real - wave.imag) / size**0.5  # Hartley: orthogonal and its own inverse
        out[start : start + 1024] = block
    return out


def errors(weight: torch.Tensor, factors: Factors3, exact: torch.Tensor) -> dict[str, float]:
    """Errors of U [m, r], s [r], V [n, r]; see the module."""
    u, s, v = (f.double() for f in factors)
    random = torch.Generator().manual_seed(1)
    x = torch.randn(weight.shape[1], PROBES, dtype=torch.float64, generator=random)
    right = weight.double() @ x
    left = u @ (s[:, None] * (v.T @ x))
    y = torch.randn(len(s), PROBES, dtype=torch.float64, generator=random)
    off = [float((q.T @ (q @ y) - y).norm() / y.norm()) for q in (u, v)]
    return {
        "reconstruction": float((right - left).norm() / right.norm()),
        "orthogonality": max(off),
        "singular_values": float((s - exact).abs().max() / exact.max()),
    }
