"""Names of experts and the contents of ``sigmix.json``: what may stand there, and what is said when it does not.

In memory an expert's metadata is a plain JSON-like mapping (frozen). On disk three keys are added: ``schema``, ``name``
and ``z_sha256``.

    base         {"name", "dtype", "fingerprint"}; without a fingerprint the expert is unverified; "basis": "original"
                 if it was trained on a quantised base in its original's basis (`sigmix.experts.original_basis`)
    matrices     {module path: [out, in]}
    sketches     {module path: {"norm", "values": 8 numbers}}
    task, domain, description, objective, seed, commit, license, training    as the author gives them
    carried_from where `sigmix.experts.transfer` took it from
    metrics      a list of {"name", "value", "n", "interval": [low, high], "base", …}
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from sigmix.errors import ExpertError, UnknownNameError
from sigmix.experts.fingerprint import Sketch

SCHEMA = 1


NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


RESERVED = {"base": "it stands for the base without any expert", "auto": "it stands for a choice per request"}


AUTHORS = (
    "task", "domain", "description", "objective", "seed", "commit", "metrics", "license", "training",
)  # fmt: skip
"""Keys that whoever makes an expert may set; the others are computed."""


COMPUTED = ("base", "matrices", "sketches")


def check_name(name: object) -> str:
    """``name`` if an expert can be called so: lower-case letters, digits, ``.``, ``_``, ``-``; a folder, not a path.

    Raises:
        ExpertError: it cannot.
    """
    if isinstance(name, str) and name in RESERVED:
        raise ExpertError(f"an expert cannot be called {name!r}: {RESERVED[name]}", remedy="choose another name")
    if not isinstance(name, str) or not NAME.fullmatch(name) or len(name) > 100:
        raise ExpertError(
            f"{name!r} is no name for an expert: it needs lower-case letters, digits, '.', '_' or '-', beginning with "
            "a letter or digit, at most 100 of them",
            remedy="for example 'arithmetic-v2'",
        )
    return name


def name_from_folder(folder: str) -> str:
    """A valid name made of a folder's name, for directories that PEFT or TRL saved."""
    name = re.sub(r"[^a-z0-9._-]+", "-", folder.lower()).strip("-._")[:100]
    return "unnamed" if not name or name in RESERVED else name


