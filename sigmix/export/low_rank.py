"""Weight change of a mixture as a low-rank product, ΔW = B A, from the cached decomposition.

With g = z - 1 and the square side of W = U diag(s) Vᵀ (`sigmix.svf.decomposition`):

    out >= in:  ΔW = W V diag(g) Vᵀ    A = V_kᵀ        B = W V_k diag(g_k)
    out < in:   ΔW = U diag(g) Uᵀ W    A = U_kᵀ W      B = U_k diag(g_k)

Component i contributes a matrix of norm |sᵢgᵢ|, orthogonal to the others, so the best k are the largest |sᵢgᵢ|
(Eckart and Young) and the squared error is the sum of the others' squares: no second SVD is needed, and the error is
exact before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from sigmix.errors import ConfigError
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix
from sigmix.export.base import BaseCheckpoint
from sigmix.export.model_card import record
from sigmix.models.weights import shape

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's ``--max-lora-rank`` (``MaxLoRARanks`` in ``vllm/config/lora.py``, as of November 2026)."""


def vllm_rank(rank: int) -> int:
    """Return the smallest of `VLLM_RANKS` that is at least ``rank``.

    Raises:
        ConfigError: there is none.
    """
    for allowed in VLLM_RANKS:
        if allowed >= rank:
            return allowed
    raise ConfigError(
        f"vLLM supports LoRA ranks up to {VLLM_RANKS[-1]}, not {rank}",
        remedy=f"use --rank {VLLM_RANKS[-1]}, or export a merged checkpoint, which is exact",
    )


def check_rank(rank: int | None, error: float | None) -> None:
    """Raise `ConfigError` for a rank and an error that `LowRank.set_ranks` cannot use."""
    if rank is not None and error is not None:
        raise ConfigError("rank and error exclude each other", remedy="give one of --rank and --error")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank must be at least 1, not {rank}")
    if error is not None and not 0 <= error < 1:
        raise ConfigError(f"error must be a share of the change in [0, 1), not {error}")


