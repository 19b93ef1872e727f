"""Low-rank subspaces of layer outputs, shared by all mixtures of a few experts.

A layer W [m, n] under gains g becomes W + D(g), D(g) = U diag(s ⊙ g) Vᵀ. Inputs do not fill the space: with their
second moment C = E[x xᵀ] = L Lᵀ (Cholesky), x = L ε, a replacement D̂ has the output error E‖(D - D̂)x‖² =
‖(D - D̂)L‖².
The replacement approximates D L, for all experts at once:

    D̂(g) = Q · core(g) · A,    core(g) = Qᵀ D(g) L R  [j, k],    A = Rᵀ L⁻¹  [k, n]

R [n, k] spans the leading input directions of the stacked D(gₖ) L, and Q [m, j] the leading output directions of what
is left of them; both have orthonormal columns, so the squared error is Σ‖D(gₖ)L‖² - Σ‖core(gₖ)‖², known before
anything runs. The core is linear in g and made for any g: core(g) = (QᵀU) diag(s ⊙ g) (VᵀLR). At full size D̂ = D.

Layers with one input are one group: their outputs lie below each other, each layer's in units of its own size of
output, so that queries and values count alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Tensor = torch.Tensor

RIDGE = 1e-4
"""Share of C's mean diagonal that is added to it, for inputs outside the calibration's span."""


@dataclass
class Subspace:
    """Replacement of a group of layers at its largest size; `cut` returns smaller ones.

    Attributes:
        inputs: A [k, n]. outputs: Q [Σ m, j], in the layers' own units again.
        left, right: per layer [j, r] and [r, k]; core(g) is the sum over the layers of left diag(g) right.
        captured: [j + 1, k + 1], Σ over experts ‖core‖² for every pair of sizes. total: Σ over experts ‖D L‖².
    """

    inputs: Tensor
    outputs: Tensor
    left: list[Tensor]
    right: list[Tensor]
    captured: Tensor
    total: float

    def lost(self, j: int, k: int) -> float:
        """Return the share of Σ‖D L‖² outside of j output and k input directions."""
        return max(1 - float(self.captured[j, k]) / self.total, 0.0) if self.total > 0 else 0.0

    def cut(self, j: int, k: int, gains: Sequence[Tensor], like: Tensor) -> LowRank:
        """Return the first j output and k input directions, for experts of gains [K, r] per layer.

        Args:
            like: tensor with the dtype and device of the result.
        """
        cores = torch.stack([core[:, :j, :k] for core in self.cores(gains)])
        parts = (self.inputs[:k], self.outputs[:, :j], cores)
        return LowRank(*(part.to(like.device, like.dtype).contiguous() for part in parts))

    def cores(self, gains: Sequence[Tensor]) -> list[Tensor]:
        """Return [K, j, k] per layer for gains [K, r]; exactly 0 for a gain of 0. The group's core is their sum."""
        return [(lt * gain[:, None, :]) @ rt for lt, rt, gain in zip(self.left, self.right, gains, strict=True)]


@dataclass
class LowRank:
    """Low-rank replacement of a group of L layers for K experts.

    Attributes:
        inputs: A [k, n]. outputs: Q [Σ m, j]. cores: [L, K, j, k], in one dtype.
    """

    inputs: Tensor
    outputs: Tensor
    cores: Tensor

    def core(self, alphas: Tensor) -> Tensor:
        """Return [B, j, k] of mixtures with weights float [B, K, L]; exactly 0 for the base."""
        j, k = self.cores.shape[2:]
        flat = self.cores.transpose(0, 1).reshape(-1, j * k).float()  # expert by expert, layer by layer
        return (alphas.float().flatten(1) @ flat).view(-1, j, k).to(self.cores.dtype)


def subspace(
    factors: Sequence[tuple[Tensor, Tensor]],
    gains: Sequence[Tensor],
    sizes: Sequence[Tensor],
    second: Tensor,
    j: int,
    k: int,
) -> Subspace:
    """Find the subspaces of a group of layers.

    Args:
        factors: per layer (left [m, r], right [n, r]), D(g) = left diag(g) rightᵀ; one of both has orthogonal columns
            and the other orthonormal ones.
        gains: per layer [K, r], one row per expert.
        sizes: per layer the mean squared norm of its output, a scalar.
        second: C [n, n] of the inputs, preferably in float64; the identity if unknown.
        j, k: output and input directions; capped by Σ m and n.
    """
    dtype, n = factors[0][0].dtype, len(second)
    # a few inputs can be thousands of times larger than the rest, and then float32 loses the small eigenvalues
    second = second.double()
    ridge = RIDGE * second.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    chol = torch.linalg.cholesky(second + ridge * torch.eye(n, dtype=second.dtype)).to(dtype)
    # each layer in units of its output's norm
    lefts = [left.to(dtype) / size.clamp_min(1e-30).sqrt() for (left, _), size in zip(factors, sizes, strict=True)]
    rights = [right.to(dtype).T @ chol for _, right in factors]  # [r, n]
    gains = [gain.to(dtype) for gain in gains]
    # leftᵀ left is diagonal, so Σ over experts of (D L)ᵀ (D L) is rightᵀ diag(…) right
    strength = [left.norm(dim=0) * gain.norm(dim=0) for left, gain in zip(lefts, gains, strict=True)]
    basis = _leading(torch.cat([r * s[:, None] for r, s in zip(rights, strength, strict=True)]), k)
    within = [right @ basis for right in rights]
    count = len(gains[0])
    pushed = [
        torch.cat([(left * gain[number]) @ inner for number in range(count)], dim=1)
        for left, gain, inner in zip(lefts, gains, within, strict=True)
    ]  # per layer [m, K k]
    directions = _leading(torch.cat(pushed).T, j).split([len(left) for left in lefts])
    made = Subspace(
        inputs=torch.linalg.solve_triangular(chol.T, basis, upper=True).T,
        outputs=torch.cat(
            [part * size.clamp_min(1e-30).sqrt() for part, size in zip(directions, sizes, strict=True)]
        ),
        left=[part.T @ left for part, left in zip(directions, lefts, strict=True)],
        right=within,
        captured=torch.zeros(0, 0),
        total=sum(
            float(torch.einsum("kr,rs,ks->", gain, (left.T @ left) * (right @ right.T), gain))
            for left, right, gain in zip(lefts, rights, gains, strict=True)
        ),
    )
    squares = torch.stack(made.cores(gains)).sum(0).square().sum(0)
    made.captured = torch.zeros(len(squares) + 1, squares.shape[1] + 1, dtype=torch.float64)
    made.captured[1:, 1:] = squares.double().cumsum(0).cumsum(1)
    return made


def _leading(matrix: Tensor, k: int) -> Tensor:
    """Return the leading k right singular vectors [q, min(k, q)] of [p, q], by the smaller Gram matrix."""
    p, q = matrix.shape
    k = min(k, q)
    if q <= p:
        return torch.linalg.eigh(matrix.T @ matrix)[1].flip(1)[:, :k]
    few = torch.linalg.eigh(matrix @ matrix.T)[1].flip(1)[:, : min(k, p)]
    found = matrix.T @ few
    # beyond the rank any directions are equivalent
    fill = torch.eye(q, k - found.shape[1], dtype=matrix.dtype)
    return torch.linalg.qr(torch.cat([found, fill], dim=1))[0]
