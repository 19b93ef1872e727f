"""Other processes: peers that answer requests in turn, and children that are measured once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from sigmix.errors import SigmixError


class Peer:
    """Peer program in a process group of its own, stopped by SIGSTOP outside its turns; a context manager.

    The group stays in our session, so that the kernel ends it (SIGHUP to orphaned groups that are stopped) if we are
    killed.

    The process writes a line of JSON when it is ready, and one for every line of JSON that it reads. It times its own
    work. What it writes to stderr goes to a file, and errors cite the last line.

    Args:
        command: of the process. environment: added to ours.

    Attributes:
        ready: the first line, parsed.

    Raises:
        SigmixError: the process ended or wrote something else, here and in `ask`.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env={**os.environ, **(environment or {})}, preexec_fn=os.setpgrp,
        )  # fmt: skip
        try:
            self.ready = self._answer()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process group."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return the answer to a request."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # it ended, so there is no answer either
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self._signal(signal.SIGSTOP)
        try:
            return json.loads(line)
        except ValueError as error:
            self._log.seek(0)
            reason = line.strip() or _last_line(self._log.read())
            raise SigmixError(f"the peer {self._process.args[0]} failed: {reason}") from error

    def _signal(self, number: int) -> None:
        if self._process.returncode is None:  # until it is waited for, its id is not used again
            os.killpg(self._process.pid, number)


def in_child(
    module: str, given: Mapping[str, Any], what: str, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run ``python -m module GIVEN`` and return the last line that it prints; both are JSON.

    Args:
        what: subject of the error's sentence. environment: the whole; None: ours.

    Raises:
        SigmixError: it fails.
    """
    command = [sys.executable, "-m", module, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment)
    if done.returncode:
        raise SigmixError(f"{what} cannot be measured: {_last_line(done.stderr)}")
    return json.loads(done.stdout.splitlines()[-1])


def equal_start(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens until the first that differs."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
