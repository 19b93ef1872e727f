"""What a mix changes in each matrix as a product of two thin ones, ΔW = B A, from the factors that are there already.

With g = z - 1 and the square side of W = U diag(s) Vᵀ (`sigmix.svf.decomposition`):

    out >= in:  ΔW = W V diag(g) Vᵀ    A = V_kᵀ        B = W V_k diag(g_k)
    out < in:   ΔW = U diag(g) Uᵀ W    A = U_kᵀ W      B = U_k diag(g_k)

Component i contributes a matrix of norm |sᵢgᵢ|, orthogonal to the others, so the best k are the largest |sᵢgᵢ|
(Eckart and Young) and the squared error is the sum of the others' squares: no second SVD, and the error is known
before anything runs. Unlike our own truncated form a LoRA cannot hold a scale common to the dropped components.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sigmix.errors import ConfigError
from sigmix.experts.mix import Mix
from sigmix.export.model_card import record
from sigmix.export.source import Source

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as ``--max-lora-rank`` (``MaxLoRARanks`` in ``vllm/config/lora.py``, read in November 2026)."""


def vllm_rank(rank: int) -> int:
    """The smallest rank that vLLM takes, at least ``rank``.

    Raises:
        ConfigError: there is none.
    """
    for one in VLLM_RANKS:
        if one >= rank:
            return one
    raise ConfigError(
        f"vLLM takes LoRA ranks up to {VLLM_RANKS[-1]}, not {rank}",
        remedy=f"ask for {VLLM_RANKS[-1]}, or export a merged checkpoint, which loses nothing",
    )


def check_choice(rank: int | None, error: float | None) -> None:
    """Raise `ConfigError` for a rank and an error that `LowRank.choose` could not take, before anything is read."""
    if rank is not None and error is not None:
        raise ConfigError("a rank and an error cannot both be asked for", remedy="give one of --rank and --error")
    if rank is not None and rank < 1:
        raise ConfigError(f"a rank is 1 or more, not {rank}")
    if error is not None and not 0 <= error < 1:
        raise ConfigError(f"an error is a share of the change, 0 or more and below 1, not {error}")


