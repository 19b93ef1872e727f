"""A mix as a checkpoint of its own: W'(z) in place of W, everything else as it was.

Each weight is composed exactly as the engine's merged form composes it, with the same rounding, so both give the same
logits in the same dtype. Tensors are read, composed and written one at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sigmix.experts.mix import Mix
from sigmix.export.model_card import RECORD, merged_card, record
from sigmix.export.source import Source
from sigmix.utils.cache import MANIFEST
from sigmix.utils.io import atomic_dir, check_new, check_room, write_json, write_text
from sigmix.utils.safetensors import INDEX, Spec, spec, write_shards

SHARD_BYTES = 5_000_000_000


COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")
"""Files of a base that go along: configs, the tokenizer, code of its own."""


def export_merged(
    source: Source,
    mix: Mix,
    bank: Mapping[str, Any],
    out: Path,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write a merged checkpoint to the folder ``out``, whole or not at all.

    Args:
        source: the base, in the dtype that the checkpoint will have.
        shard_bytes: most bytes in one file. progress: called for every tensor.

    Returns:
        ``files``, ``bytes``, ``tensors``, ``changed`` (how many of them), ``dtype``, and what `record` says.

    Raises:
        FingerprintError, ExpertError, UnknownNameError, ConfigError: see `Source.z`.
        OutputError: ``out`` exists, at the start or at the end, cannot be written, or has no room.
    """
    check_new(out)
    moved = source.z(mix, bank)
    experts = [bank[name] for name in mix.weights]
    paths = {source.key(path): path for path in moved}

    def tensor(key: str) -> Any:
        progress()
        if key not in paths:
            return source.tensor(key)
        path = paths[key]
        layer = source.layer(path)
        source.check_sketches([expert for expert in experts if path in expert.z], path, layer)
        return layer.merged_weight(moved[path])

    about = {**record(source, mix, experts), "form": "merged", "dtype": source.dtype}
    specs = [_spec(source, key) for key in source.shards]
    check_room(out, sum(one.bytes for one in specs))
    with atomic_dir(out, new=True) as temporary:
        files = write_shards(temporary, specs, tensor, shard_bytes)
        _copy(source, temporary)
        write_json(temporary / RECORD, about)
        write_text(temporary / "README.md", merged_card(about, bool(source.root)))
    return {
        "files": files, "bytes": sum(one.bytes for one in specs), "tensors": len(specs), "changed": len(paths), **about,
    }  # fmt: skip


def _spec(source: Source, key: str) -> Spec:
    entry = source.shards.entry(key)
    if (dtype := source.read_as(key)) is not None:
        return spec(key, entry.shape, dtype)
    return Spec(key, entry.shape, entry.dtype, entry.bytes)


def _copy(source: Source, folder: Path) -> None:
    """Config, tokenizer and the like, and the licence."""
    for file in sorted(source.folder.iterdir()):
        wanted = file.suffix in COPIED or file.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        if file.is_file() and wanted and file.name not in (INDEX, MANIFEST, RECORD):
            shutil.copyfile(file, folder / file.name)
    if source.cast is not None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = source.dtype
        config.pop("torch_dtype", None)
        write_json(folder / "config.json", config)
