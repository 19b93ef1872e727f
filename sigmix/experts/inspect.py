"""Looking at experts: what `sigmix experts list | show | verify | diff` print. Every result is JSON-able.

Two experts are compared in two spaces. Gain space takes z - 1 as it is. Weight space takes s ⊙ (z - 1), which is the
change of the weight itself: U and V are orthonormal, so ⟨Δa, Δb⟩_F = Σ s² gₐ g_b.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sigmix.errors import ExpertError, SigmixError
from sigmix.experts.bank import Bank
from sigmix.experts.expert import Expert
from sigmix.experts.fingerprint import PROBES
from sigmix.experts.metadata import thaw
from sigmix.svf.linears import factors_of, linears


def listing(bank: Bank) -> list[dict[str, Any]]:
    """One row per expert: name, path, domain, description, base, verified, matrices, numbers, metrics, problem.

    A damaged expert has its ``problem`` filled in and nothing that could not be read, so one never hides the others.
    """
    rows = []
    for name in bank.names():
        row: dict[str, Any] = {"name": name, "path": str(bank.path(name)), "problem": None}
        try:
            rows.append(row | _summary(bank[name]))
        except SigmixError as error:
            rows.append(row | {"problem": str(error)})
    return rows


def show(expert: Expert, top: int = 5) -> dict[str, Any]:
    """One expert: metadata, size, statistics of its gains over all and per matrix, the matrices that it moves most.

    "Moves" is ‖Δ‖_F where sketches hold it, else ‖z - 1‖.
    """
    sketches = expert.meta.get("sketches") or {}
    sizes = expert.meta.get("matrices") or {}
    layers = {}
    for path, z in expert.z.items():
        change = {"weight_change": sketches[path]["norm"]} if path in sketches else {}
        layers[path] = {"shape": thaw(sizes.get(path)), "r": len(z), **_statistics(z.double() - 1), **change}
    key = "weight_change" if sketches else "norm"
    moved = sorted(layers, key=lambda path: -layers[path][key])[:top]
    every = torch.cat([z.double() - 1 for z in expert.z.values()])
    known = ("task", "objective", "seed", "commit", "license", "training", "carried_from")
    return {
        "name": expert.name,
        **_summary(expert),
        **{name: thaw(expert.meta.get(name)) for name in known},
        "bytes": 4 * every.numel(),
        "digest": expert.digest,
        "origin": expert.origin,
        "gain": _statistics(every),
        "top": [{"path": path, key: layers[path][key]} for path in moved],
        "layers": layers,
    }


def verify(path: str | os.PathLike[str], base: nn.Module | None = None) -> dict[str, Any]:
    """Check an expert's directory, and against a base if one is given; never raises for what is wrong with it.

    Returns:
        path, ok, name, verified (it knows its base), checked (what was looked at) and problems (in words, empty if ok).
        An expert that does not know its base is ok on its own, but not as proof that it belongs to ``base``.
    """
    report: dict[str, Any] = {
        "path": str(Path(path)), "ok": False, "name": None, "verified": False, "checked": [], "problems": [],
    }  # fmt: skip
    try:
        expert = Expert.from_pretrained(path)
        report |= {"name": expert.name, "verified": expert.verified, "checked": ["files", "values"]}
        if expert.verified:
            report["checked"].append("checksum")
        if base is not None:
            expert.check(base)
            report["checked"].append("matrices")
            if expert.verified:
                report["checked"] += ["fingerprint", "sketches"]
    except SigmixError as error:
        report["problems"].append(str(error))
    report["ok"] = not report["problems"]
    return report


def diff(a: Expert, b: Expert, base: nn.Module | None = None) -> dict[str, Any]:
    """How two experts differ. A matrix that only one of them adapts counts as zero gain in the other.

    Args:
        base: gives the singular values and so exact figures in weight space, per matrix too. Without it weight space is
            estimated from the sketches, over all matrices only: 8 probes a matrix, so the cosine of n matrices is
            uncertain by about 1/√(8n).

    Returns:
        a, b: names. identical: every z equal bit for bit. same_base: their fingerprints agree (None: one is unknown).
        gain, weight: each {"cosine", "norm_a", "norm_b", "distance"}, where distance is ‖a - b‖ / max(‖a‖, ‖b‖); weight
        also has "estimated"; it is None without a base or sketches. matrices: {path: {"gain": …, "weight": … or None}}.

    Raises:
        ExpertError: matrices of one name have different sizes, or an expert does not fit ``base``.
    """
    paths = sorted({*a.z, *b.z})
    gains = {path: _gains(a, b, path) for path in paths}
    matrices: dict[str, dict[str, Any]] = {
        path: {"gain": _compare(*pair), "weight": None} for path, pair in gains.items()
    }
    weight = None
    if base is not None:
        a.check(base, sketches=False)
        b.check(base, sketches=False)
        layers = linears(base)
        moved = {}
        for path, (left, right) in gains.items():
            s = factors_of(layers[path]).s.double().cpu()
            moved[path] = (s * left, s * right)
            matrices[path]["weight"] = _compare(*moved[path])
        weight = {**_compare(*_joined(moved)), "estimated": False}
    elif a.meta.get("sketches") and b.meta.get("sketches"):
        weight = _estimated(a.meta["sketches"], b.meta["sketches"], paths)
    prints = [(e.meta.get("base") or {}).get("fingerprint") for e in (a, b)]
    return {
        "a": a.name,
        "b": b.name,
        "identical": a.digest == b.digest,
        "same_base": prints[0] == prints[1] if all(prints) else None,
        "gain": _compare(*_joined(gains)),
        "weight": weight,
        "matrices": matrices,
    }


def _summary(expert: Expert) -> dict[str, Any]:
    meta = expert.meta
    return {
        "domain": meta.get("domain"),
        "description": meta.get("description"),
        "base": thaw(meta.get("base")),
        "verified": expert.verified,
        "matrices": len(expert.z),
        "numbers": sum(len(z) for z in expert.z.values()),
        "metrics": thaw(meta.get("metrics") or []),
    }


def _statistics(gain: torch.Tensor) -> dict[str, float]:
    return {
        "mean": float(gain.mean()),
        "std": float(gain.std(correction=0)),
        "min": float(gain.min()),
        "max": float(gain.max()),
        "norm": float(gain.norm()),
    }


def _gains(a: Expert, b: Expert, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = {len(expert.z[path]) for expert in (a, b) if path in expert.z}
    if len(sizes) > 1:
        raise ExpertError(
            f"experts {a.name!r} and {b.name!r} have z of different lengths for {path}: {sorted(sizes)}",
            remedy="compare experts of the same base",
        )
    size = sizes.pop()
    left, right = (e.gain(path).double() if path in e.z else torch.zeros(size).double() for e in (a, b))
    return left, right


def _joined(pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([left for left, _ in pairs.values()]), torch.cat([right for _, right in pairs.values()])


def _compare(left: torch.Tensor, right: torch.Tensor) -> dict[str, float | None]:
    return _figures(float(left.norm()), float(right.norm()), float(left @ right), float((left - right).norm()))


def _figures(norm_a: float, norm_b: float, inner: float, distance: float) -> dict[str, float | None]:
    scale = max(norm_a, norm_b)
    # the cosine with nothing is undefined, not zero
    cosine = max(-1.0, min(1.0, inner / (norm_a * norm_b))) if norm_a and norm_b else None
    return {"cosine": cosine, "norm_a": norm_a, "norm_b": norm_b, "distance": distance / scale if scale else 0.0}


def _estimated(first: Mapping[str, Any], second: Mapping[str, Any], paths: list[str]) -> dict[str, Any]:
    """Overall figures in weight space from the sketches: E[(qᵀAp)(qᵀBp)] = ⟨A, B⟩_F, and norms are stored exactly."""
    none = {"norm": 0.0, "values": (0.0,) * PROBES}
    pairs = [(first.get(path, none), second.get(path, none)) for path in paths]
    norm_a = sum(x["norm"] ** 2 for x, _ in pairs) ** 0.5
    norm_b = sum(y["norm"] ** 2 for _, y in pairs) ** 0.5
    inner = sum(u * v for x, y in pairs for u, v in zip(x["values"], y["values"], strict=True)) / PROBES
    distance = sum((u - v) ** 2 for x, y in pairs for u, v in zip(x["values"], y["values"], strict=True)) / PROBES
    return {**_figures(norm_a, norm_b, inner, distance**0.5), "estimated": True}
