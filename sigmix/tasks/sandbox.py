"""Run an untrusted Python program with its unit tests in a restricted process of its own.

Always: a fresh ``python -I -S`` (no environment, no site-packages) in its own session and an empty temporary folder;
limits on CPU time, memory, file size, open files and processes; no capabilities and no new privileges; a wall-clock
limit. Output is discarded. Printing, ``sys.exit(0)`` and ``os._exit(0)`` do not pass: success is a random token in a
pipe, sent back on another pipe only after the tests.

On Linux, as far as the kernel allows (see `guards`):

- jail: namespaces without network and other processes, and a root folder with only the system's libraries and the
  interpreter, read-only; as user "nobody" if we are root.
- namespaces: the same without the root folder; files that the user may read can be read.
- plain (also macOS): only Python's own socket calls are blocked, which a program can bypass.

Not prevented: a program that searches its own process for the two pipes, replaces what the tests call, or returns
objects equal to everything (a passed test is evidence, not proof); kernel bugs. For hostile programs use a virtual
machine.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sigmix.errors import ConfigError

MEMORY = 512 << 20
FILE_SIZE = 1 << 20
OPEN_FILES = 32
NOBODY = 65534
_MAX_REPORT = 1 << 16
_LAUNCHER = Path(__file__).with_name("sandbox_child.py")


@dataclass(frozen=True)
class Outcome:
    """Result of a run.

    Attributes:
        kind: "passed"; "failed" (an assertion or error, or it ended early); "timeout"; "sandbox" (a failure of the
            sandbox itself, which says nothing about the program).
        detail: for people.
    """

    kind: Literal["passed", "failed", "timeout", "sandbox"]
    detail: str = ""


@dataclass(frozen=True)
class Guards:
    """Isolation on this machine: ``level`` as in the module's docstring; ``nobody``: programs run as that user."""

    level: Literal["jail", "namespaces", "plain"]
    nobody: bool


def run_tests(program: str, tests: str, *, timeout: float = 5.0, memory: int = MEMORY) -> Outcome:
    """Run ``program`` and then ``tests``, Python sources, in one namespace; tests raise if the program is wrong.

    ``timeout`` is in CPU seconds (the wall-clock limit is twice that and one second), ``memory`` in bytes.
    """
    return _run(program, tests, timeout, memory, guards())


@functools.cache
def guards() -> Guards:
    """Return the strongest guards under which a trivial program runs on this machine; probed once.

    Raises:
        ConfigError: neither Linux nor macOS.
    """
    if os.name != "posix":
        raise ConfigError("the code sandbox needs Linux or macOS", remedy="use WSL, or leave the code tasks out")
    root = os.geteuid() == 0
    # as nobody the interpreter may be out of reach (a home folder with mode 700), which shows in imports
    for level in ("jail", "namespaces", "plain") if sys.platform == "linux" else ("plain",):
        for nobody in (True, False) if root else (False,):
            tried = Guards(level, nobody)
            outcome = _run("import json, random, decimal, math", "open('f', 'w').close()", 5.0, MEMORY, tried)
            if outcome.kind == "passed":
                return tried
    return Guards("plain", False)


def _run(program: str, tests: str, timeout: float, memory: int, how: Guards) -> Outcome:
    token = secrets.token_hex(16)
    opened: list[int] = []
    process = None
    folder = None
    try:
        folder = tempfile.mkdtemp(prefix="sigmix-sandbox-")
        os.chmod(folder, 0o777 if how.nobody else 0o700)
        to_child, to_child_w = _pipe(opened)
        from_child, from_child_w = _pipe(opened)
        job = {
            "program": program, "tests": tests, "cpu": max(1, round(timeout)), "memory": memory, "folder": folder,
            "file_size": FILE_SIZE, "open_files": OPEN_FILES, "level": how.level,
            "user": NOBODY if how.nobody else None,
        }  # fmt: skip
        with tempfile.TemporaryFile() as source:
            source.write(json.dumps(job).encode())
            source.seek(0)
            os.write(to_child_w, token.encode())  # 32 bytes wait in the pipe's buffer until the tests have run
            descriptors = (source.fileno(), to_child, from_child_w)
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(_LAUNCHER), *map(str, descriptors)], pass_fds=descriptors,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder, env={},
                start_new_session=True,
            )  # fmt: skip
        for end in (to_child, from_child_w):
            os.close(end)
            opened.remove(end)
        report, late = _read(from_child, time.monotonic() + 2 * timeout + 1)
        return _outcome(report, late, token, process)
    except OSError as error:
        return Outcome("sandbox", f"{type(error).__name__}: {error}")
    finally:
        if process is not None:
            _kill(process)
        for end in opened:
            os.close(end)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _pipe(opened: list[int]) -> tuple[int, int]:
    ends = os.pipe()
    opened.extend(ends)
    return ends


def _read(end: int, deadline: float) -> tuple[bytes, bool]:
    """Read until the other side closes; also return True if the deadline came first."""
    report = b""
    while len(report) < _MAX_REPORT:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([end], [], [], left)[0]:
            return report, True
        part = os.read(end, 4096)
        if not part:
            break
        report += part
    return report, False


def _outcome(report: bytes, late: bool, token: str, process: subprocess.Popen[bytes]) -> Outcome:
    lines = report.decode("utf-8", "replace").splitlines()
    # "ready" is sent just before the program starts: an earlier failure is the sandbox's, a later one the program's
    if "ready" not in lines[:1]:
        return Outcome("sandbox", "no start in time" if late else (lines or ["the launcher died"])[0])
    if f"passed {token}" in lines[1:]:
        return Outcome("passed")
    if late:
        return Outcome("timeout", "still running at the wall-clock limit")
    try:
        code = process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        return Outcome("failed", "closed its pipes and went on")
    ended_by = -code if code < 0 else code - 128  # the launcher reports its child's signal as a shell does
    if ended_by in (signal.SIGXCPU, signal.SIGKILL):
        return Outcome("timeout", "out of CPU time")
    return Outcome("failed", lines[1][:300] if len(lines) > 1 else f"ended early with status {code}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    # the launcher first: on SIGTERM it kills the PID namespace, where a program may have left the process group
    with contextlib.suppress(ProcessLookupError, PermissionError):
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
