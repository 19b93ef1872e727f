"""Decomposition of a weight, W = U diag(s) Vᵀ, and its cache on disk.

For W [m, n] (out×in) and r = min(m, n), one side of the decomposition is square: V [n, r] if m >= n, else U [m, r].
Only this **short side** is computed, because the long side always occurs scaled by s:

    U diag(s) = W V     (m >= n)          diag(s) Vᵀ = Uᵀ W     (m < n)

The short side and s come from the symmetric eigenproblem of the smaller Gram matrix (WᵀW or WWᵀ) in float64. It is as
accurate as a float32 SVD, since sqrt(eps64) < eps32, and several times faster than `torch.linalg.svd`.

The basis is not unique: vectors of near-equal singular values depend on hardware, thread count and library. Signs are
canonical and the order is descending; sketches in an expert detect a rotated basis (`sigmix.experts.fingerprint`).
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sigmix.errors import CacheError, ConfigError
from sigmix.models.digests import weight_digest
from sigmix.utils.cache import cache_dir
from sigmix.utils.io import atomic_file

METHOD = "gram64-v1"
"""Part of the cache key; change it with the numbers that `decompose` returns."""

SMALL = 3e-4
"""Singular values below this share of the largest are refined: the Gram matrix alone loses float32 accuracy there."""

FAINT = 0.03
"""Long-side vectors of singular values below this share of the largest need float64 and orthogonalization."""


@dataclass(frozen=True)
class Factors:
    """Short side and singular values of a weight W [m, n], r = min(m, n).

    Attributes:
        short: float32 [r, r], orthogonal; V if ``side == "in"``, U if ``side == "out"``; columns are components.
        s: float32 [r], singular values, descending, >= 0.
        side: "in" if m >= n, "out" if m < n.
        checksum: of the cache entry; None without one.
    """

    short: torch.Tensor
    s: torch.Tensor
    side: str
    checksum: str | None = None

    def usv(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return U [m, r], s [r], V [n, r] in float32; columns of zero singular values complete an orthonormal set."""
        matrix = weight.float() if self.side == "in" else weight.float().T
        short = self.short.to(weight.device)
        long = matrix @ short
        # the product's rounding error is that of a typical singular value, so it matters for faint columns only
        faint = self.s <= FAINT * self.s.max() if len(self.s) else self.s.bool()
        norms = long.norm(dim=0, dtype=torch.float64)
        long = long / norms.float().clamp_min(torch.finfo(torch.float32).tiny)
        if faint.any():
            long[:, faint] = self._faint(matrix.double() @ short[:, faint].double(), long[:, ~faint].double()).float()
        return (long, self.s, self.short) if self.side == "in" else (self.short, self.s, long)

    def _faint(self, scaled: torch.Tensor, loud: torch.Tensor) -> torch.Tensor:
        """Unit columns in float64 from scaled ones, orthogonal to ``loud`` and to each other.

        Rounding leaves a share of the large components in small ones, and only noise in null ones.
        """
        norms = scaled.norm(dim=0)
        units = scaled / norms.clamp_min(torch.finfo(torch.float64).tiny)
        null = norms <= 1e-9 * self.s.max()
        # null components start at random: unit vectors can all lie in the span of the others
        seeded = torch.Generator().manual_seed(0)
        start = torch.randn(len(units), int(null.sum()), dtype=torch.float64, generator=seeded)
        units[:, null] = start.to(units.device)
        for _ in range(2):
            units = units - loud @ (loud.T @ units)
        basis, triangle = torch.linalg.qr(units)
        return basis * torch.where(triangle.diagonal() < 0, -1.0, 1.0)


