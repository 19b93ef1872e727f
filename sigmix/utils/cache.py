"""The cache folder: its location, entries, checks and removal (``sigmix cache``).

Everything in it can be created again: ``models`` (converted bases, a folder each), ``svd`` (decompositions, a file for
each matrix), ``downloads`` (interrupted downloads), ``banks`` (copies of experts on the hub and data fitted for them),
``routers`` (statistics of a base for strategy D), ``compiled`` (decode steps for this machine). The hub's own cache is
separate: see ``hf cache``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sigmix.errors import CacheError, OutputError, UnknownNameError, reraised
from sigmix.utils.io import file_lock, remove, sha256_file, write_json, writing

MANIFEST = "sigmix-cache.json"
SCHEMA = 1
KINDS = ("models", "svd", "downloads", "banks", "routers", "compiled")
FOLDERS = ("models", "banks")
STALE = 3600.0  # seconds after which a temporary file has no live writer


def cache_dir() -> Path:
    """Return ``$SIGMIX_CACHE``, else ``$XDG_CACHE_HOME/sigmix``, else ``~/.cache/sigmix``, without creating it."""
    if given := os.environ.get("SIGMIX_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sigmix"


@contextlib.contextmanager
def claimed(path: str | os.PathLike[str]) -> Iterator[None]:
    """Lock an output path against other runs on this machine; the lock file lies in the cache.

    Raises:
        OutputError: another process holds ``path``.
    """
    real = os.path.realpath(os.path.abspath(path))
    name = hashlib.sha256(real.encode("utf-8", "surrogateescape")).hexdigest()[:32]

    def busy() -> None:
        raise OutputError(
            f"another run is going to write to {os.fspath(path)}", remedy="wait for it, or give another folder"
        )

    with file_lock(cache_dir() / "locks" / f"{name}.lock", on_busy=busy):
        yield


def write_manifest(folder: Path, source: dict[str, str]) -> None:
    """Write the manifest that `verify` reads, for all files now in ``folder``."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"schema": SCHEMA, "source": source, "files": files})


def verify(folder: Path) -> None:
    """Compare the files of a cached folder with its manifest (about 0.3 s for 270 MB).

    Raises:
        CacheError: a file is missing or its bytes changed.
    """
    remedy = "sigmix cache clear --kind models"
    with reraised(CacheError, f"the cached model {folder} has no readable {MANIFEST}", remedy):
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(name): str(entry["sha256"]) for name, entry in files.items()}
    for name, digest in expected.items():
        if not (folder / name).is_file() or sha256_file(folder / name) != digest:
            raise CacheError(f"the cached file {folder / name} is missing or damaged", remedy=remedy)


@dataclass(frozen=True)
class Entry:
    """Cache entry.

    Attributes:
        kind: one of `KINDS`.
        name: file name of a converted model, else the entry's own.
        path: a folder (`FOLDERS`) or a file.
        bytes: size on disk.
        last_used: seconds since the epoch; as exact as the file system's access times.
    """

    kind: str
    name: str
    path: Path
    bytes: int
    last_used: float


def entries(kind: str | None = None) -> list[Entry]:
    """Return the entries of one ``kind`` or of all, most recently used first.

    Raises:
        UnknownNameError: unknown kind.
    """
    listed = []
    for one in _kinds(kind):
        root = cache_dir() / one
        if one == "svd":
            paths: Iterable[Path] = (path for path in root.glob("**/*.safetensors") if not path.name.startswith("."))
        else:
            inside = sorted(root.iterdir()) if root.is_dir() else []
            folders = one in FOLDERS
            paths = (p for p in inside if (p.is_dir() and p.name[0] != "." if folders else p.is_file()))
        for path in paths:
            with contextlib.suppress(FileNotFoundError):  # removed by another process in the meantime
                listed.append(_entry(one, path))
    return sorted(listed, key=lambda entry: (-entry.last_used, entry.name))


def total(kind: str | None = None) -> int:
    """Return the bytes of all entries of ``kind``, or of all kinds."""
    return sum(entry.bytes for entry in entries(kind))


def clear(kind: str | None = None) -> list[Entry]:
    """Remove the entries of ``kind``, or of all kinds, and return them. Loaded models are not affected.

    Raises:
        UnknownNameError: unknown kind.
        OutputError: an entry cannot be removed.
    """
    removed = entries(kind)
    for entry in removed:
        _remove(entry.path)
    if "svd" in _kinds(kind):
        _remove(cache_dir() / "svd" / "ledgers")  # progress of streamed decompositions
    _sweep(_kinds(kind))
    return removed


def damage(entry: Entry) -> str | None:
    """Return what is wrong with an entry, or None. Checks checksums of models and the structure of decompositions."""
    if entry.kind == "models":
        try:
            verify(entry.path)
        except CacheError as error:
            return error.message
    if entry.kind == "svd":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(entry.path), framework="numpy") as file:  # compares the header with the file's size
                if not list(file.keys()):
                    return f"{entry.path} holds no tensors"
        except (SafetensorError, OSError) as error:
            return f"{entry.path} cannot be read: {error}"
    return None


def clear_damaged() -> list[tuple[Entry, str]]:
    """Remove damaged entries, and temporary files of crashed runs; return the entries with the reasons.

    Raises:
        OutputError: an entry cannot be removed.
    """
    damaged = [(entry, reason) for entry in entries() if (reason := damage(entry))]
    for entry, _ in damaged:
        _remove(entry.path)
    _sweep(KINDS)
    return damaged


def _kinds(kind: str | None) -> tuple[str, ...]:
    if kind is None:
        return KINDS
    if kind not in KINDS:
        raise UnknownNameError("kind of cache", kind, KINDS)
    return (kind,)


def _entry(kind: str, path: Path) -> Entry:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    stats = [file.stat() for file in files]
    used = max(max(stat.st_atime, stat.st_mtime) for stat in stats or [path.stat()])
    try:
        name = str(json.loads((path / MANIFEST).read_text(encoding="utf-8"))["source"]["file"])
    except (OSError, ValueError, KeyError, TypeError):
        name = path.name
    return Entry(kind, name, path, sum(stat.st_size for stat in stats), used)


def _remove(path: Path) -> None:
    with writing(path):
        remove(path)


def _sweep(kinds: Iterable[str]) -> None:
    """Remove temporary files and folders (``.*.tmp``, ``.*.old``) that are older than `STALE`."""
    for kind in kinds:
        for pattern in (".*.tmp", ".*.old"):
            for path in list((cache_dir() / kind).rglob(pattern)):
                if path.exists() and time.time() - path.stat().st_mtime >= STALE:
                    _remove(path)