@dataclass
class LowRank:
    """A mix on a base, with the ranks that were chosen.

    Attributes:
        source, mix, experts: what it is of.
        z: {path: float32 [r]} of the matrices that the mix moves. energy: {path: float64 [r]}, (s (z - 1))².
        weight_energy: ‖W‖² of all those matrices. ranks: {path: k}; `choose` sets them, exact ones at first.
        pad: rows that every pair of factors is filled up to with zeros; 0: none.
    """

    source: Source
    mix: Mix
    experts: list[Any]
    z: dict[str, torch.Tensor]
    energy: dict[str, torch.Tensor] = field(default_factory=dict)
    weight_energy: float = 0.0
    ranks: dict[str, int] = field(default_factory=dict)
    pad: int = 0

    @classmethod
    def of(
        cls, source: Source, mix: Mix, bank: Mapping[str, Any], progress: Callable[[], None] = lambda: None
    ) -> LowRank:
        """Check the experts, read the singular values, and choose the exact ranks.

        Args:
            progress: called for every matrix.

        Raises:
            ConfigError: the mix is the base, or changes nothing, as where all singular values that it moves are 0.
            Others: see `Source.z`.
        """
        z = source.z(mix, bank)
        if not z:
            raise ConfigError(
                f"the mix {mix.id} changes no weight, so there is no adapter to write", remedy="name an expert"
            )
        made = cls(source, mix, [bank[name] for name in mix.weights], z)
        for path, value in z.items():
            layer = source.layer(path)
            factors = source.check_sketches([one for one in made.experts if path in one.z], path, layer)
            s = factors.s.double().cpu()
            made.energy[path] = (s * (value.double() - 1)) ** 2
            made.weight_energy += float((s**2).sum())
            progress()
        made.ranks = made.exact
        if not any(made.ranks.values()):
            raise ConfigError(
                f"the mix {mix.id} moves singular values of 0 only, so there is no adapter to write",
                remedy="name another expert",
            )
        return made

    @property
    def exact(self) -> dict[str, int]:
        """{path: components that the mix moves at all}."""
        return {path: int((energy > 0).sum()) for path, energy in self.energy.items()}

    # ------------------------------------------------------------------ ranks

    def choose(self, rank: int | None = None, error: float | None = None, vllm: bool = False) -> None:
        """Set the ranks.

        Args:
            rank: at most so many components in every matrix; None: all.
            error: as few components as keep ‖ΔW - BA‖ / ‖ΔW‖ over all matrices at most this; the largest |s g| of all
                matrices are kept, so each gets its own rank. With ``vllm``: the smallest of `VLLM_RANKS` that does.
            vllm: one rank for all, of `VLLM_RANKS`, zeros filling up: ``rank`` is rounded up; with neither ``rank`` nor
                ``error`` the smallest that is exact, or the largest there is.

        Raises:
            ConfigError: both are given, cannot be, or no rank of vLLM's reaches them.
        """
        check_choice(rank, error)
        if vllm:
            self._choose_for_vllm(rank, error)
        elif error is not None:
            self.pad, self.ranks = 0, self._within(error)
        else:
            self.pad, self.ranks = 0, self._at_most(rank)

    def _choose_for_vllm(self, rank: int | None, error: float | None) -> None:
        if error is None:
            needed = min(max(self.exact.values()), VLLM_RANKS[-1]) if rank is None else rank
            self.pad = vllm_rank(needed)
            self.ranks = self._at_most(self.pad)
            return
        for one in VLLM_RANKS:
            self.ranks = self._at_most(one)
            if self.error <= error:
                break
        else:
            raise ConfigError(
                f"at vLLM's largest rank, {VLLM_RANKS[-1]}, the error is {self.error:.2%} of the change, above "
                f"{error:.2%}",
                remedy="allow a larger --error, or export a merged checkpoint, which loses nothing",
            )
        self.pad = one

    def _at_most(self, rank: int | None) -> dict[str, int]:
        return {path: k if rank is None else min(k, rank) for path, k in self.exact.items()}

    def _within(self, error: float) -> dict[str, int]:
        every = torch.cat(list(self.energy.values())).sort().values
        lost = every.cumsum(0)
        # float64 sums of squares are off in the last digits only; what is exactly zero is never kept
        dropped = int((lost <= error**2 * float(lost[-1])).sum())
        dropped = max(dropped, int((every == 0).sum()))
        order = torch.cat(list(self.energy.values())).argsort()
        keep = torch.ones(len(every), dtype=torch.bool)
        keep[order[:dropped]] = False
        parts = keep.split([len(energy) for energy in self.energy.values()])
        return {path: int(part.sum()) for path, part in zip(self.energy, parts, strict=True)}

    # ------------------------------------------------------------------ what it costs

    def _lost(self, path: str) -> float:
        energy = self.energy[path]
        return float(energy.sort(descending=True).values[self.ranks[path] :].sum())

    @property
    def error(self) -> float:
        """‖ΔW - BA‖ / ‖ΔW‖ over all matrices (Frobenius)."""
        total = sum(float(energy.sum()) for energy in self.energy.values())
        return (sum(map(self._lost, self.energy)) / total) ** 0.5

    @property
    def errors(self) -> dict[str, float]:
        """The same for each matrix; 0 where it does not change, its singular values being 0 where z is not 1."""
        totals = {path: float(energy.sum()) for path, energy in self.energy.items()}
        return {path: (self._lost(path) / total) ** 0.5 if total else 0.0 for path, total in totals.items()}

    def describe(self) -> dict[str, Any]:
        """What goes into figures and cards: `record`, ``components``, ``dropped``, ``error`` (of ‖ΔW‖),
        ``error_of_weights`` (of ‖W‖), ``worst`` [path, error], ``rank`` (largest), ``ranks`` {path: k}."""
        errors = self.errors
        worst = max(errors, key=errors.__getitem__)
        components, kept = sum(self.exact.values()), sum(self.ranks.values())
        lost = sum(map(self._lost, self.energy))
        return {
            **record(self.source, self.mix, self.experts),
            "form": "lora",
            "components": components,
            "dropped": components - kept,
            "error": self.error,
            "error_of_weights": (lost / self.weight_energy) ** 0.5,
            "worst": [worst, errors[worst]],
            "rank": self.pad or max(self.ranks.values()),
            "ranks": dict(self.ranks),
        }

    # ------------------------------------------------------------------ factors

    def size(self, path: str) -> tuple[int, int, int]:
        """(rank, out, in) of a matrix's pair, filled up."""
        linear = self.source.linears[path]
        weight: Any = linear.weight
        out, into = weight.shape[::-1] if hasattr(linear, "nf") else weight.shape
        return self.pad or self.ranks[path], int(out), int(into)

    @property
    def paths(self) -> list[str]:
        """Matrices that keep at least one component, in the model's order."""
        return [path for path in self.ranks if self.ranks[path] or self.pad]

    @torch.no_grad()
    def factors(self, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [k, in] and B [out, k] of one matrix, float32."""
        layer = self.source.layer(path)
        factors = self.source.check_sketches([], path, layer)
        rank, _, _ = self.size(path)
        chosen = self.energy[path].argsort(descending=True, stable=True)[: self.ranks[path]].sort().values
        gain = (self.z[path].double() - 1)[chosen].float()
        short, weight = factors.short[:, chosen].float(), layer.matrix().float()
        if factors.side == "in":
            a, b = short.T, (weight @ short) * gain
        else:
            a, b = short.T @ weight, short * gain
        extra = rank - len(chosen)
        if extra:
            a = torch.nn.functional.pad(a, (0, 0, 0, extra))
            b = torch.nn.functional.pad(b, (0, extra))
        return a.contiguous(), b.contiguous()
