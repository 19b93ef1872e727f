"""Names of experts and the contents of ``sigmix.json``.

In memory the metadata is a frozen JSON-like mapping. On disk ``schema``, ``name`` and ``z_sha256`` are added.

    base         {"name", "dtype", "fingerprint"}; without a fingerprint the expert is unverified; "basis": "original"
                 if it was trained under `sigmix.experts.original_basis.use_original_basis`
    positions    tokens on which z acts, see `SVFConfig`; "all" if missing
    matrices     {module path: [out, in]}
    sketches     {module path: {"norm", "values": 8 numbers}}
    task, domain, description, objective, seed, commit, license, training    set by the author
    carried_from    provenance of an expert that `sigmix.experts.transfer` moved to another model
    metrics      list of {"name", "value", "n", "interval": [low, high], "base", …}
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from sigmix.errors import ExpertError, UnknownNameError, reraised
from sigmix.experts.fingerprint import Sketch
from sigmix.svf.config import POSITIONS
from sigmix.svf.tuner import reads_cache

SCHEMA = 1
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
RESERVED = {"base": "it stands for the base without any expert", "auto": "it stands for a choice per request"}
AUTHOR_KEYS = ("task", "domain", "description", "objective", "seed", "commit", "metrics", "license", "training")
COMPUTED = ("base", "matrices", "sketches")
RESTORE = "restore the files as they were saved together"


def check_name(name: object) -> str:
    """Return ``name`` if it is valid: lower-case letters, digits, ``.``, ``_``, ``-``.

    Raises:
        ExpertError: invalid or reserved.
    """
    if isinstance(name, str) and name in RESERVED:
        raise ExpertError(f"an expert cannot be named {name!r}: {RESERVED[name]}", remedy="choose another name")
    if not isinstance(name, str) or not NAME.fullmatch(name) or len(name) > 100:
        raise ExpertError(
            f"{name!r} is not a valid name: at most 100 lower-case letters, digits, '.', '_' or '-', beginning with a "
            "letter or digit",
            remedy="for example 'arithmetic-v2'",
        )
    return name


def name_from_folder(folder: str) -> str:
    """Derive a valid name from a folder's, for adapters that PEFT or TRL saved."""
    name = re.sub(r"[^a-z0-9._-]+", "-", folder.lower()).strip("-._")[:100]
    return "unnamed" if not name or name in RESERVED else name


