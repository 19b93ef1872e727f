"""Decomposition of a weight, W = U diag(s) Vᵀ, and its cache on disk.

For W [m, n] (out×in) and r = min(m, n), one side of the decomposition is square: V [n, r] if m >= n, else U [m, r].
This **short side** is all that sigmix needs, because the long side always occurs scaled by s:

    U diag(s) = W V     (m >= n)          diag(s) Vᵀ = Uᵀ W     (m < n)

So only the short side and s are computed eagerly, cached and kept in memory. They come from the symmetric
eigenproblem of the smaller Gram matrix in float64 (WᵀW or WWᵀ): with float64 the squaring costs nothing that a float32
SVD has, since sqrt(eps64) < eps32, and it is several times faster than `torch.linalg.svd`.

What this does not do: it does not make the basis unique. Near-equal singular values let hardware, thread count and
library rotate their vectors; signs are canonical and the order is descending, and an expert carries a sketch that
tells a rotated basis from the one that it was trained in (`sigmix.experts.fingerprint`).
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
"""Part of the cache key: raise it whenever the numbers that `decompose` returns can change."""


SMALL = 3e-4
"""Singular values below this share of the largest are refined: there the Gram matrix alone loses float32 accuracy."""


FAINT = 0.03
"""Long-side vectors whose singular value is below this share of the largest need float64 and orthogonalisation."""


@dataclass(frozen=True)
class Factors:
    """Short side and singular values of a weight W [m, n], r = min(m, n).

    Attributes:
        short: float32 [r, r], orthogonal; V if ``side == "in"``, U if ``side == "out"``; columns are components.
        s: float32 [r], singular values, descending, >= 0.
        side: "in" if m >= n (`short` acts on inputs), "out" if m < n (`short` acts on outputs).
        checksum: of the cache entry; None without one.
    """

    short: torch.Tensor
    s: torch.Tensor
    side: str
    checksum: str | None = None

    def scaled_long(self, weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The long side scaled by s: W V = U diag(s) [m, r] if side is "in", (Uᵀ W)ᵀ = V diag(s) [n, r] otherwise."""
        weight = weight.to(torch.float32)
        short = self.short.to(weight.device)
        return (weight @ short if self.side == "in" else weight.T @ short).to(dtype)

    def usv(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """U [m, r], s [r], V [n, r] in float32.

        Columns whose singular value is zero to working precision are completed to an orthonormal set.
        """
        matrix = weight.float() if self.side == "in" else weight.float().T
        short = self.short.to(weight.device)
        long = matrix @ short
        # rounding of the product goes with the typical singular value, so only the fainter columns feel it
        faint = self.s <= FAINT * self.s.max() if len(self.s) else self.s.bool()
        norms = long.norm(dim=0, dtype=torch.float64)
        long = long / norms.float().clamp_min(torch.finfo(torch.float32).tiny)
        if faint.any():
            long[:, faint] = self._faint(matrix.double() @ short[:, faint].double(), long[:, ~faint].double()).float()
        return (long, self.s, self.short) if self.side == "in" else (self.short, self.s, long)

    def _faint(self, scaled: torch.Tensor, loud: torch.Tensor) -> torch.Tensor:
        """Unit columns in float64 from scaled ones, orthogonal to the loud ones and to each other.

        Rounding leaves a trace of the large components in the small ones, and nothing but rounding in null ones.
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
    """Decompose a weight [m, n] of any float dtype; the result is float32 on the weight's device.

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
    # sqrt(eigenvalue) is off by about eps64 * s_max² / (2 s): good to float32 above this line; the few components below
    # it are separated again by an SVD of W restricted to them
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
    """U [m, r], s [r], V [n, r] in float32 with W = U diag(s) Vᵀ; see `decompose`."""
    return decompose(weight).usv(weight)


def cache_path(digest: str) -> Path:
    """Where the factors of the weight with this digest lie, whether they exist or not."""
    return cache_dir() / "svd" / digest[:2] / f"{digest}-{METHOD}.safetensors"


def cached_decompose(weight: torch.Tensor, digest: str | None = None, cache: bool = True) -> Factors:
    """As `decompose`, read from the cache (memory-mapped) or computed once and written there.

    Args:
        weight: [m, n].
        digest: `weight_digest(weight)` if the caller has it.
        cache: False neither reads nor writes the cache.

    Raises:
        CacheError: the entry exists but is damaged.
        OutputError: the cache folder cannot be written.
    """
    if not cache:
        return decompose(weight)
    digest = digest or weight_digest(weight)
    path = cache_path(digest)
    if path.exists():
        found = read_factors(digest, (weight.shape[0], weight.shape[1]))
        return replace(found, short=found.short.to(weight.device), s=found.s.to(weight.device))
    factors = decompose(weight)
    tensors = {"short": factors.short.cpu(), "s": factors.s.cpu()}
    checksum = _checksum(tensors)
    with atomic_file(path) as temporary:
        # not save_file, which reports a full disk as an error of its own class that `atomic_file` cannot name
        temporary.write_bytes(save(tensors, metadata={"method": METHOD, "check": checksum}))
    return replace(factors, checksum=checksum)


def read_factors(digest: str, shape: tuple[int, int]) -> Factors:
    """The factors of the weight [m, n] with this digest, from the cache alone.

    Raises:
        CacheError: they are not there, or damaged.
    """
    path = cache_path(digest)
    if not path.exists():
        raise CacheError(
            f"the decomposition {path} is not in the cache", remedy="run `sigmix decompose --base …` of the original"
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
    with contextlib.suppress(OSError):  # a cache that is read-only simply keeps its time
        os.utime(path)
    return tensors["short"], tensors["s"], str(expected)


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    # an integer sum runs at memory speed, and any single damaged word changes it
    return ":".join(str(int(tensors[k].view(torch.int32).sum(dtype=torch.int64))) for k in ("short", "s"))


def _damaged(path: Path, why: str) -> CacheError:
    return CacheError(
        f"the cached decomposition {path} is damaged: {why}",
        remedy="delete this file; it is computed again when next needed",
    )
