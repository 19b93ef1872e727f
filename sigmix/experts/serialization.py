"""The folder of an expert: a PEFT adapter with a few files more.

    adapter_config.json         peft_type "SVF", the adapted modules, the base's name; for PEFT
    adapter_model.safetensors   z only, under PEFT's names base_model.model.<path>.svf_z.weight
    sigmix.json                 metadata (`sigmix.experts.metadata`) and a checksum of z
    README.md                   model card
    requests.safetensors        statistics of the training requests (`sigmix.experts.requests`), if there are any

Equal experts give equal bytes. A folder without ``sigmix.json``, as PEFT and TRL save it, is read too. Pickled weights
are refused: unpickling executes code.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sigmix.errors import ExpertError, OutputError, reraised
from sigmix.experts.metadata import (
    COMPUTED,
    RESTORE,
    SCHEMA,
    check_meta,
    check_name,
    check_schema,
    check_z,
    digest_of,
    name_from_folder,
    thaw,
)
from sigmix.experts.model_card import card
from sigmix.experts.requests import FILE as REQUESTS
from sigmix.experts.requests import RequestStatistics
from sigmix.models.hub import near_paths
from sigmix.svf.config import POSITIONS
from sigmix.utils.io import atomic_dir, atomic_file, check_writable, read_json

CONFIG, WEIGHTS, META, CARD = "adapter_config.json", "adapter_model.safetensors", "sigmix.json", "README.md"
CURVE = "curve.png"
SAVED_AGAIN = "restore it or save the expert again"
FILES = (CONFIG, WEIGHTS, META, CARD, REQUESTS, CURVE)
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
KEY = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.svf_z\.weight")
NUMBERS = re.compile(r"\[\n\s+((?:-?[\d.eE+-]+,\n\s+)*-?[\d.eE+-]+)\n\s+\]")


class Contents(NamedTuple):
    """Contents of a folder, checked; the arguments of `sigmix.experts.expert.Expert`."""

    name: str
    z: dict[str, torch.Tensor]
    meta: dict[str, Any]
    requests: RequestStatistics | None = None


def read(path: Path, name: str | None = None) -> Contents:
    """Read and check an expert's folder.

    Args:
        name: of an adapter without ``sigmix.json``; default: derived from the folder.

    Raises:
        ExpertError: missing, incomplete, damaged, or not an SVF adapter.
    """
    config = _read_config(path)
    positions = config.get("positions", "all")
    if positions not in POSITIONS:
        raise ExpertError(f"{path / CONFIG}: 'positions' must be 'all' or 'prompt', not {positions!r}", remedy=RESTORE)
    z = _read_z(path)
    file = path / META
    if not file.is_file():
        base = config.get("base_model_name_or_path")
        bare = {"positions": positions, **({"base": {"name": base}} if base else {})}
        return Contents(name_from_folder(name or path.resolve().name), z, bare)
    meta = read_json(file, ExpertError, SAVED_AGAIN)
    check_schema(meta, str(file))
    name, digest = check_name(meta["name"]), meta["z_sha256"]
    meta = {key: value for key, value in meta.items() if key not in ("schema", "name", "z_sha256")}
    check_meta(meta, z, str(path))
    recorded = meta.get("positions", "all")
    if recorded != positions:
        raise ExpertError(
            f"{path}: 'positions' is {positions!r} in {CONFIG}, but {recorded!r} in {META}", remedy=RESTORE
        )
    if digest != digest_of(z, positions):
        raise ExpertError(
            f"{path / WEIGHTS} does not match its checksum in {META}",
            remedy=f"restore the file; if the change is intended, delete {META} and seal the expert again",
        )
    requests = path / REQUESTS
    return Contents(name, z, meta, read_requests(path) if requests.exists() else None)


def read_requests(path: Path) -> RequestStatistics:
    """Read the statistics in an expert's folder.

    Raises:
        ExpertError: missing or damaged.
    """
    with reraised(ExpertError, f"{path / REQUESTS} cannot be read", SAVED_AGAIN, OSError):
        content = (path / REQUESTS).read_bytes()
    return RequestStatistics.from_bytes(content, str(path / REQUESTS))


def write_requests(path: Path, requests: RequestStatistics) -> None:
    """Write statistics into the folder of an expert; its other files stay as they are.

    Raises:
        OutputError: the folder cannot be written.
    """
    with atomic_file(path / REQUESTS) as temporary:
        temporary.write_bytes(requests.to_bytes())


def write(
    path: Path, name: str, z: Mapping[str, torch.Tensor], meta: Mapping[str, Any],
    requests: RequestStatistics | None = None,
) -> None:  # fmt: skip
    """Write an expert's folder atomically; an earlier expert at ``path`` is replaced.

    Raises:
        OutputError: ``path`` holds other files, or cannot be written.
    """
    _check_replaceable(path)
    with atomic_dir(path) as temporary:
        for file, content in contents(name, z, meta, requests).items():
            (temporary / file).write_bytes(content)


def contents(
    name: str, z: Mapping[str, torch.Tensor], meta: Mapping[str, Any], requests: RequestStatistics | None = None,
    repo_id: str | None = None,
) -> dict[str, bytes]:  # fmt: skip
    """Return {file name: bytes} of an expert's folder; ``repo_id``: its hub id, for the card."""
    plain = thaw(meta)
    config = {
        "base_model_name_or_path": (plain.get("base") or {}).get("name"),
        "inference_mode": True,
        "peft_type": "SVF",
        "positions": plain.get("positions", "all"),
        "target_modules": sorted(z),  # full paths, so that PEFT adapts exactly these
        "task_type": "CAUSAL_LM",
    }
    tables = {key: plain.pop(key) for key in COMPUTED if key in plain and key != "base"}  # long, so they come last
    digest = digest_of(z, plain.get("positions", "all"))
    record = {"schema": SCHEMA, "name": name, "z_sha256": digest, **plain, **tables}
    readme = card(name, plain, len(z), sum(len(value) for value in z.values()), repo_id)
    # not save_file, which writes through a memory map: a full disk would kill the process
    weights = save({f"base_model.model.{path}.svf_z.weight": z[path] for path in sorted(z)}, {"format": "pt"})
    return {
        WEIGHTS: weights, CONFIG: dump(config).encode(), META: dump(record).encode(), CARD: readme.encode(),
        **({REQUESTS: requests.to_bytes()} if requests is not None else {}),
    }  # fmt: skip


