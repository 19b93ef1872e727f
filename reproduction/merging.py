"""Merge adapters by PEFT's methods, KnOTS (arXiv 2410.19735), or TIES (arXiv 2306.01708) on the gains of SVF experts.

PEFT's ``linear`` sums the factors A and B apart, ``cat`` is the exact sum of the updates, ``svd`` that sum at the rank
of the adapters, and ``ties``, ``dare_ties`` and ``magnitude_prune`` prune the factors before they are summed. Values
are pruned within a matrix, also for KnOTS; its authors prune over the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft.utils.merge_utils import ties

from reproduction.blend import Blend
from reproduction.compose import REFINED, STEPS, UNIFORM, tune, validate
from reproduction.lab import Lab

METHODS: dict[str, tuple[str, ...]] = {
    "svf": ("ties",),
    "lora": ("linear", "cat", "svd", "ties", "dare_ties", "magnitude_prune", "knots"),
}
"""Methods by the policy of the adapters."""

PRUNING = ("ties", "dare_ties", "magnitude_prune", "knots")

DENSITIES = (0.5, 0.2, 0.8, 0.35, 0.65, 0.1, 0.9)
"""Shares of values that are kept; α is tuned at the first one."""

SCALES = (0.7, 1.0, 1.4, 2.0, 2.8)
"""Common α of rules that average what is left after pruning; ``magnitude_prune`` sums it, and has `UNIFORM`."""


class Merging(Blend):
    """Adapters of one kind on one base, merged by a method; arguments as in `Blend`.

    Attributes:
        rule: one of `METHODS`. density: share of values that are kept, of a method that prunes.
    """

    rule: str
    density: float

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._last: tuple[Any, dict[str, torch.Tensor]] | None = None

    @property
    def method(self) -> str:
        """Name of the rule, with its density."""
        return method_name(self.rule, self.density)

    def z(self, weights: Mapping[str, float]) -> dict[str, torch.Tensor]:
        """Return {path: z [r]}, gains merged by TIES."""
        zs, alphas = [self.experts[name].z for name in weights], torch.tensor(list(weights.values()))
        return {path: 1 + ties([z[path].float() - 1 for z in zs], alphas, self.density) for path in zs[0]}

    def merged(self, weights: Mapping[str, float]) -> Callable[[str], torch.Tensor]:
        """Return a function from a matrix's path to ΔW float32 [m, n], of LoRA; the last call's are kept."""
        key = (self.method, tuple(weights.items()))
        if self._last is None or self._last[0] != key:
            self._last = None  # free the memory first
            self._last = key, self._knots(weights) if self.rule == "knots" else self._peft(weights)
        return self._last[1].__getitem__

    def _peft(self, weights: Mapping[str, float]) -> dict[str, torch.Tensor]:
        pruned = {"density": self.density} if self.rule in PRUNING else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # DARE draws
            self.model.add_weighted_adapter(
                list(weights), list(weights.values()), "merged", self.rule, svd_full_matrices=False, **pruned
            )
        try:
            return {path: place.get_delta_weight("merged").float() for path, place in self.places.items()}
        finally:
            self.model.delete_adapter("merged")

    def _knots(self, weights: Mapping[str, float]) -> dict[str, torch.Tensor]:
        alphas, found = torch.tensor(list(weights.values())), {}
        for path, place in self.places.items():
            factors = [
                (place.lora_B[name].weight.detach() * place.scaling[name], place.lora_A[name].weight.detach())
                for name in weights
            ]
            found[path] = knots(factors, alphas, self.density)
        return found


def method_name(rule: str, density: float | None) -> str:
    """Return the name of a rule with its density, for the names of cells."""
    return f"{rule}-{density:g}" if rule in PRUNING else rule


def knots(factors: Sequence[tuple[torch.Tensor, torch.Tensor]], weights: torch.Tensor, density: float) -> torch.Tensor:
    """Return ΔW float32 [m, n]: TIES on the right singular vectors, times singular values, of [ΔW₁ … ΔWₖ].

    Args:
        factors: (B [m, r], A [r, n]) with ΔWᵢ = BᵢAᵢ. weights: α [k]. density: share of values that are kept.
    """
    columns, rows = zip(*factors, strict=True)
    left, core_left = torch.linalg.qr(torch.cat(columns, 1).double())
    right, core_right = torch.linalg.qr(torch.block_diag(*rows).double().T)
    u, s, vh = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
    parts = (s[:, None] * vh @ right.T).chunk(len(factors), 1)
    return (left @ u @ ties(list(parts), weights.double(), density)).float()


def tune_merging(lab: Lab, merging: Merging, tokenizer: Any, members: Sequence[str]) -> dict[str, Any]:
    """Tune α, and density where the rule has it, on as many validation measurements as `compose.tune` has.

    Returns:
        weights, density, accuracy, and tried: entries of `compose.validate` with their density.
    """
    merging.density = DENSITIES[0]
    if merging.rule not in PRUNING:
        return {**tune(lab, merging, tokenizer, members), "density": None}
    budget = len(UNIFORM) + (len(STEPS) * len(members) if len(members) <= REFINED else 0)
    scales: tuple[float, ...] = UNIFORM if merging.rule == "magnitude_prune" else SCALES
    if budget == len(scales):  # of many experts: three α, two densities
        scales = scales[:3] if scales is UNIFORM else scales[1:4]
    tried: list[dict[str, Any]] = []

    def best(alphas: Sequence[float], densities: Sequence[float]) -> tuple[float, float]:
        for alpha in alphas:
            for merging.density in densities:
                entry = validate(lab, merging, tokenizer, members, dict.fromkeys(members, alpha), False)
                tried.append({**entry, "alpha": alpha, "density": merging.density})
        top = max(tried, key=lambda one: (one["mean"], -one["alpha"]))
        return top["alpha"], top["density"]

    alpha, _ = best(scales, DENSITIES[:1])
    alpha, merging.density = best((alpha,), DENSITIES[1 : 1 + budget - len(scales)])
    accuracy = max(one["mean"] for one in tried)
    return {
        "weights": dict.fromkeys(members, alpha), "density": merging.density, "accuracy": accuracy, "tried": tried,
    }  # fmt: skip
