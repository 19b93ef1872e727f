"""Run an untrusted Python program, with its unit tests or for the number that its function returns.

Always: a fresh ``python -I -S`` (no environment, no site-packages) in its own session and an empty temporary folder;
limits on CPU time, memory, file size, open files and processes; no capabilities and no new privileges; a wall-clock
limit. Output is discarded. A launcher (``sandbox_child.py``) enters the namespaces and forks a process for each run;
in a jail runs share nothing. Printing, ``sys.exit(0)`` and ``os._exit(0)`` do not pass: success is a random token,
made after the fork, that the run reads from a pipe after the tests and sends to the launcher on another, with the
number.

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
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sigmix.errors import ConfigError

MEMORY = 512 << 20
FILE_SIZE = 1 << 20
OPEN_FILES = 32
NOBODY = 65534
START_UP = 30.0
"""Seconds of wall-clock time until the launcher is ready."""
_LAUNCHER = Path(__file__).with_name("sandbox_child.py")


@dataclass(frozen=True)
class Outcome:
    """Result of a run.

    Attributes:
        kind: "passed"; "failed" (an assertion or error, or it ended early); "timeout"; "sandbox" (a failure of the
            sandbox itself, not of the program).
        detail: for people.
        value: that a function returned, for `run_function`.
    """

    kind: Literal["passed", "failed", "timeout", "sandbox"]
    detail: str = ""
    value: float | None = None


@dataclass(frozen=True)
class Guards:
    """Isolation on this machine: ``level`` as in the module's docstring; ``nobody``: programs run as that user."""

    level: Literal["jail", "namespaces", "plain"]
    nobody: bool


def run_tests(program: str, tests: str, *, timeout: float = 5.0, memory: int = MEMORY) -> Outcome:
    """Run ``program`` and then ``tests``, Python sources, in one namespace; tests raise if the program is wrong.

    ``timeout`` is in CPU seconds (the wall-clock limit is twice that and one second), ``memory`` in bytes.
    """
    return _run(program, [{"tests": tests}], timeout, memory, guards())[0]


def run_function(
    program: str, name: str, calls: Sequence[Sequence[Any]], *, timeout: float = 5.0, memory: int = MEMORY
) -> list[Outcome]:
    """Call a function that ``program`` defines, once for each list of JSON arguments, each time in a fresh process.

    A call passes if it returns an int, a float or a bool: ``Outcome.value``, which may be NaN or infinite. The limits
    are those of `run_tests`, for each call.
    """
    runs = [{"function": name, "arguments": json.dumps(call)} for call in calls]
    return _run(program, runs, timeout, memory, guards()) if runs else []


def require_permission(allow_code: bool, what: str) -> None:
    """Raise `ConfigError` unless running programs is allowed; ``what`` runs one."""
    if not allow_code:
        raise ConfigError(
            f"{what} runs a program, which is not allowed",
            remedy="read in sigmix/tasks/sandbox.py what the sandbox does not stop, then add --allow-code",
        )


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
            runs = [{"tests": "open('f', 'w').close()"}]
            if _run("import json, random, decimal, math", runs, 5.0, MEMORY, tried)[0].kind == "passed":
                return tried
    return Guards("plain", False)


def _run(program: str, runs: Sequence[Mapping[str, str]], timeout: float, memory: int, how: Guards) -> list[Outcome]:
    process = folder = None
    outcomes: list[Outcome] = []
    try:
        folder = tempfile.mkdtemp(prefix="sigmix-sandbox-")
        os.chmod(folder, 0o777 if how.nobody else 0o700)
        wall = 2 * timeout + 1
        job = {
            "program": program, "cpu": max(1, round(timeout)), "wall": wall, "memory": memory, "folder": folder,
            "file_size": FILE_SIZE, "open_files": OPEN_FILES, "level": how.level,
            "user": NOBODY if how.nobody else None,
        }  # fmt: skip
        with tempfile.TemporaryFile() as source:
            source.writelines(json.dumps(line).encode() + b"\n" for line in (job, *runs))
            source.seek(0)
            report, report_w = os.pipe()
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-B", str(_LAUNCHER), str(source.fileno()), str(report_w)],
                    pass_fds=(source.fileno(), report_w), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL, cwd=folder, env={}, start_new_session=True,
                )  # fmt: skip
            except BaseException:
                os.close(report)
                raise
            finally:
                os.close(report_w)
        with open(report, "rb") as lines:
            for number in range(-1, len(runs)):
                line = _read_line(lines.fileno(), time.monotonic() + START_UP + (wall if number >= 0 else 0))
                if number >= 0 and line.startswith("{"):
                    outcomes.append(Outcome(**json.loads(line)))
                elif number >= 0 or line != "ready":
                    raise OSError(line or "the launcher died or did not start in time")
    except OSError as error:
        outcomes += [Outcome("sandbox", str(error))] * (len(runs) - len(outcomes))
    finally:
        if process is not None:
            _kill(process)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return outcomes


def _read_line(end: int, deadline: float) -> str:
    """Read a line of the launcher, which writes lines of a few hundred bytes; "" at the end or the deadline."""
    line = b""
    while not line.endswith(b"\n"):
        if not select.select([end], [], [], max(deadline - time.monotonic(), 0))[0]:
            return ""
        byte = os.read(end, 1)
        if not byte:
            break
        line += byte
    return line.decode("utf-8", "replace").rstrip("\n")


def _kill(process: subprocess.Popen[bytes]) -> None:
    # the launcher first: on SIGTERM it kills the PID namespace, where a program may have left the process group
    with contextlib.suppress(ProcessLookupError, PermissionError):
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
