"""The directory of an expert: a PEFT adapter with one file more.

    adapter_config.json         peft_type "SVF", the adapted modules, the base's name; for PEFT
    adapter_model.safetensors   z and nothing else, under PEFT's names base_model.model.<path>.svf_z.weight
    sigmix.json                 what `sigmix.experts.metadata` describes, and a checksum of z
    README.md                   the model card

The same expert always gives the same bytes. A directory without ``sigmix.json``, as PEFT and TRL save it, is read too.
Pickled weights are refused: unpickling runs whatever code the file holds.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sigmix.errors import ExpertError, OutputError
from sigmix.experts.metadata import (
    COMPUTED,
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
from sigmix.utils.io import atomic_dir, check_writable

CONFIG, WEIGHTS, META, CARD = "adapter_config.json", "adapter_model.safetensors", "sigmix.json", "README.md"


CURVE = "curve.png"


FILES = (CONFIG, WEIGHTS, META, CARD, CURVE)


PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


NUMBERS = re.compile(r"\[\n\s+((?:-?[\d.eE+-]+,\n\s+)*-?[\d.eE+-]+)\n\s+\]")


KEY = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.svf_z\.weight")


class Contents(NamedTuple):
    """What a directory holds, checked: see `sigmix.experts.expert.Expert`."""

    name: str
    z: dict[str, torch.Tensor]
    meta: dict[str, Any]


def read(path: Path, name: str | None = None) -> Contents:
    """Read and check an expert's directory.

    Args:
        name: what an adapter without ``sigmix.json`` is called; default: as its folder.

    Raises:
        ExpertError: whatever is wrong with it; one message for each case.
    """
    config = _config(path)
    z = _z(path)
    found = path / META
    if not found.is_file():
        base = config.get("base_model_name_or_path")
        return Contents(name_from_folder(name or path.resolve().name), z, {"base": {"name": base}} if base else {})
    meta = read_json(found)
    check_schema(meta, str(found))
    called, digest = check_name(meta["name"]), meta["z_sha256"]
    meta = {key: value for key, value in meta.items() if key not in ("schema", "name", "z_sha256")}
    check_meta(meta, z, str(path))
    if digest != digest_of(z):
        raise ExpertError(
            f"{path / WEIGHTS} was changed after it was saved: its checksum is not the one in {META}",
            remedy=f"restore the file; if the change is meant, delete {META} and seal the expert again",
        )
    return Contents(called, z, meta)


def write(path: Path, name: str, z: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Write an expert's directory, whole or not at all; an earlier expert of ours at ``path`` is replaced.

    Raises:
        OutputError: ``path`` holds anything else, or cannot be written.
    """
    check_place(path)
    with atomic_dir(path) as temporary:
        for file, content in contents(name, z, meta).items():
            (temporary / file).write_bytes(content)


def contents(
    name: str, z: Mapping[str, torch.Tensor], meta: Mapping[str, Any], repo: str | None = None
) -> dict[str, bytes]:
    """{file name: bytes} of an expert's directory; ``repo``: its name on the hub, for the card."""
    plain = thaw(meta)
    texts = {
        CONFIG: dump(peft_config(z, (plain.get("base") or {}).get("name"))),
        META: dump(sigmix_json(name, z, plain)),
        CARD: card(name, plain, len(z), sum(len(value) for value in z.values()), repo),
    }
    # not save_file: that writes through a memory map, where a full disk kills the process
    weights = save({key_of(path): z[path] for path in sorted(z)}, metadata={"format": "pt"})
    return {WEIGHTS: weights, **{file: text.encode() for file, text in texts.items()}}


def check_place(path: Path) -> None:
    """Raise `OutputError` if ``path`` is a folder with anything but an expert's own files: saving would delete it."""
    others = sorted(entry.name for entry in path.iterdir() if entry.name not in FILES) if path.is_dir() else []
    if others:
        raise OutputError(
            f"{path} holds more than an expert, such as {others[0]}; saving would delete it",
            remedy="give a new folder, or remove the other files",
        )


