"""Small file systems that tests fill up."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

MOUNT = 'mount -t tmpfs -o "size=$1" sigmix "$2" && echo mounted && exec sleep 3600'


@dataclass(frozen=True)
class Disk:
    """A tmpfs in a mount namespace of its own.

    Attributes:
        folder: where commands with the prefix ``inside`` find it. outside: its path for this process.
    """

    folder: Path
    outside: Path
    inside: list[str]

    def fill(self, left: int = 0) -> Path:
        """Write a file until at most ``left`` bytes are free, give or take a page; return it."""
        path = self.outside / "filler"
        with suppress(OSError), open(path, "ab", buffering=0) as file:
            while shutil.disk_usage(self.outside).free > left:
                file.write(os.urandom(4096))
        return path


@contextmanager
def small_disk(folder: Path, size: int = 8 << 20) -> Iterator[Disk]:
    """Yield an empty tmpfs of ``size`` bytes.

    No rights are needed where the kernel lets users create user namespaces; elsewhere the test is skipped.
    """
    if shutil.which("nsenter") is None:
        pytest.skip("needs util-linux to mount a small file system")
    folder.mkdir()
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", MOUNT, "sh", str(size), str(folder)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stderr is not None
        if holder.stdout.readline() != "mounted\n":
            pytest.skip(f"a small file system cannot be mounted here: {holder.stderr.read().strip()}")
        enter = ["nsenter", "--target", str(holder.pid), "--user", "--mount", "--preserve-credentials"]
        yield Disk(folder, Path(f"/proc/{holder.pid}/root{folder.absolute()}"), [*enter, "--wd=."])
    finally:
        holder.kill()
        holder.communicate()