@dataclass
class LowRank:
    """Low-rank factors of a mixture on a base; build with `from_mix`.

    Attributes:
        z: {path: float32 [r]} of the changed matrices. energy: {path: float64 [r]}, (s (z - 1))².
        weight_energy: ‖W‖² of all those matrices. ranks: {path: k}; exact until `set_ranks`.
        pad: rank that all factors are padded to with zeros; 0: none.
    """

    base: BaseCheckpoint
    mix: Mix
    experts: list[Expert]
    z: dict[str, torch.Tensor]
    energy: dict[str, torch.Tensor] = field(default_factory=dict)
    weight_energy: float = 0.0
    ranks: dict[str, int] = field(default_factory=dict)
    pad: int = 0

    @classmethod
    def from_mix(
        cls, base: BaseCheckpoint, mix: Mix, bank: Mapping[str, Expert], progress: Callable[[], None] = lambda: None
    ) -> LowRank:
        """Check the experts and read the singular values; ranks are exact.

        Args:
            progress: called for every matrix.

        Raises:
            ConfigError: the mixture changes no weight. Others: see `BaseCheckpoint.z`.
        """
        low = cls(base, mix, [bank[name] for name in mix.weights], base.z(mix, bank))
        for path, z in low.z.items():
            s = base.check_sketches(low.experts, path, base.layer(path)).s.double().cpu()
            low.energy[path] = (s * (z.double() - 1)) ** 2
            low.weight_energy += float((s**2).sum())
            progress()
        low.ranks = low.exact
        if not any(low.ranks.values()):  # also where only singular values of 0 change
            raise ConfigError(f"the mixture {mix.id} changes no weight of {base.name}", remedy="name an expert")
        return low

    @property
    def exact(self) -> dict[str, int]:
        """{path: number of components that the mixture changes}."""
        return {path: int((energy > 0).sum()) for path, energy in self.energy.items()}

    # ------------------------------------------------------------------ ranks

    def set_ranks(self, rank: int | None = None, error: float | None = None, vllm: bool = False) -> None:
        """Choose the ranks.

        Args:
            rank: maximum rank of every matrix; None: exact.
            error: keep the fewest components with ‖ΔW - BA‖ / ‖ΔW‖ over all matrices at most this: the largest |s g|
                of all matrices, so each has its own rank. With ``vllm``: the smallest of `VLLM_RANKS`.
            vllm: one rank for all matrices out of `VLLM_RANKS`, padded with zeros: ``rank`` is rounded up; with
                neither ``rank`` nor ``error`` the smallest exact one, or the largest there is.

        Raises:
            ConfigError: both are given, out of range, or no rank of vLLM's reaches them.
        """
        check_rank(rank, error)
        self.pad = 0
        if not vllm:
            self.ranks = self._at_most(rank) if error is None else self._within(error)
        elif error is None:
            self.pad = vllm_rank(min(max(self.exact.values()), VLLM_RANKS[-1]) if rank is None else rank)
            self.ranks = self._at_most(self.pad)
        else:
            for allowed in VLLM_RANKS:
                self.ranks = self._at_most(allowed)
                if self.error <= error:
                    self.pad = allowed
                    return
            raise ConfigError(
                f"the error at vLLM's largest rank, {VLLM_RANKS[-1]}, is {self.error:.2%} of the change, above "
                f"{error:.2%}",
                remedy="allow a larger --error, or export a merged checkpoint, which is exact",
            )

    def _at_most(self, rank: int | None) -> dict[str, int]:
        return {path: k if rank is None else min(k, rank) for path, k in self.exact.items()}

    def _within(self, error: float) -> dict[str, int]:
        energy = torch.cat(list(self.energy.values()))
        lost = energy.sort().values.cumsum(0)
        # sums of squares in float64 are off in the last digits; exact zeros are always dropped
        dropped = max(int((lost <= error**2 * float(lost[-1])).sum()), int((energy == 0).sum()))
        keep = torch.ones(len(energy), dtype=torch.bool)
        keep[energy.argsort()[:dropped]] = False
        parts = keep.split([len(one) for one in self.energy.values()])
        return {path: int(part.sum()) for path, part in zip(self.energy, parts, strict=True)}

    @property
    def dropped(self) -> int:
        """Number of components that the truncation drops; 0: exact."""
        return sum(self.exact.values()) - sum(self.ranks.values())

    # ------------------------------------------------------------------ error

    def _lost(self, path: str) -> float:
        return float(self.energy[path].sort(descending=True).values[self.ranks[path] :].sum())

    @property
    def error(self) -> float:
        """‖ΔW - BA‖ / ‖ΔW‖ over all matrices (Frobenius)."""
        total = sum(float(energy.sum()) for energy in self.energy.values())
        return (sum(map(self._lost, self.energy)) / total) ** 0.5

    @property
    def errors(self) -> dict[str, float]:
        """The same for each matrix; 0 where ΔW is 0."""
        totals = {path: float(energy.sum()) for path, energy in self.energy.items()}
        return {path: (self._lost(path) / total) ** 0.5 if total else 0.0 for path, total in totals.items()}

    def describe(self) -> dict[str, Any]:
        """Return the metadata of an export: `record`, ``components``, ``dropped``, ``error`` (of ‖ΔW‖),
        ``error_of_weights`` (of ‖W‖), ``worst`` [path, error], ``rank`` (largest), ``ranks`` {path: k}."""
        errors = self.errors
        worst = max(errors, key=errors.__getitem__)
        return {
            **record(self.base, self.mix, self.experts), "form": "lora", "components": sum(self.exact.values()),
            "dropped": self.dropped, "error": self.error,
            "error_of_weights": (sum(map(self._lost, self.energy)) / self.weight_energy) ** 0.5,
            "worst": [worst, errors[worst]], "rank": self.pad or max(self.ranks.values()),
            "ranks": dict(self.ranks),
        }  # fmt: skip

    # ------------------------------------------------------------------ factors

    @property
    def paths(self) -> list[str]:
        """Matrices with at least one component, in the model's order."""
        return [path for path in self.ranks if self.ranks[path] or self.pad]

    def shape(self, path: str) -> tuple[int, int, int]:
        """Return (rank, out, in) of a matrix's factors, padding included."""
        return (self.pad or self.ranks[path], *shape(self.base.linears[path]))

    def nbytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of all factors in a dtype."""
        return sum(rank * (rows + columns) * dtype.itemsize for rank, rows, columns in map(self.shape, self.paths))

    @torch.no_grad()
    def factors(self, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A [k, in] and B [out, k] of one matrix, float32."""
        layer = self.base.layer(path)
        factors = self.base.check_sketches([], path, layer)
        kept = self.energy[path].argsort(descending=True, stable=True)[: self.ranks[path]].sort().values
        gain = (self.z[path].double() - 1)[kept].float()
        short, weight = factors.short[:, kept].float(), layer.matrix().float()
        if factors.side == "in":
            a, b = short.T, (weight @ short) * gain
        else:
            a, b = short.T @ weight, short * gain
        extra = self.shape(path)[0] - len(kept)
        return F.pad(a, (0, 0, 0, extra)).contiguous(), F.pad(b, (0, extra)).contiguous()
