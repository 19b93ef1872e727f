"""A `Truncation` as one safetensors file, usually ``truncation.safetensors`` in the bank's folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sigmix.engine.groups import find_groups
from sigmix.engine.truncation import Truncation
from sigmix.errors import ConfigError, ExpertError, FingerprintError
from sigmix.experts.fingerprint import fingerprint, short
from sigmix.files import atomic_file
from sigmix.svf.subspace import LowRank

FILE = "truncation.safetensors"
FORMAT = "sigmix-truncation-1"
REMEDY = "fit one: sigmix adapt --fit-truncation --bank FOLDER"


def save_truncation(plan: Truncation, engine: Any, path: str | os.PathLike[str]) -> None:
    """Write a plan that was fitted with an engine, atomically.

    Raises:
        OutputError: it cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    for number, part in enumerate(plan.parts.values()):
        tensors |= {f"{number}.inputs": part.inputs, f"{number}.outputs": part.outputs, f"{number}.cores": part.cores}
    about = {
        "format": FORMAT, "base": fingerprint(engine.model), "groups": list(plan.parts), "error": plan.error,
        "cost": plan.cost, "experts": plan.experts, "facts": plan.facts,
    }  # fmt: skip
    content = save({k: v.cpu().contiguous() for k, v in tensors.items()}, {"truncation": json.dumps(about)})
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def load_truncation(engine: Any, path: str | os.PathLike[str]) -> Truncation:
    """Read what `save_truncation` wrote, for an engine on the same base.

    Raises:
        ExpertError: no such file, or damaged. FingerprintError: fitted on another base.
    """
    path = Path(path)
    if not path.is_file():
        raise ExpertError(f"there is no truncation {path}", remedy=REMEDY)
    groups = {group.paths[0]: group for group in find_groups(engine.model, engine.layers, every=True)}
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["truncation"])
            if about["format"] != FORMAT:
                raise ValueError(about["format"])
            if (found := fingerprint(engine.model)) != about["base"]:
                raise FingerprintError(
                    f"the truncation was fitted on the base {short(about['base'])} (fingerprint), this one is "
                    f"{short(found)}",
                    remedy="fit it anew on this base: sigmix adapt --fit-truncation --bank FOLDER",
                )
            count = len(about["experts"])
            parts = {key: _part(file, number, groups[key], count) for number, key in enumerate(about["groups"])}
        return Truncation(
            list(groups.values()), parts, float(about["error"]), float(about["cost"]), dict(about["experts"]),
            dict(about["facts"]),
        )  # fmt: skip
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ExpertError(f"the truncation {path} cannot be read: {error!r}", remedy=REMEDY) from error


def _part(file: Any, number: int, group: Any, experts: int) -> LowRank:
    weight = group.layers[0].matrix()

    def read(name: str, *shape: int | None) -> torch.Tensor:
        found = file.get_tensor(f"{number}.{name}")
        sound = found.ndim == len(shape) and bool(found.isfinite().all())
        if not sound or any(want not in (None, have) for want, have in zip(shape, found.shape, strict=True)):
            raise ValueError(f"{name} of {group.paths[0]} is {tuple(found.shape)}")
        return found.to(weight.device, weight.dtype)

    inputs, outputs = read("inputs", None, weight.shape[1]), read("outputs", sum(group.sizes), None)
    cores = read("cores", len(group.paths), experts, outputs.shape[1], len(inputs))
    return LowRank(inputs, outputs, cores)


def bank_truncation(engine: Any) -> Truncation:
    """The plan in the folder of the engine's bank.

    Raises:
        ConfigError: the bank has no folder. ExpertError, FingerprintError: see `load_truncation`.
    """
    folder = getattr(engine.bank, "folder", None)
    if folder is None:
        raise ConfigError("this bank has no folder to look for a truncation in", remedy="set engine.truncation")
    return load_truncation(engine, Path(folder) / FILE)
