"""Transfer of experts to another model: z learned on a text model, used in a vision-language model's backbone.

The paper evaluates OK-VQA with experts trained on text (section 4). z is bound to the singular vectors of its weights,
so the matrices are compared first: by the expert's sketches, or by the weights if the old base is given. If the
backbone has the same weights, the carried expert makes the same change. A backbone that was fine-tuned is refused,
unless ``force`` pairs the singular values by index, as in the paper's Table 5. The result records its origin:

    carried_from    {"name", "base", "fingerprint", "digest", "basis": "same" | "differs", "deviation", "metrics"}

Metrics measured on the old base stay under ``carried_from``: the carried expert has none of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sigmix.errors import ExpertError
from sigmix.experts.expert import Expert
from sigmix.experts.fingerprint import TOLERANCE, Sketch, deviation, sketch
from sigmix.experts.metadata import thaw
from sigmix.models.multimodal import backbone, bare
from sigmix.svf.linears import describe, factors_of, linears, matrix_of, shape_of
from sigmix.svf.tuner import base_path


@dataclass(frozen=True)
class Comparison:
    """Relative differences between the matrices of two models.

    Attributes:
        deviations: {path in the old base: ‖Δ - Δ'‖ or ‖W - W'‖ as a share of the larger norm}.
        by: "sketches" (Δ) or "weights" (W).
    """

    deviations: Mapping[str, float]
    by: str

    @property
    def same(self) -> bool:
        """True if every matrix is the same within the tolerance of sketches."""
        return max(self.deviations.values()) <= TOLERANCE

    def figures(self) -> dict[str, Any]:
        """Return by, median, largest, where (matrix of the largest), same (matrices within tolerance), matrices."""
        worst = max(self.deviations, key=self.deviations.__getitem__)
        return {
            "by": self.by, "median": statistics.median(self.deviations.values()), "largest": self.deviations[worst],
            "where": worst, "same": sum(share <= TOLERANCE for share in self.deviations.values()),
            "matrices": len(self.deviations), "tolerance": TOLERANCE,
        }  # fmt: skip


def carry(
    expert: Expert, model: nn.Module, *, base: nn.Module | None = None, force: bool = False, name: str | None = None
) -> Expert:
    """Return the expert for another model, sealed to that model.

    Args:
        model: the target: a text model, or a vision-language model with a language backbone.
        base: the base that the expert was made on: compare its weights. None: compare the expert's sketches.
        force: carry it although the weights differ.
        name: of the carried expert; default: the same.

    Raises:
        ExpertError: a matrix is missing or has another size; or, unless ``force``, the weights differ or cannot be
            compared (no sketches and no ``base``). FingerprintError: not made on ``base``.
    """
    paths = map_paths(expert.z, model, expert.name)
    layers = linears(model)
    for path, target in paths.items():
        shape = shape_of(layers[target])
        if len(expert.z[path]) != min(shape):
            raise ExpertError(
                f"expert {expert.name!r} does not fit this model: z of {path} has {len(expert.z[path])} components, "
                f"and {target} is {'×'.join(map(str, shape))}",
                remedy="choose a model whose language backbone has the same sizes",
            )
    comparison = compare(expert, model, base, paths)
    same = comparison is not None and comparison.same
    if not same and not force:
        raise ExpertError(_difference(expert, model, comparison), remedy="to carry it anyway: --force (force=True)")
    meta = {k: v for k, v in thaw(expert.meta).items() if k not in ("base", "matrices", "sketches", "metrics")}
    meta["carried_from"] = {
        "name": expert.name, "base": expert.base.get("name"), "fingerprint": expert.base.get("fingerprint"),
        "digest": expert.digest, "basis": "same" if same else "differs",
        "deviation": None if comparison is None else comparison.figures(),
        "metrics": thaw(expert.meta.get("metrics", [])),
    }  # fmt: skip
    return Expert(name or expert.name, {target: expert.z[path] for path, target in paths.items()}, meta).sealed(model)


def map_paths(paths: Iterable[str], model: nn.Module, owner: str = "the expert") -> dict[str, str]:
    """Return {path in a text model: path of the same matrix in ``model``}; both share what follows the backbone's path.

    Raises:
        ExpertError: the backbone lacks a matrix.
    """
    inner = backbone(bare(model))
    root = base_path(inner[0]) + "." if inner is not None else ""
    targets = {_from_layers(path): path for path in linears(model) if path.startswith(root)}
    sources = list(paths)
    if missing := [path for path in sources if _from_layers(path) not in targets]:
        where = f"the model's language backbone, {root[:-1]}," if root else "the model"
        raise ExpertError(
            f"expert {owner!r} adapts {missing[0]}, but {where} has no such matrix; {len(missing)} of {len(sources)} "
            "are missing",
            remedy="choose a model whose language backbone is of the same architecture",
        )
    return {path: targets[_from_layers(path)] for path in sources}


def compare(
    expert: Expert, model: nn.Module, base: nn.Module | None = None, paths: Mapping[str, str] | None = None
) -> Comparison | None:
    """Compare the matrices that an expert was made on with another model's; None without sketches and base.

    Args:
        base: compare its weights, else the sketches. paths: from `map_paths`.

    Raises:
        FingerprintError, ExpertError: the expert was not made on ``base``.
    """
    paths = paths if paths is not None else map_paths(expert.z, model, expert.name)
    layers = linears(model)
    if base is not None:
        expert.check(base, sketches=False)
        old = linears(base)
        weights = {path: _distance(matrix_of(old[path]), matrix_of(layers[other])) for path, other in paths.items()}
        return Comparison(weights, "weights")
    stored = expert.meta.get("sketches") or {}
    if not expert.verified or not stored:
        return None
    deviations = {}
    for path, target in paths.items():
        # probes of the old path: equal probes, z and weight give equal sketches
        current = sketch(path, matrix_of(layers[target]), factors_of(layers[target]), expert.z[path])
        deviations[path] = deviation(Sketch.from_json(stored[path]), current)
    return Comparison(deviations, "sketches")


def _distance(old: torch.Tensor, new: torch.Tensor) -> float:
    if old.shape != new.shape:
        return float("inf")
    first, second = old.detach().float().cpu(), new.detach().float().cpu()
    scale = float(max(first.norm(), second.norm()))
    return float((first - second).norm()) / scale if scale else 0.0


def _from_layers(path: str) -> str:
    """Return a path from its list of layers on, such as ``layers.0.mlp.up_proj``, or its last part."""
    parts = path.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[max(number - 1, 0) :])


def _difference(expert: Expert, model: nn.Module, comparison: Comparison | None) -> str:
    target = describe(model)["name"]
    if comparison is None:
        return f"expert {expert.name!r} has no sketches to compare with {target}; its base is needed (--from BASE)"
    figures = comparison.figures()
    quantity = "its weight changes" if comparison.by == "sketches" else "the weights"
    return (
        f"expert {expert.name!r} was made on {expert.base.get('name')}, and the language backbone of {target} has "
        f"other weights: {quantity} differ by {figures['median']:.2g} of their norm (median), {figures['largest']:.2g} "
        f"at most ({figures['where']}); {figures['same']} of {figures['matrices']} matrices are the same"
    )
