"""An expert's own basis on a quantized base.

Quantizing W to W_q rotates its singular vectors, so an expert trained on W means something else in the basis of W_q.
Two definitions are possible:

    own basis        W_q = U_q diag(s_q) V_qᵀ: the quantized base is a base of its own, with experts trained on it. This
                     is the default of a quantized `load_base`.
    original basis   y = W_q (x + V(g ⊙ Vᵀx)), or y + U(g ⊙ Uᵀy), with V or U of the original W. z = 1 is still W_q x,
                     bit for bit. With g ≠ 0 the change is W_q V diag(g) Vᵀ in place of W V diag(g) Vᵀ; its relative
                     error is about that of the quantized weights.

`use_original_basis` selects the second one. It streams the original checkpoint once, tensor by tensor, to compute its
fingerprint (so that exactly the experts made on it are accepted), to fill the decomposition cache, and to keep eight
probes of every weight, with which sketches are still checked. docs/large-models.md has measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sigmix.errors import ConfigError, ExpertError
from sigmix.experts.fingerprint import combined, left_probes
from sigmix.models import weights
from sigmix.models.multimodal import bare
from sigmix.svf.checkpoint import Checkpoint, Matrix, decompose_checkpoint
from sigmix.svf.decomposition import read_factors
from sigmix.svf.layer import SVFLinear
from sigmix.svf.linears import linears

ORIGINAL = "original"


@dataclass(frozen=True)
class Original:
    """The weights that a base was quantized from.

    Attributes:
        name, dtype, fingerprint: as experts record a base.
        left: {matrix path: float64 [8, r]}, see `sigmix.experts.fingerprint.left_probes`.
    """

    name: str
    dtype: str
    fingerprint: str
    left: dict[str, torch.Tensor]


def check_basis(basis: str, quantization: object) -> None:
    """Raise `ConfigError` unless ``basis`` is "own", or "original" with a quantized base."""
    if basis not in ("own", ORIGINAL):
        raise ConfigError(f"--basis is own or original, not {basis!r}")
    if basis == ORIGINAL and quantization is None:
        raise ConfigError("--basis original is for a quantized base", remedy="add --quantization int8, or leave it out")


def original_of(model: nn.Module) -> Original | None:
    """Return what `use_original_basis` recorded on a model, or None."""
    return getattr(bare(model), "sigmix_original", None)


def recorded_basis(model: nn.Module) -> dict[str, str]:
    """Return the basis as an expert's metadata records it; empty for the own basis."""
    return {} if original_of(model) is None else {"basis": ORIGINAL}


def check_recorded(expert: str, basis: str | None, model: nn.Module) -> None:
    """Raise `ExpertError` if an expert needs the original basis and ``model`` computes in its own.

    Args:
        basis: as recorded by the expert: "original", or None for the own basis.
    """
    if basis == ORIGINAL and original_of(model) is None:
        raise ExpertError(
            f"expert {expert!r} was trained in the basis of the original weights of this quantized base",
            remedy="call sigmix.experts.original_basis.use_original_basis(model), or add --basis original",
        )


def use_original_basis(model: nn.Module, each: Callable[[Matrix, bool], None] | None = None) -> Original:
    """Let a quantized base compute in the basis of the weights that it was quantized from.

    Args:
        model: from `load_base(…, quantization_config=…)`, adapted or not.
        each: called for every finished matrix, with whether it had to be decomposed.

    Raises:
        ConfigError: the base is not quantized. BaseModelError: its checkpoint cannot be streamed.
        OutputError: no room for the decompositions.
    """
    base: Any = bare(model)
    info = getattr(base, "sigmix_base", None) or {}
    if "quantization" not in info:
        raise ConfigError(
            "only a base quantized by load_base has an original basis",
            remedy="load_base(…, quantization_config='int8')",
        )
    checkpoint = Checkpoint(info["source"], info["dtype"], name=info["name"])
    quantized = {path: layer for path, layer in linears(base).items() if weights.kind(_inner(layer)) != weights.PLAIN}
    matrices = [matrix for matrix in checkpoint.matrices() if matrix.path in quantized]
    digests: dict[str, str] = {}
    left: dict[str, torch.Tensor] = {}

    def visit(matrix: Matrix, weight: torch.Tensor, digest: str) -> None:
        left[matrix.path] = left_probes(matrix.path, weight, read_factors(digest, matrix.shape))
        _inner(quantized[matrix.path]).sigmix_basis = digest  # type: ignore[assignment]
        if not matrix.transposed:  # a fingerprint hashes a parameter as it is stored
            digests[f"{matrix.path}.weight"] = digest

    decompose_checkpoint(checkpoint, matrices, progress=each, visit=visit)
    base.sigmix_original = Original(info["name"], info["dtype"], combined(checkpoint.digests(digests)), left)
    for layer in quantized.values():
        if isinstance(layer, SVFLinear):
            layer.forget_factors()
    return base.sigmix_original


def _inner(layer: nn.Module) -> nn.Module:
    return layer.get_base_layer() if isinstance(layer, SVFLinear) else layer
