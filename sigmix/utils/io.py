"""Atomic writes, file locks and disk checks.

Files and folders are written beside their target under a temporary name and then renamed, so a reader finds the old
content, the new content, or nothing.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from sigmix.errors import DataError, DiskFullError, OutputError, SigmixError

_OTHER_FOLDER = "choose a folder that you can write to"
_FREE_SPACE = "free some space or choose another folder"
_OTHER_PATH = "choose another path"
REASONS = {
    errno.ENOSPC: ("the disk is full", _FREE_SPACE),
    errno.EDQUOT: ("the disk quota is used up", _FREE_SPACE),
    errno.EFBIG: ("it exceeds the limit of a file's size", "raise the limit (ulimit -f)"),
    errno.EROFS: ("the file system is read-only", _OTHER_FOLDER),
    errno.EACCES: ("permission denied", _OTHER_FOLDER),
    errno.EPERM: ("permission denied", _OTHER_FOLDER),
    errno.ENOTDIR: ("a part of the path is a file", _OTHER_PATH),
    errno.EEXIST: ("something else has this name", _OTHER_PATH),
    errno.ENOTEMPTY: ("something else has this name", _OTHER_PATH),
}
BINARY = {
    b"PK\x03\x04": "a zip archive or an Excel file", b"\x1f\x8b": "a gzip archive", b"PAR1": "a Parquet file",
    b"\x93NUMPY": "a NumPy array", b"%PDF": "a PDF file", b"SQLite": "a SQLite database",
}  # fmt: skip
"""Kinds of files by their first bytes, none of which begins a text."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Convert operating system errors while writing ``path``, and safetensors' I/O errors, to `OutputError`."""
    try:
        yield
    except SigmixError:  # some are OSErrors too
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        if type(error).__name__ == "SafetensorError" and (match := re.search(r"os error (\d+)", str(error))):
            code = int(match[1])
        elif not isinstance(error, OSError):
            raise
        message = os.strerror(code) if code else str(error)
        reason, remedy = REASONS.get(code or 0, (message, _OTHER_PATH))
        if isinstance(error, FileExistsError) and os.path.isfile(other := error.filename or path) and other != path:
            reason = f"{other} is a file"
        from sigmix.utils.cache import cache_dir  # it imports this module

        if Path(path).is_relative_to(cache_dir()):
            remedy = "set SIGMIX_CACHE to a folder that you can write to, with free space"
        kind = DiskFullError if code in FULL else OutputError
        raise kind(f"cannot write {os.fspath(path)}: {reason}", remedy=remedy) from error


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], mode: int | None = None) -> Iterator[Path]:
    """Yield a temporary path in the same folder that replaces ``path`` on success and is removed on any error.

    Args:
        mode: permissions; default: 0o666 less the umask.

    Raises:
        OutputError: the folder cannot be written, the disk is full, or ``path`` is a folder, device or pipe.
    """
    path = Path(path)
    with writing(path):
        if path.exists() and not path.is_file():
            raise OutputError(f"cannot write {path}: not a regular file", remedy=_OTHER_PATH)
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
    """Yield a temporary folder beside ``path`` that replaces ``path`` on success and is removed on any error.

    Args:
        new: replace nothing but an empty folder, even one that appeared in the meantime.

    Raises:
        OutputError: the parent folder cannot be written, the disk is full, or with ``new`` the path exists.
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
                os.replace(temporary, path)  # fails if the folder is not empty
            elif path.is_dir():
                # rename cannot replace a folder that is not empty. Moved aside first, the old one is complete under
                # its .old name if a crash comes between the two renames
                old = _old(path)
                remove(old, ignore_errors=True)
                os.replace(path, old)
                os.replace(temporary, path)
                remove(old, ignore_errors=True)
            else:
                os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            restore_interrupted(path)


def restore_interrupted(path: str | os.PathLike[str]) -> None:
    """Put back the folder that `atomic_dir` moved aside, if a crash came between its two renames."""
    path = Path(path)
    if not path.exists() and _old(path).is_dir():
        with writing(path):
            os.replace(_old(path), path)


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def remove(path: Path, ignore_errors: bool = False) -> None:
    """Remove a file, a link or a folder with its content; a missing one is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=ignore_errors)
    else:
        with contextlib.suppress(*([OSError] if ignore_errors else [])):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def file_lock(path: str | os.PathLike[str], on_busy: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold a lock file across processes.

    Args:
        on_busy: called if another process holds the lock, before waiting for it; may raise to give up.

    Raises:
        OutputError: the file cannot be written.
    """
    lock = FileLock(path)
    with writing(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_busy()
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def open_text(
    path: str | os.PathLike[str], error: type[SigmixError] = DataError, remedy: str | None = None
) -> Iterator[IO[str]]:
    """Open a user's UTF-8 file, with or without a byte-order mark, for reading; "-" is stdin. Line ends are kept.

    Raises:
        DataError (or ``error``): on opening or reading: it cannot be read, or is in another encoding.
    """
    path = os.path.expanduser(path)
    try:
        raw: Any = io.BytesIO(sys.stdin.buffer.read()) if path == "-" else open(path, "rb", buffering=0)  # noqa: SIM115
        path = "stdin" if path == "-" else path
        with io.BufferedReader(raw) as binary:
            head = binary.peek(64)[:64]
            if kind := next((kind for start, kind in BINARY.items() if head.startswith(start)), None):
                raise error(f"cannot read {path}: expected UTF-8 text, not {kind}", remedy="save it as UTF-8 text")
            if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or head.count(0) > 8:
                raise error(f"cannot read {path}: expected UTF-8, not UTF-16", remedy="save it as UTF-8")
            try:
                yield io.TextIOWrapper(binary, "utf-8-sig", newline="")
            except UnicodeDecodeError as failure:
                where = f"{path}:{_invalid_line(binary)}" if binary.seekable() else path
                message = f"cannot read {where}: expected UTF-8, not another encoding"
                raise error(message, remedy="save it as UTF-8") from failure
    except OSError as failure:
        if isinstance(failure, SigmixError):
            raise
        raise error(f"cannot read {path}: {failure.strerror or failure}", remedy=remedy) from failure


def _invalid_line(binary: io.BufferedReader) -> int:
    """Return the number of the first line that is not UTF-8."""
    binary.seek(0)
    for number, line in enumerate(binary, 1):
        try:
            line.decode()
        except UnicodeDecodeError:
            return number
    return 0


def read_text(path: str | os.PathLike[str], error: type[SigmixError] = DataError, remedy: str | None = None) -> str:
    """Read a user's UTF-8 file, see `open_text`.

    Raises:
        DataError (or ``error``): it cannot be read, is in another encoding, or has NUL characters.
    """
    with open_text(path, error, remedy) as file:
        text = file.read()
    if "\0" in text:
        raise error(f"cannot read {path}: it has NUL characters, expected UTF-8 text", remedy="save it as UTF-8")
    return text


def read_json(path: Path, error: type[SigmixError], remedy: str) -> dict[str, Any]:
    """Read a JSON object; raise ``error``, which names the file and the place, if it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}, not an object")
    except (OSError, ValueError) as failure:
        raise error(f"{path} cannot be read as JSON: {failure}", remedy=remedy) from failure
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object that can be computed anew; {} for a missing or damaged file."""
    try:
        return read_json(path, DataError, "")
    except DataError:
        return {}


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, atomically, with the line ends it has."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON with a final newline, atomically. NaN raises ValueError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def link_or_copy(source: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Make ``path`` a hard link to a file, or a copy where the file systems allow none.

    Raises:
        OutputError: ``path`` cannot be written, or the disk is full.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, path)
        except OSError:
            with atomic_file(path) as temporary:
                shutil.copyfile(source, temporary)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise `OutputError` unless a file or folder can be written at ``path``; creates its parent folder.

    Call it before long work, so that it does not fail at the end.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OutputError(f"cannot write {path}: not a regular file", remedy=_OTHER_PATH)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass


def check_new(path: str | os.PathLike[str]) -> None:
    """Raise `OutputError` if ``path`` exists and is not an empty folder."""
    path = Path(path)
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise OutputError(f"{path} exists already", remedy="give another --out, or remove it first")


def check_room(path: str | os.PathLike[str], needed: int) -> None:
    """Raise `DiskFullError` if the disk of ``path`` has less than ``needed`` bytes free."""
    with writing(path):
        free = free_bytes(path)
    if needed > free:
        raise DiskFullError(
            f"cannot write {os.fspath(path)}: the disk is full: {size(needed)} are needed, {size(free)} are free",
            remedy=_FREE_SPACE,
        )


def size(number: float) -> str:
    """Format bytes: "270 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.0f} {unit}" if number >= 10 or unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def free_bytes(path: str | os.PathLike[str]) -> int:
    """Return the bytes free for this user on the disk of ``path``, which need not exist yet."""
    return shutil.disk_usage(existing(path)).free


def existing(path: str | os.PathLike[str]) -> Path:
    """Return ``path``, or the nearest parent folder that exists."""
    path = Path(path).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
