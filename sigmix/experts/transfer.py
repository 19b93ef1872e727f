"""Experts carried to another model: z that was learnt on a text model, put into a vision model's language backbone.

The paper evaluates OK-VQA with experts trained on text (section 4). z means something only in the singular vectors of
the weights that it was made on, so what an expert does in the other model is compared first, matrix by matrix: by its
sketches, which hold what it did where it was made (`sigmix.experts.fingerprint`), or by the weights themselves where
the old
base is at hand. Where the backbone is the same, the carried expert is the same change of the same weights. A LLaVA
usually tuned its language model, so there it is not: such an expert is refused, unless it is carried on purpose, in the
order of the singular values, as in the paper's Table 5. It says so in its metadata:

    carried_from    {"name", "base", "fingerprint", "digest", "basis": "same" | "differs", "deviation", "metrics"}

Figures that were measured on the old base stay under ``carried_from``: the carried expert has none of its own yet.
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
    """How far the same z changes another model's weights otherwise.

    Attributes:
        deviations: {path in the old base: ‖Δ - Δ'‖ or ‖W - W'‖ as a share of the larger norm, see ``by``}.
        by: "sketches" or "weights".
    """

    deviations: Mapping[str, float]
    by: str

    @property
    def same(self) -> bool:
        """Whether every matrix is the same, within what two honest decompositions differ by."""
        return max(self.deviations.values()) <= TOLERANCE

    def figures(self) -> dict[str, Any]:
        """by, median, largest, where (the matrix of the largest), same (matrices within tolerance), matrices."""
        worst = max(self.deviations, key=self.deviations.__getitem__)
        return {
            "by": self.by, "median": statistics.median(self.deviations.values()), "largest": self.deviations[worst],
            "where": worst, "same": sum(one <= TOLERANCE for one in self.deviations.values()),
            "matrices": len(self.deviations), "tolerance": TOLERANCE,
        }  # fmt: skip


def carry(
    expert: Expert, model: nn.Module, *, base: nn.Module | None = None, force: bool = False, name: str | None = None
) -> Expert:
    """An expert as one of another model, sealed to that model.

    Args:
        model: where it goes: a vision-language model, whose language backbone is meant, or a text model.
        base: the base that it was made on: its weights are compared. None: the expert's sketches are.
        force: carry it although the weights differ.
        name: of the carried expert; default: the same.

    Raises:
        ExpertError: a matrix that the model has not, or of another size; weights that differ, or cannot be compared
            (an expert without sketches, and no ``base``), unless ``force``. FingerprintError: not made on ``base``.
    """
    paths = paths_in(expert.z, model, expert.name)
    layers = linears(model)
    for path, other in paths.items():
        shape = shape_of(layers[other])
        if len(expert.z[path]) != min(shape):
            raise ExpertError(
                f"expert {expert.name!r} cannot go to this model: z of {path} has {len(expert.z[path])} components, "
                f"and {other} is {'×'.join(map(str, shape))}",
                remedy="choose a model whose language backbone has the same sizes",
            )
    found = compare(expert, model, base, paths)
    if not force and (found is None or not found.same):
        raise ExpertError(_refusal(expert, model, found), remedy="carry it on purpose with --force (force=True)")
    mine = thaw(expert.meta.get("base") or {})
    meta = {k: v for k, v in thaw(expert.meta).items() if k not in ("base", "matrices", "sketches", "metrics")}
    meta["carried_from"] = {
        "name": expert.name, "base": mine.get("name"), "fingerprint": mine.get("fingerprint"), "digest": expert.digest,
        "basis": "same" if found is not None and found.same else "differs",
        "deviation": None if found is None else found.figures(), "metrics": thaw(expert.meta.get("metrics", [])),
    }  # fmt: skip
    return Expert(name or expert.name, {other: expert.z[path] for path, other in paths.items()}, meta).sealed(model)


def paths_in(paths: Iterable[str], model: nn.Module, owner: str = "the expert") -> dict[str, str]:
    """{path in a text model: path of the same matrix in ``model``}: what follows the backbone's own path is the same.

    Raises:
        ExpertError: a matrix that the backbone has not.
    """
    wanted = list(paths)
    inside = backbone(bare(model))
    root = base_path(inside[0]) + "." if inside is not None else ""
    there = [path for path in linears(model) if path.startswith(root)]
    heads = ["", *_beginnings([path.removeprefix(root) for path in there])]
    # a text model calls its layers model.layers, a backbone inside another model layers: they share what follows
    cuts = ["", *_beginnings(wanted)]
    maps = [{path: f"{root}{head}{path.removeprefix(cut)}" for path in wanted} for cut in cuts for head in heads]
    best = max(maps, key=lambda found: len(set(found.values()) & set(there)))
    if missing := [path for path, other in best.items() if other not in there]:
        raise ExpertError(
            f"expert {owner!r} adapts {missing[0]}, and the model has no such matrix"
            + (f" in its language backbone, {root[:-1]}" if root else "")
            + f"; {len(missing)} of {len(wanted)} are missing",
            remedy="choose a model whose language backbone is of the same architecture",
        )
    return best


def compare(
    expert: Expert, model: nn.Module, base: nn.Module | None = None, paths: Mapping[str, str] | None = None
) -> Comparison | None:
    """How alike the matrices are that an expert was made on and those of another model; None: nothing to go by.

    Args:
        base: compares weights; else sketches. paths: as `paths_in` gives them.

    Raises:
        FingerprintError, ExpertError: the expert was not made on ``base``.
    """
    paths = paths if paths is not None else paths_in(expert.z, model, expert.name)
    layers = linears(model)
    if base is not None:
        expert.check(base, sketches=False)
        old = linears(base)
        gaps = {path: _gap(matrix_of(old[path]), matrix_of(layers[other])) for path, other in paths.items()}
        return Comparison(gaps, "weights")
    stored = expert.meta.get("sketches") or {}
    if not expert.verified or not stored:
        return None
    gaps = {}
    for path, other in paths.items():
        layer = layers[other]
        # the probes are those of the old path: the same probes, z and weight give the same eight numbers
        found = sketch(path, matrix_of(layer), factors_of(layer), expert.z[path])
        gaps[path] = deviation(Sketch.from_json(stored[path]), found)
    return Comparison(gaps, "sketches")


def _gap(old: torch.Tensor, new: torch.Tensor) -> float:
    if old.shape != new.shape:
        return float("inf")
    first, second = old.detach().float().cpu(), new.detach().float().cpu()
    scale = float(max(first.norm(), second.norm()))
    return float((first - second).norm()) / scale if scale else 0.0


def _beginnings(paths: list[str]) -> list[str]:
    """What all paths begin with before the first number, such as ``model.`` and ``model.layers.``, shortest first."""
    words = paths[0].split(".") if paths else []
    number = next((place for place, word in enumerate(words) if word.isdigit()), len(words) - 1)
    made = [".".join(words[:count]) + "." for count in range(1, number + 1)]
    return [one for one in made if all(path.startswith(one) for path in paths)]


def _refusal(expert: Expert, model: nn.Module, found: Comparison | None) -> str:
    where = f"{describe(model)['name']}"
    if found is None:
        return (
            f"expert {expert.name!r} has no sketches, so whether {where} has the weights that it was made on cannot be "
            "told without its base (--from BASE)"
        )
    figures = found.figures()
    what = "its weight changes" if found.by == "sketches" else "the weights"
    return (
        f"expert {expert.name!r} was made on {(expert.meta.get('base') or {}).get('name')}, and the language backbone "
        f"of {where} has other weights: {what} differ by {figures['median']:.2g} of their norm (median), by "
        f"{figures['largest']:.2g} at most ({figures['where']}); {figures['same']} of {figures['matrices']} matrices "
        "are the same"
    )
