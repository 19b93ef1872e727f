"""The cache folder: what lies in it, how large it is, and how to clear it. Behind ``sigmix cache``.

Everything in it can be made again: ``models`` holds converted bases (one folder each), ``svd`` holds decompositions
(one file for each matrix), ``downloads`` what an interrupted download left, ``banks`` copies of experts on the hub and
what was fitted for them, ``vllm`` the adapters that the plugin for vLLM made (clear them while vLLM is stopped). The
hub's own cache is not touched; ``hf cache`` manages that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sigmix.errors import CacheError, UnknownNameError
from sigmix.utils.io import exclusive, sha256_file, write_json, writing


def cache_dir() -> Path:
    """The user's cache folder: ``$SIGMIX_CACHE``, else ``$XDG_CACHE_HOME/sigmix``, else ``~/.cache/sigmix``.

    It is not created here.
    """
    if given := os.environ.get("SIGMIX_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sigmix"


@contextlib.contextmanager
def claimed(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold an output place against other runs on this machine; the lock lies in the cache, so it litters nothing.

    Raises:
        OutputError: another process holds ``path``.
    """
    place = os.path.abspath(path)
    name = hashlib.sha256(os.path.realpath(place).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    message = f"another run is going to write to {os.fspath(path)}"
    with exclusive(cache_dir() / "locks" / f"{name}.lock", message, "wait for it, or give another folder"):
        yield


MANIFEST = "sigmix-cache.json"


SCHEMA = 1


def verify(folder: Path) -> None:
    """Compare every file of a cached folder with its manifest (about 0.3 s for 270 MB).

    Raises:
        CacheError: a file is missing or its bytes have changed; the message names it.
    """
    remedy = "sigmix cache clear models"
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"the cached model {folder} has no readable {MANIFEST}", remedy=remedy) from error
    for name, (size, digest) in expected.items():
        file = folder / name
        if not file.is_file():
            raise CacheError(f"the cached model file {file} is missing", remedy=remedy)
        if (found := file.stat().st_size) != size:
            raise CacheError(f"the cached file {file} is damaged: {found} bytes, expected {size}", remedy=remedy)
        if (found_digest := sha256_file(file)) != digest:
            raise CacheError(
                f"the cached file {file} is damaged: sha256 {found_digest[:12]}…, expected {digest[:12]}…",
                remedy=remedy,
            )


def write_manifest(folder: Path, source: dict[str, str]) -> None:
    """Write the manifest that `verify` reads, for all files now in ``folder``."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"schema": SCHEMA, "source": source, "files": files})


KINDS = ("models", "svd", "downloads", "banks", "vllm")


FOLDERS = ("models", "banks", "vllm")


STALE = 3600.0  # seconds after which a temporary file has no living writer


@dataclass(frozen=True)
class Entry:
    """One thing in the cache.

    Attributes:
        kind: one of `KINDS`.
        name: for people: the converted file's name, or the entry's own.
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
    """What the cache holds, of one ``kind`` or all, the most recently used first.

    Raises:
        UnknownNameError: there is no such kind.
    """
    found = []
    for one in _kinds(kind):
        root = cache_dir() / one
        if one in FOLDERS:
            paths: Iterable[Path] = (path for path in _inside(root) if path.is_dir() and not path.name.startswith("."))
        elif one == "svd":
            paths = (path for path in root.glob("**/*.safetensors") if not path.name.startswith("."))
        else:
            paths = (path for path in _inside(root) if path.is_file())
        for path in paths:
            try:
                found.append(_entry(one, path))
            except FileNotFoundError:  # another process cleared it meanwhile
                continue
    return sorted(found, key=lambda entry: (-entry.last_used, entry.name))


def total(kind: str | None = None) -> int:
    """Bytes of all entries of ``kind``, or of all kinds."""
    return sum(entry.bytes for entry in entries(kind))


def clear(kind: str | None = None) -> list[Entry]:
    """Remove all entries of ``kind``, or of all kinds, and return them. Models in memory are not affected.

    Raises:
        UnknownNameError: there is no such kind.
        OutputError: an entry cannot be removed.
    """
    removed = entries(kind)
    for entry in removed:
        _remove(entry.path)
    if "svd" in _kinds(kind) and (ledgers := cache_dir() / "svd" / "ledgers").is_dir():
        _remove(ledgers)  # of what streamed decompositions had done
    _sweep(_kinds(kind))
    return removed


def damage(entry: Entry) -> str | None:
    """What is wrong with ``entry``, or None. Models are compared with their checksums, decompositions by structure."""
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
    """Remove what is damaged, and temporary files that crashed runs left; return the entries with the reasons.

    Raises:
        OutputError: an entry cannot be removed.
    """
    found = [(entry, why) for entry in entries() if (why := damage(entry))]
    for entry, _ in found:
        _remove(entry.path)
    _sweep(KINDS)
    return found


def _kinds(kind: str | None) -> tuple[str, ...]:
    if kind is None:
        return KINDS
    if kind not in KINDS:
        raise UnknownNameError("kind of cache", kind, KINDS)
    return (kind,)


def _inside(root: Path) -> list[Path]:
    return sorted(root.iterdir()) if root.is_dir() else []


def _entry(kind: str, path: Path) -> Entry:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    stats = [file.stat() for file in files] or [path.stat()]
    used = max(max(stat.st_atime, stat.st_mtime) for stat in stats)
    return Entry(kind, _name(path), path, sum(stat.st_size for stat in stats) if files else 0, used)


def _name(path: Path) -> str:
    try:
        return str(json.loads((path / MANIFEST).read_text(encoding="utf-8"))["source"]["file"])
    except (OSError, ValueError, KeyError, TypeError):
        return path.name


def _remove(path: Path) -> None:
    with writing(path):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _sweep(kinds: Iterable[str]) -> None:
    """Remove temporary files and folders (``.*.tmp``, ``.*.old``) that are older than `STALE`."""
    for kind in kinds:
        root = cache_dir() / kind
        for pattern in (".*.tmp", ".*.old"):
            for path in list(root.rglob(pattern)):
                if path.exists() and time.time() - path.stat().st_mtime >= STALE:
                    _remove(path)
