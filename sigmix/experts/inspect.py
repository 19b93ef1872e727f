"""Inspection of experts: the JSON-able results of `sigmix experts list | show | verify | diff`.

Two experts are compared in gain space, z - 1, and in weight space, s ⊙ (z - 1), which is the change of the weight: U
and V are orthonormal, so ⟨Δa, Δb⟩_F = Σ s² gₐ g_b.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sigmix.errors import ExpertError, SigmixError
from sigmix.experts.bank import Bank
from sigmix.experts.expert import Expert
from sigmix.experts.fingerprint import PROBES
from sigmix.experts.metadata import thaw
from sigmix.svf.linears import factors_of, linears


def listing(bank: Bank) -> list[dict[str, Any]]:
    """Return one row per expert: name, path, problem, and domain, description, positions, base, verified, matrices,
    numbers, metrics, requests (figures of the request statistics, or None).

    The row of a damaged expert has its name, path and ``problem`` only.
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
    """Return metadata, size, and statistics of the gains, overall and per matrix.

    ``top`` matrices are ranked by ‖Δ‖_F if the expert has sketches, else by ‖z - 1‖.
    """
    sketches = expert.meta.get("sketches") or {}
    sizes = expert.meta.get("matrices") or {}
    layers = {}
    for path, z in expert.z.items():
        change = {"weight_change": sketches[path]["norm"]} if path in sketches else {}
        layers[path] = {"shape": thaw(sizes.get(path)), "r": len(z), **_statistics(z.double() - 1), **change}
    key = "weight_change" if sketches else "norm"
    ranked = sorted(layers, key=lambda path: -layers[path][key])[:top]
    gains = torch.cat([z.double() - 1 for z in expert.z.values()])
    keys = ("task", "objective", "seed", "commit", "license", "training", "carried_from")
    return {
        "name": expert.name, **_summary(expert), **{key: thaw(expert.meta.get(key)) for key in keys},
        "bytes": 4 * gains.numel(), "digest": expert.digest, "origin": expert.origin, "gain": _statistics(gains),
        "top": [{"path": path, key: layers[path][key]} for path in ranked], "layers": layers,
    }  # fmt: skip


def verify(path: str | os.PathLike[str], base: nn.Module | None = None) -> dict[str, Any]:
    """Check an expert's folder, and against a base if one is given, without raising.

    Returns:
        path, ok, name, verified (a fingerprint is recorded), checked (list of checks) and problems (messages).
        An expert without a fingerprint can be ok, which does not prove that it was made on ``base``.
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
            report["checked"] += ["matrices", *(["fingerprint", "sketches"] if expert.verified else [])]
    except SigmixError as error:
        report["problems"].append(str(error))
    report["ok"] = not report["problems"]
    return report


def diff(a: Expert, b: Expert, base: nn.Module | None = None) -> dict[str, Any]:
    """Compare two experts. A matrix that only one of them adapts has zero gain in the other.

    Args:
        base: its singular values give exact figures in weight space, per matrix too. Without it they are estimated from
            the sketches, overall only: with 8 probes a matrix, the cosine over n matrices has an error of 1/√(8n).

    Returns:
        a, b: names. identical: positions and every z equal, bit for bit. positions: of both.
        same_base: equal fingerprints (None: one is missing).
        gain, weight: each {"cosine", "norm_a", "norm_b", "distance"} with distance ‖a - b‖ / max(‖a‖, ‖b‖); weight also
        has "estimated", and is None without a base or sketches. matrices: {path: {"gain": …, "weight": … or None}}.

    Raises:
        ExpertError: matrices of one path have different sizes, or an expert does not fit ``base``.
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
        changes = {}
        for path, (left, right) in gains.items():
            s = factors_of(layers[path]).s.double().cpu()
            changes[path] = (s * left, s * right)
            matrices[path]["weight"] = _compare(*changes[path])
        weight = {**_compare(*_concatenated(changes.values())), "estimated": False}
    elif a.meta.get("sketches") and b.meta.get("sketches"):
        weight = _estimate(a.meta["sketches"], b.meta["sketches"], paths)
    fingerprints = [expert.base.get("fingerprint") for expert in (a, b)]
    return {
        "a": a.name, "b": b.name, "identical": a.digest == b.digest, "positions": [a.positions, b.positions],
        "same_base": fingerprints[0] == fingerprints[1] if all(fingerprints) else None,
        "gain": _compare(*_concatenated(gains.values())), "weight": weight, "matrices": matrices,
    }  # fmt: skip


def _summary(expert: Expert) -> dict[str, Any]:
    return {
        "domain": expert.meta.get("domain"), "description": expert.meta.get("description"),
        "positions": expert.positions, "base": thaw(expert.meta.get("base")), "verified": expert.verified,
        "matrices": len(expert.z), "numbers": sum(len(z) for z in expert.z.values()),
        "metrics": thaw(expert.meta.get("metrics") or []),
        "requests": None if expert.requests is None else {
            **expert.requests.facts, "threshold": expert.requests.threshold, "base": expert.requests.base,
        },
    }  # fmt: skip


def _statistics(gain: Tensor) -> dict[str, float]:
    return {
        "mean": float(gain.mean()), "std": float(gain.std(correction=0)), "min": float(gain.min()),
        "max": float(gain.max()), "norm": float(gain.norm()),
    }  # fmt: skip


def _gains(a: Expert, b: Expert, path: str) -> tuple[Tensor, Tensor]:
    sizes = {len(expert.z[path]) for expert in (a, b) if path in expert.z}
    if len(sizes) > 1:
        raise ExpertError(
            f"experts {a.name!r} and {b.name!r} have z of different lengths for {path}: {sorted(sizes)}",
            remedy="compare experts of the same base",
        )
    size = sizes.pop()
    left, right = ((e.z[path] - 1).double() if path in e.z else torch.zeros(size).double() for e in (a, b))
    return left, right


def _concatenated(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    lefts, rights = zip(*pairs, strict=True)
    return torch.cat(lefts), torch.cat(rights)


def _compare(left: Tensor, right: Tensor) -> dict[str, float | None]:
    return _figures(float(left.norm()), float(right.norm()), float(left @ right), float((left - right).norm()))


def _figures(norm_a: float, norm_b: float, inner: float, distance: float) -> dict[str, float | None]:
    scale = max(norm_a, norm_b)
    # the cosine with a zero vector is undefined, not zero
    cosine = max(-1.0, min(1.0, inner / (norm_a * norm_b))) if norm_a and norm_b else None
    return {"cosine": cosine, "norm_a": norm_a, "norm_b": norm_b, "distance": distance / scale if scale else 0.0}


def _estimate(first: Mapping[str, Any], second: Mapping[str, Any], paths: list[str]) -> dict[str, Any]:
    """Estimate the figures in weight space from sketches: E[(qᵀAp)(qᵀBp)] = ⟨A, B⟩_F; norms are stored exactly."""
    none = {"norm": 0.0, "values": (0.0,) * PROBES}
    pairs = [(first.get(path, none), second.get(path, none)) for path in paths]
    norm_a = sum(x["norm"] ** 2 for x, _ in pairs) ** 0.5
    norm_b = sum(y["norm"] ** 2 for _, y in pairs) ** 0.5
    values = [(u, v) for x, y in pairs for u, v in zip(x["values"], y["values"], strict=True)]
    inner = sum(u * v for u, v in values) / PROBES
    distance = sum((u - v) ** 2 for u, v in values) / PROBES
    return {**_figures(norm_a, norm_b, inner, distance**0.5), "estimated": True}