def check_author_meta(meta: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a copy of an author's metadata.

    Raises:
        UnknownNameError: a key that is not in `AUTHOR_KEYS`.
    """
    meta = dict(meta or {})
    for key in meta:
        if key not in AUTHOR_KEYS:
            raise UnknownNameError("metadata key", str(key), AUTHOR_KEYS, remedy="put anything else under 'training'")
    return meta


def check_z(z: Mapping[str, torch.Tensor], owner: str) -> dict[str, torch.Tensor]:
    """Return contiguous float32 copies of z on the CPU, sorted by path.

    Raises:
        ExpertError: empty, not a float vector, NaN, infinite, or negative; names the matrix.
    """
    if not z:
        raise ExpertError(f"{owner}: no z", remedy="an expert needs at least one adapted matrix")
    clean: dict[str, torch.Tensor] = {}
    for path in sorted(z):
        value = z[path]
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.ndim != 1:
            kind = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise ExpertError(f"{owner}: z of {path} must be a float vector, not {kind}", remedy="store [r] floats")
        value = value.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()
        if not torch.isfinite(value).all():
            raise ExpertError(
                f"{owner}: z of {path} has {int((~torch.isfinite(value)).sum())} NaN or infinite values",
                remedy="the training diverged; use an earlier checkpoint or a lower learning rate",
            )
        if (value < 0).any():
            raise ExpertError(
                f"{owner}: z of {path} is negative in {int((value < 0).sum())} components (lowest {value.min():.3g})",
                remedy="clamp z at 0 during training",
            )
        clean[path] = value
    return clean


def digest_of(z: Mapping[str, torch.Tensor], positions: str = "all") -> str:
    """Return the hex SHA-256 over positions, paths and float32 values."""
    total = hashlib.sha256(b"sigmix-z-v1\n" if positions == "all" else f"sigmix-z-v1 {positions}\n".encode())
    for path in sorted(z):
        total.update(f"{path} {len(z[path])}\n".encode())
        total.update(z[path].numpy().astype("<f4", copy=False).tobytes())
    return total.hexdigest()


def check_meta(meta: Mapping[str, Any], z: Mapping[str, torch.Tensor], owner: str) -> None:
    """Raise `ExpertError` if metadata is malformed or does not fit z."""
    with reraised(ExpertError, f"{owner}: metadata is not JSON", "use text, finite numbers, lists and dicts"):
        json.dumps(thaw(meta), allow_nan=False)
    kinds: dict[str, tuple[str, type | tuple[type, ...]]] = {
        **dict.fromkeys(("base", "matrices", "sketches"), ("an object", Mapping)), "metrics": ("a list", (list, tuple)),
        **dict.fromkeys(("domain", "description", "license"), ("text", str)),
    }  # fmt: skip
    for key, (kind, types) in kinds.items():
        if meta.get(key) is not None and not isinstance(meta[key], types):
            raise ExpertError(f"{owner}: metadata {key!r} must be {kind}", remedy=f"fix {key!r}")
    if not all(isinstance(metric, Mapping) for metric in meta.get("metrics") or ()):
        raise ExpertError(f"{owner}: every entry of 'metrics' must be an object", remedy="for example {'name': …}")
    if (positions := meta.get("positions", "all")) not in POSITIONS:
        raise ExpertError(f"{owner}: 'positions' must be 'all' or 'prompt', not {positions!r}", remedy=RESTORE)
    if positions == "prompt" and (again := [path for path in z if reads_cache(path)]):
        raise ExpertError(
            f"{owner}: positions 'prompt' with a z for {again[0]}, which decoding applies to the prompt again",
            remedy="train it with exclude_modules='kv_b_proj'",
        )
    for key, value in (meta.get("base") or {}).items():
        if not isinstance(value, (str, type(None))):
            raise ExpertError(f"{owner}: metadata 'base': {key!r} must be text", remedy="fix 'base'")
    for key in ("matrices", "sketches"):
        if meta.get(key) is not None and (odd := sorted(set(meta[key]) ^ set(z))):
            raise ExpertError(
                f"{owner}: z and {key!r} name different matrices, {len(odd)} in all, such as {odd[0]}", remedy=RESTORE
            )
    for path, value in (meta.get("sketches") or {}).items():
        Sketch.from_json(value, f"{owner}, {path}")
    for path, size in (meta.get("matrices") or {}).items():
        if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(isinstance(n, int) for n in size):
            raise ExpertError(f"{owner}: the size of {path} must be [out, in], not {size!r}", remedy="fix 'matrices'")
        if len(z[path]) != min(size):
            raise ExpertError(
                f"{owner}: z of {path} has {len(z[path])} components, but a {size[0]}×{size[1]} matrix has {min(size)}",
                remedy=RESTORE,
            )


def check_schema(meta: Mapping[str, Any], source: str) -> None:
    """Raise `ExpertError` unless ``meta``, read from ``source``, has a schema that this version reads."""
    schema = meta.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise ExpertError(f"{source}: 'schema' must be a number, not {schema!r}", remedy=f"set it to {SCHEMA}")
    if schema > SCHEMA:
        raise ExpertError(
            f"{source}: schema {schema} is newer than this version of sigmix, which reads up to {SCHEMA}",
            remedy="run `pip install --upgrade sigmix`",
        )
    for key in ("name", "z_sha256"):
        if not isinstance(meta.get(key), str):
            raise ExpertError(f"{source}: no {key!r}", remedy="restore it, or delete it and seal the expert again")


def freeze(value: Any) -> Any:
    """Return a read-only deep copy: mappings become sorted `MappingProxyType`, lists become tuples."""
    if isinstance(value, Mapping):
        return MappingProxyType({str(key): freeze(value[key]) for key in sorted(value, key=str)})
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in value)
    return value


def thaw(value: Any) -> Any:
    """Return plain dicts and lists, the inverse of `freeze`."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [thaw(item) for item in value]
    return value
