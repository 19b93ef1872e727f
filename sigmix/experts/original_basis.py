"""An expert's own basis on a quantised base.

Quantising W to W_q turns its singular vectors: an expert that was trained on W does not mean the same in the basis of
W_q, and its fingerprint says so. Two definitions are possible, and which one holds is a choice that somebody makes:

    own basis        W_q = U_q diag(s_q) V_qᵀ: the quantised base is a base of its own. Experts are trained on it and
                     held to it; nothing is approximate. This is what `load_base(…, quantization_config=…)` gives.
    original basis   y = W_q (x + V(g ⊙ Vᵀx)), or y + U(g ⊙ Uᵀy), with V or U of the original W: the expert turns the
                     very knobs that it was trained on, of a base that is a little off. z = 1 is still W_q x, bit for
                     bit; with g ≠ 0 the change is W_q V diag(g) Vᵀ in place of W V diag(g) Vᵀ, off by (W_q - W) V
                     diag(g) Vᵀ, so relative to the expert's change by about as much as quantising moved the weights.

`use_original_basis` makes the second choice for a model. The original checkpoint is streamed once, tensor by tensor:
its fingerprint is worked out, so that an expert made on it is accepted and no other, its decompositions are put into
the cache if they are not there, and eight probes of every weight are kept, so that an expert's sketches are still
compared with the basis that it was trained in. How far answers deviate is measured in docs/large-models.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sigmix.errors import ConfigError, ExpertError
from sigmix.experts.fingerprint import combined, left_probes
from sigmix.models import weights
from sigmix.models.multimodal import bare
from sigmix.svf.checkpoint import Matrix, Stream
from sigmix.svf.decomposition import read_factors, weight_digest
from sigmix.svf.layer import SVFLinear
from sigmix.svf.linears import linears

ORIGINAL = "original"
"""What an expert that was trained under `use_original_basis` records as its base's basis."""


@dataclass(frozen=True)
class Original:
    """What is known of the weights that a base was quantised from.

    Attributes:
        name, dtype, fingerprint: as experts record a base. left: {matrix path: float64 [8, r]}, see
            `sigmix.experts.fingerprint.left_probes`.
    """

    name: str
    dtype: str
    fingerprint: str
    left: dict[str, torch.Tensor]


def check_basis(basis: str, quantization: str | None) -> None:
    """Raise `ConfigError` unless ``basis`` is "own", or "original" of a quantised base."""
    if basis not in ("own", "original"):
        raise ConfigError(f"--basis is own or original, not {basis!r}")
    if basis == "original" and quantization is None:
        raise ConfigError("--basis original is for a quantised base", remedy="add --quantization int8, or leave it out")


def original_of(model: nn.Module) -> Original | None:
    """What `use_original_basis` has noted on a model, or None."""
    return getattr(bare(model), "sigmix_original", None)


def basis_of(model: nn.Module) -> dict[str, str]:
    """What an expert records of the basis that its base computes in: nothing of its own, as nearly all do."""
    return {} if original_of(model) is None else {"basis": ORIGINAL}


def check_recorded(expert: str, recorded: str | None, model: nn.Module) -> None:
    """Raise `ExpertError` if an expert was trained in the original basis of ``model``, which computes in its own.

    Args:
        recorded: "original", or None for the own basis and for experts that were saved before it was recorded.
    """
    if recorded == ORIGINAL and original_of(model) is None:
        raise ExpertError(
            f"expert {expert!r} was trained on this quantised base in the basis of its original weights, and the base "
            "computes in its own",
            remedy="call sigmix.experts.original_basis.use_original_basis(model), or on "
            "the command line: --basis original",
        )


def use_original_basis(model: nn.Module, each: Callable[[Matrix, bool], None] | None = None) -> Original:
    """Let a quantised base compute in the basis of the weights that it was quantised from; see the module.

    Args:
        model: from `load_base(…, quantization_config=…)`, adapted already or not.
        each: told of every matrix that is done, and whether it had to be decomposed.

    Raises:
        ConfigError: the base is not quantised. BaseModelError: its checkpoint cannot be streamed.
        OutputError: no room for the decompositions.
    """
    base: Any = bare(model)
    own = getattr(base, "sigmix_base", None) or {}
    if "quantization" not in own:
        raise ConfigError(
            "only a base that load_base quantised has an original basis",
            remedy="load_base(…, quantization_config='int8')",
        )
    stream = Stream(Path(own["source"]), own["name"], getattr(torch, own["dtype"]))
    quantised = {path: layer for path, layer in linears(base).items() if weights.kind(_inner(layer)) != weights.PLAIN}
    stream.matrices = [matrix for matrix in stream.matrices if matrix.path in quantised]
    digests: dict[str, str] = {}
    left: dict[str, torch.Tensor] = {}

    def visit(matrix: Matrix, weight: torch.Tensor, digest: str) -> None:
        left[matrix.path] = left_probes(matrix.path, weight, read_factors(digest, matrix.shape))
        _inner(quantised[matrix.path]).sigmix_basis = digest  # type: ignore[assignment]
        if not matrix.transposed:  # a fingerprint counts a parameter as it is stored
            digests[f"{matrix.path}.weight"] = digest

    stream.decompose(each=each, visit=visit)
    parts = []
    for name in stream.parameters:
        shape = tuple(stream.shape(name))
        digest = digests.get(name) or weight_digest(stream.tensor(name))
        parts.append((name, shape, digest))
    base.sigmix_original = Original(own["name"], own["dtype"], combined(parts), left)
    for layer in quantised.values():
        if isinstance(layer, SVFLinear):
            layer.forget_factors()
    return base.sigmix_original


def _inner(layer: nn.Module) -> nn.Module:
    return layer.get_base_layer() if isinstance(layer, SVFLinear) else layer