@torch.no_grad()
def decompose(weight: torch.Tensor) -> Factors:
    """Decompose a weight [m, n] of any float dtype in float32 on its device.

    Raises:
        ConfigError: the weight is not a matrix of finite floats.
    """
    if weight.ndim != 2 or not weight.numel() or not weight.is_floating_point():
        raise ConfigError(f"only float matrices can be decomposed, not {tuple(weight.shape)} of {weight.dtype}")
    rows, columns = weight.shape
    side = "in" if rows >= columns else "out"
    wide = weight.detach().double()
    gram = _gram(wide.T if side == "in" else wide)
    if not torch.isfinite(gram).all():
        raise ConfigError("the weight holds NaN or infinite values and cannot be decomposed")
    squares, short = torch.linalg.eigh(gram)
    s = squares.clamp_min(0).sqrt()
    # sqrt(eigenvalue) is off by about eps64 * s_max² / (2 s), below float32 precision except for small s; an SVD of W
    # restricted to those refines them
    small = s <= SMALL * s.max() if len(s) else s.bool()
    if small.any():
        tail = short[:, small]
        _, s[small], rotation = torch.linalg.svd(wide @ tail if side == "in" else wide.T @ tail, full_matrices=False)
        short[:, small] = tail @ rotation.T
    order = torch.argsort(s, descending=True, stable=True)
    short, s = short[:, order], s[order]
    peak = short.gather(0, short.abs().argmax(dim=0, keepdim=True))
    short = short * torch.where(peak < 0, -1.0, 1.0)
    return Factors(short.float().contiguous(), s.float(), side)


def _gram(rows: torch.Tensor) -> torch.Tensor:
    """rows @ rowsᵀ [r, r], computing only the upper triangle of blocks."""
    r = len(rows)
    block = max(256, -(-r // 8))
    gram = rows.new_empty(r, r)
    for i in range(0, r, block):
        gram[i : i + block, i:] = rows[i : i + block] @ rows[i:].T
        gram[i + block :, i : i + block] = gram[i : i + block, i + block :].T
    return gram


def svd(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return U [m, r], s [r], V [n, r] in float32 with W = U diag(s) Vᵀ; see `decompose`."""
    return decompose(weight).usv(weight)


def cache_path(digest: str) -> Path:
    """Return the cache file for the factors of the weight with this digest."""
    return cache_dir() / "svd" / digest[:2] / f"{digest}-{METHOD}.safetensors"


def cached_decompose(weight: torch.Tensor, digest: str | None = None, cache: bool = True) -> Factors:
    """Return `decompose` of a weight [m, n] from the cache (memory-mapped), or compute and cache it.

    Args:
        digest: `weight_digest(weight)`, if available. cache: False neither reads nor writes the cache.

    Raises:
        CacheError: the entry exists but is damaged.
        OutputError: the cache folder cannot be written.
    """
    if not cache:
        return decompose(weight)
    digest = digest or weight_digest(weight)
    path = cache_path(digest)
    if path.exists():
        factors = read_factors(digest, (weight.shape[0], weight.shape[1]))
        return replace(factors, short=factors.short.to(weight.device), s=factors.s.to(weight.device))
    factors = decompose(weight)
    tensors = {"short": factors.short.cpu(), "s": factors.s.cpu()}
    checksum = _checksum(tensors)
    with atomic_file(path) as temporary:
        # save_file raises its own class for a full disk
        temporary.write_bytes(save(tensors, metadata={"method": METHOD, "check": checksum}))
    return replace(factors, checksum=checksum)


def read_factors(digest: str, shape: tuple[int, int]) -> Factors:
    """Return the cached factors of the weight [m, n] with this digest.

    Raises:
        CacheError: missing or damaged.
    """
    path = cache_path(digest)
    if not path.exists():
        raise CacheError(
            f"the decomposition {path} is not in the cache", remedy="run sigmix decompose --base … on the original"
        )
    short, s, checksum = _read(path, min(shape))
    return Factors(short, s, "in" if shape[0] >= shape[1] else "out", checksum)


def _read(path: Path, r: int) -> tuple[torch.Tensor, torch.Tensor, str]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {"short": file.get_tensor("short"), "s": file.get_tensor("s")}
            expected = (file.metadata() or {}).get("check")
    except (SafetensorError, OSError, KeyError) as error:
        raise _damaged(path, str(error)) from error
    if tensors["short"].shape != (r, r) or tensors["s"].shape != (r,) or _checksum(tensors) != expected:
        raise _damaged(path, "its checksum does not match")
    with contextlib.suppress(OSError):  # a read-only cache keeps its times
        os.utime(path)
    return tensors["short"], tensors["s"], str(expected)


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    # an integer sum runs at memory speed and changes with any single word
    return ":".join(str(int(tensors[k].view(torch.int32).sum(dtype=torch.int64))) for k in ("short", "s"))


def _damaged(path: Path, why: str) -> CacheError:
    return CacheError(
        f"the cached decomposition {path} is damaged: {why}",
        remedy="delete this file; it is recomputed on the next use",
    )
