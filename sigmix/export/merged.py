"""Mixture merged into a checkpoint: W'(z) in place of W, all other tensors unchanged.

Weights are composed and rounded as in the engine's merged form, so both give the same logits in the same dtype.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix
from sigmix.export.base import BaseCheckpoint
from sigmix.export.model_card import RECORD, merged_card, record
from sigmix.utils.cache import MANIFEST
from sigmix.utils.io import atomic_dir, check_new, check_room, write_json, write_text
from sigmix.utils.safetensors import INDEX, TensorSpec, write_shards

SHARD_BYTES = 5_000_000_000

COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")
"""Suffixes of a base's files that are copied: configs, tokenizer, model code."""


def export_merged(
    base: BaseCheckpoint,
    mix: Mix,
    bank: Mapping[str, Expert],
    out: Path,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write a merged checkpoint to the folder ``out``, atomically and one tensor at a time.

    Args:
        base: in the dtype of the result. shard_bytes: maximum size of a file. progress: called for every tensor.

    Returns:
        ``files``, ``bytes``, ``tensors``, ``changed`` (number of tensors), ``dtype``, and `record`.

    Raises:
        FingerprintError, ExpertError, UnknownNameError, ConfigError: see `BaseCheckpoint.z`.
        OutputError: ``out`` exists, at the start or at the end, cannot be written, or has no room.
    """
    check_new(out)
    z = base.z(mix, bank)
    experts = [bank[name] for name in mix.weights]
    paths = {base.matrix_key(path): path for path in z}

    def tensor(key: str) -> torch.Tensor:
        progress()
        if key not in paths:
            return base.tensor(key)
        layer = base.layer(paths[key])
        base.check_sketches(experts, paths[key], layer)
        return layer.merged_weight(z[paths[key]])

    about = {**record(base, mix, experts), "form": "merged", "dtype": base.dtype_name}
    specs = [_spec(base, key) for key in base.shards]
    size = sum(spec.bytes for spec in specs)
    check_room(out, size)
    with atomic_dir(out, new=True) as temporary:
        files = write_shards(temporary, specs, tensor, shard_bytes)
        _copy_files(base, temporary)
        write_json(temporary / RECORD, about)
        write_text(temporary / "README.md", merged_card(about, base.vision))
    return {"files": files, "bytes": size, "tensors": len(specs), "changed": len(paths), **about}


def _spec(base: BaseCheckpoint, key: str) -> TensorSpec:
    entry = base.shards.entry(key)
    if (dtype := base.dtype_of(key)) is not None:
        return TensorSpec.of(key, entry.shape, dtype)
    return TensorSpec(key, entry.shape, entry.dtype, entry.bytes)


def _copy_files(base: BaseCheckpoint, folder: Path) -> None:
    for file in sorted(base.folder.iterdir()):
        wanted = file.suffix in COPIED or file.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        if file.is_file() and wanted and file.name not in (INDEX, MANIFEST, RECORD):
            shutil.copyfile(file, folder / file.name)
    if base.cast is not None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = base.dtype_name
        config.pop("torch_dtype", None)
        write_json(folder / "config.json", config)