def check_authors(meta: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of what an author gives as metadata.

    Raises:
        UnknownNameError: a key that is none of `AUTHORS`. ExpertError: a value that JSON cannot hold.
    """
    meta = dict(meta or {})
    for key in meta:
        if key not in AUTHORS:
            raise UnknownNameError("metadata key", str(key), AUTHORS, remedy="put anything else under 'training'")
    return meta


def check_z(z: Mapping[str, torch.Tensor], owner: str) -> dict[str, torch.Tensor]:
    """Copies of z in float32 on the CPU, contiguous, sorted by path.

    Raises:
        ExpertError: not a float vector, NaN or infinite, or negative; names the matrix.
    """
    clean: dict[str, torch.Tensor] = {}
    for path in sorted(z):
        value = z[path]
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.ndim != 1:
            what = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise ExpertError(
                f"{owner}: z of {path} must be a vector of floats, not {what}", remedy="store one float per component"
            )
        value = value.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()
        if not torch.isfinite(value).all():
            raise ExpertError(
                f"{owner}: z of {path} holds {int((~torch.isfinite(value)).sum())} NaN or infinite values",
                remedy="the training diverged; take an earlier checkpoint or lower the learning rate",
            )
        if (value < 0).any():
            raise ExpertError(
                f"{owner}: z of {path} is negative in {int((value < 0).sum())} components (lowest {value.min():.3g}), "
                "but a singular value cannot be scaled below zero",
                remedy="clamp z at 0 while training",
            )
        clean[path] = value
    if not clean:
        raise ExpertError(f"{owner}: holds no z at all", remedy="an expert needs at least one adapted matrix")
    return clean


def digest_of(z: Mapping[str, torch.Tensor]) -> str:
    """Hex SHA-256 over paths and float32 values."""
    total = hashlib.sha256(b"sigmix-z-v1\n")
    for path in sorted(z):
        total.update(f"{path} {len(z[path])}\n".encode())
        total.update(z[path].numpy().astype("<f4", copy=False).tobytes())
    return total.hexdigest()


def check_meta(meta: Mapping[str, Any], z: Mapping[str, torch.Tensor], owner: str) -> None:
    """Raise `ExpertError` where metadata has a wrong shape or does not fit z."""
    try:
        json.dumps(thaw(meta), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ExpertError(
            f"{owner}: metadata must be what JSON can hold: {error}", remedy="use text, finite numbers, lists and dicts"
        ) from error
    kinds: dict[str, type | tuple[type, ...]] = {
        "base": Mapping, "matrices": Mapping, "sketches": Mapping, "metrics": (list, tuple),
        "domain": str, "description": str, "license": str,
    }  # fmt: skip
    for key, kind in kinds.items():
        if meta.get(key) is not None and not isinstance(meta[key], kind):
            what = {Mapping: "an object", str: "text"}.get(kind, "a list")  # type: ignore[call-overload]
            raise ExpertError(f"{owner}: metadata {key!r} must be {what}", remedy=f"mend {key!r}")
    if not all(isinstance(metric, Mapping) for metric in meta.get("metrics") or ()):
        raise ExpertError(f"{owner}: every entry of 'metrics' must be an object", remedy="for example {'name': …}")
    for key in ("matrices", "sketches"):
        paths = meta.get(key)
        if paths is not None and set(paths) != set(z):
            odd = sorted(set(paths) ^ set(z))
            raise ExpertError(
                f"{owner}: z and {key!r} name different matrices, {len(odd)} in all, such as {odd[0]}",
                remedy="restore the files as they were saved together",
            )
    if odd := [key for key, value in (meta.get("base") or {}).items() if not isinstance(value, (str, type(None)))]:
        raise ExpertError(f"{owner}: metadata 'base' must hold text only; {odd[0]!r} is not", remedy="mend 'base'")
    for path, value in (meta.get("sketches") or {}).items():
        Sketch.from_json(value, f"{owner}, sketch of {path}")
    for path, size in (meta.get("matrices") or {}).items():
        if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(isinstance(n, int) for n in size):
            raise ExpertError(f"{owner}: the size of {path} must be [out, in], not {size!r}", remedy="mend 'matrices'")
        if len(z[path]) != min(size):
            raise ExpertError(
                f"{owner}: z of {path} has {len(z[path])} components, but a matrix of {size[0]}×{size[1]} has "
                f"{min(size)}",
                remedy="restore the files as they were saved together",
            )


def check_schema(meta: Mapping[str, Any], source: str) -> None:
    """Raise `ExpertError` unless ``meta``, read from ``source``, is of a schema that this version reads."""
    schema = meta.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise ExpertError(f"{source} has no valid 'schema' number: {schema!r}", remedy=f"it should be {SCHEMA}")
    if schema > SCHEMA:
        raise ExpertError(
            f"{source} has schema {schema}, but this version of sigmix reads up to {SCHEMA}",
            remedy="run `pip install --upgrade sigmix`",
        )
    for key in ("name", "z_sha256"):
        if not isinstance(meta.get(key), str):
            raise ExpertError(f"{source} lacks {key!r}", remedy="restore it, or delete it and seal the expert again")


def freeze(value: Any) -> Any:
    """A read-only deep copy: mappings become `MappingProxyType` with sorted keys, lists become tuples."""
    if isinstance(value, Mapping):
        return MappingProxyType({str(key): freeze(value[key]) for key in sorted(value, key=str)})
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in value)
    return value


def thaw(value: Any) -> Any:
    """The inverse of `freeze`: plain dicts and lists."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [thaw(item) for item in value]
    return value