def check_free(path: str | os.PathLike[str], *, replace: bool = False) -> None:
    """Raise `OutputError` unless an expert can be saved at ``path``: for before the work that makes it, not after.

    Args:
        replace: an expert may be there already.
    """
    path = Path(path)
    if (path / CONFIG).exists() and not replace:
        raise OutputError(f"{path} holds an expert already", remedy="give another --out, or remove it first")
    check_place(path)
    check_writable(path)


def peft_config(z: Mapping[str, torch.Tensor], base: str | None) -> dict[str, Any]:
    """Contents of ``adapter_config.json``; full module paths, so that loading adapts these layers and no others."""
    return {
        "base_model_name_or_path": base,
        "inference_mode": True,
        "peft_type": "SVF",
        "target_modules": sorted(z),
        "task_type": "CAUSAL_LM",
    }


def sigmix_json(name: str, z: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Contents of ``sigmix.json``: what people read first, the long tables last."""
    long = {key: meta[key] for key in COMPUTED if key in meta and key != "base"}
    head = {key: value for key, value in meta.items() if key not in long}
    return {"schema": SCHEMA, "name": name, "z_sha256": digest_of(z), **head, **long}


def key_of(path: str) -> str:
    """PEFT's name of the tensor that holds a matrix's z."""
    return f"base_model.model.{path}.svf_z.weight"


def dump(value: Any) -> str:
    """Indented JSON, with innermost lists on one line so that sketches do not fill thousands of lines."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    # a line break inside brackets is never part of a string, where JSON writes it as \n
    return NUMBERS.sub(lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ExpertError: names the file and the place of the error.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ExpertError(
            f"{file} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}",
            remedy="mend that place, or restore the file",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ExpertError(f"{file} cannot be read: {error}", remedy="restore the file") from error
    if not isinstance(value, dict):
        raise ExpertError(f"{file} must hold a JSON object, not {type(value).__name__}", remedy="restore the file")
    return value


def _config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        what = f"{path} is a file, but an expert is a folder" if path.exists() else f"there is no expert at {path}"
        remedy = "give the expert's folder, or its name on the hub as 'user/name'"
        raise ExpertError(f"{what} with {CONFIG} and {WEIGHTS}{_near(path)}", remedy=remedy)
    if not (path / CONFIG).is_file():
        raise ExpertError(
            f"{path} is no expert: {CONFIG} is missing; {_holds(path)}", remedy="give the expert's folder"
        )
    config = read_json(path / CONFIG)
    kind = config.get("peft_type")
    if kind != "SVF":
        raise ExpertError(
            f"{path} holds a {kind or 'PEFT'} adapter, not SVF, so it has no z",
            remedy="load it with PEFT; sigmix experts are trained with SVFConfig",
        )
    return config


def _z(path: Path) -> dict[str, torch.Tensor]:
    file = path / WEIGHTS
    if not file.is_file():
        if pickled := sorted(entry.name for entry in path.iterdir() if entry.suffix in PICKLES):
            raise ExpertError(
                f"{path} has {pickled[0]} but no {WEIGHTS}; pickled weights are refused, for they can run any code",
                remedy="save it again with safetensors: model.save_pretrained(folder, safe_serialization=True)",
            )
        raise ExpertError(f"{path} is no complete expert: {WEIGHTS} is missing; {_holds(path)}", remedy="restore it")
    z: dict[str, torch.Tensor] = {}
    try:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            for key in names:
                match = KEY.fullmatch(key)
                if match is None:
                    raise ExpertError(
                        f"{file} holds {key}, which is no z; an expert holds only z",
                        remedy="save the SVF adapter alone, without modules_to_save or embeddings",
                    )
                z[match["path"]] = tensors.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ExpertError(f"{file} is truncated or damaged: {error}", remedy="copy or download it again") from error
    return check_z(z, str(file))


def _holds(path: Path) -> str:
    there = sorted(entry.name for entry in path.iterdir())
    return f"it holds {', '.join(there[:8])}{', …' if len(there) > 8 else ''}" if there else "it is empty"


def _near(path: Path) -> str:
    try:
        folders = sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir() and entry.name[0] != ".")
    except OSError:
        return f"; there is no folder {path.parent} either"
    near = difflib.get_close_matches(path.name, folders, n=3, cutoff=0.5) or folders[:8]
    return f"; {path.parent} has {', '.join(near)}" if near else ""
