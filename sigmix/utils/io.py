"""Paths and safe writing: nothing is lost or half-written.

Everything is written beside its target under a temporary name and renamed, so a reader sees the old content, the new
content, or nothing, never a part. Imports only the error tree, filelock and the standard library.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sigmix.errors import OutputError


def existing(path: str | os.PathLike[str]) -> Path:
    """``path``, or the nearest folder above it that exists."""
    there = Path(path).absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    return there


def free_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes free for this user where ``path`` is, or would be once it is made."""
    return shutil.disk_usage(existing(path)).free


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the operating system's refusals while writing ``path`` into one clear `OutputError`."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: ("the disk is full", "free some space or choose another folder"),
            errno.EDQUOT: ("the disk quota is used up", "free some space or choose another folder"),
            errno.EROFS: ("the file system is read-only", "choose a folder that you can write to"),
            errno.EACCES: ("permission denied", "choose a folder that you can write to"),
            errno.EPERM: ("permission denied", "choose a folder that you can write to"),
            errno.ENOTDIR: ("a part of the path is a file", "choose another path"),
            errno.EEXIST: ("the name is taken by something else", "choose another path"),
            errno.ENOTEMPTY: ("the name is taken by something else", "choose another path"),
        }
        why, remedy = reasons.get(error.errno or 0, (error.strerror or str(error), "choose another path"))
        raise OutputError(f"cannot write {os.fspath(path)}: {why}", remedy=remedy) from error


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], mode: int | None = None) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it replaces ``path``, on any error it is removed.

    Args:
        mode: permissions; default: what the umask leaves of reading and writing for all.

    Raises:
        OutputError: the folder cannot be written or the disk is full.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            os.chmod(temporary, 0o666 & ~_umask() if mode is None else mode)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(path: str | os.PathLike[str], new: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success it takes the place of ``path`` (an old one is removed).

    Args:
        new: replace nothing but an empty folder, whatever has come to ``path`` meanwhile.

    Raises:
        OutputError: the parent folder cannot be written or the disk is full; with ``new``, there is something.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        try:
            yield temporary
            os.chmod(temporary, 0o777 & ~_umask())
            if new:
                check_new(path)
                os.replace(temporary, path)  # which replaces no folder that is not empty
            elif path.is_dir():
                # rename cannot replace a folder that is not empty: move the old one aside first, so that a crash
                # between the two renames leaves it complete under its .old name
                old = path.with_name(f".{path.name}.old")
                shutil.rmtree(old, ignore_errors=True)
                os.replace(path, old)
                os.replace(temporary, path)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_new(path: str | os.PathLike[str]) -> None:
    """Raise `OutputError` if there is anything at a path but an empty folder."""
    path = Path(path)
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise OutputError(f"{path} exists already", remedy="give another --out, or remove it first")


def check_room(path: str | os.PathLike[str], wanted: int) -> None:
    """Raise `OutputError` if the disk on which a path lies, or will lie, has less than ``wanted`` bytes free."""
    there = Path(path).absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    with writing(path):
        free = shutil.disk_usage(there).free
    if wanted > free:
        raise OutputError(
            f"{os.fspath(path)} needs {wanted / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free there",
            remedy="free some space or choose another folder",
        )


def restore_interrupted(path: str | os.PathLike[str]) -> None:
    """Put back the folder that `atomic_dir` had moved aside, if a crash hit just between its two renames."""
    path = Path(path)
    old = path.with_name(f".{path.name}.old")
    if not path.exists() and old.is_dir():
        with writing(path):
            os.replace(old, path)


@contextlib.contextmanager
def exclusive(lock: str | os.PathLike[str], message: str, remedy: str) -> Iterator[None]:
    """Hold the lock file ``lock`` for this process, without waiting.

    Raises:
        OutputError: with ``message``, if another process holds it; or the file cannot be written.
    """

    def refuse(_: FileLock) -> None:
        raise OutputError(message, remedy=remedy)

    with _holding(lock, refuse):
        yield


@contextlib.contextmanager
def waiting(lock: str | os.PathLike[str], told: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file ``lock`` for this process; ``told`` is called once if another process holds it.

    Raises:
        OutputError: the file cannot be written.
    """

    def wait(held: FileLock) -> None:
        told()
        held.acquire()

    with _holding(lock, wait):
        yield


@contextlib.contextmanager
def _holding(lock: str | os.PathLike[str], busy: Callable[[FileLock], None]) -> Iterator[None]:
    held = FileLock(lock)
    with writing(lock):
        Path(lock).parent.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire(timeout=0)
        except Timeout:
            busy(held)
    try:
        yield
    finally:
        held.release()


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise `OutputError` if nothing could be written at a path, by writing beside it: before long work, not after.

    The folder that it lies in is made.
    """
    path = Path(path)
    probe = path.with_name(f".{path.name}.probe")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(probe):
            pass
        probe.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON with a final newline, atomically. NaN is refused (ValueError)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