def check_free(path: str | os.PathLike[str], *, replace: bool = False) -> None:
    """Raise `OutputError` unless an expert can be saved at ``path``; call it before a long run.

    Args:
        replace: allow an existing expert.
    """
    path = Path(path)
    if (path / CONFIG).exists() and not replace:
        raise OutputError(f"{path} holds an expert already", remedy="give another --out, or remove it first")
    if path.is_file():
        raise OutputError(f"{path} is a file", remedy="give the name of a new folder")
    _check_replaceable(path)
    check_writable(path)


def _check_replaceable(path: Path) -> None:
    others = sorted(entry.name for entry in path.iterdir() if entry.name not in FILES) if path.is_dir() else []
    if others:
        raise OutputError(
            f"{path} has other files than an expert's, such as {others[0]}; saving would delete them",
            remedy="give a new folder, or remove the other files",
        )


def dump(value: Any) -> str:
    """Return indented JSON with innermost lists of numbers on one line, so that sketches stay short."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    # a line break inside brackets is never part of a string, where JSON writes it as \n
    return NUMBERS.sub(lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        problem = f"{path} is a file, not an expert's folder" if path.exists() else f"no expert at {path}"
        raise ExpertError(f"{problem}{near_paths(path)}", remedy="give the expert's folder, or its hub id 'user/name'")
    if not (path / CONFIG).is_file():
        raise ExpertError(f"{path} has no {CONFIG}; {_listing(path)}", remedy="give the expert's folder")
    config = read_json(path / CONFIG, ExpertError, SAVED_AGAIN)
    if (kind := config.get("peft_type")) != "SVF":
        raise ExpertError(f"{path} is a {kind or 'PEFT'} adapter, not SVF", remedy="load it with PEFT")
    return config


def _read_z(path: Path) -> dict[str, torch.Tensor]:
    file = path / WEIGHTS
    if not file.is_file():
        if pickled := sorted(entry.name for entry in path.iterdir() if entry.suffix in PICKLES):
            raise ExpertError(
                f"{path} has {pickled[0]} but no {WEIGHTS}; pickled weights are refused, as they can execute code",
                remedy="save it again with safetensors: model.save_pretrained(folder, safe_serialization=True)",
            )
        raise ExpertError(f"{path} has no {WEIGHTS}; {_listing(path)}", remedy="restore it")
    z: dict[str, torch.Tensor] = {}
    try:
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                match = KEY.fullmatch(key)
                if match is None:
                    raise ExpertError(
                        f"{file} has a tensor {key} other than z",
                        remedy="save the SVF adapter alone, without modules_to_save or embeddings",
                    )
                z[match["path"]] = tensors.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ExpertError(f"{file} is truncated or damaged: {error}", remedy="copy or download it again") from error
    return check_z(z, str(file))


def _listing(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    return f"it holds {', '.join(names[:8])}{', …' if len(names) > 8 else ''}" if names else "it is empty"
