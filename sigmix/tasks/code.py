"""The program in a reply, and the verdict of unit tests on it. Running it is `sandbox`'s work."""

from __future__ import annotations

import re

from sigmix.errors import ConfigError
from sigmix.tasks.base import Score
from sigmix.tasks.sandbox import run_tests

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)


def extract_code(reply: str) -> str:
    """The first block fenced as Python, else the first fenced block, else the whole reply (fences need closing)."""
    blocks = _FENCE.findall(reply.replace("\r\n", "\n") + "\n")
    python = [code for language, code in blocks if language.lower() in ("python", "py", "python3")]
    return (python or [code for _, code in blocks] or [reply])[0].strip("\n")


def require_permission(allow_code: bool, task: str) -> None:
    """`ConfigError` unless running programs was allowed."""
    if not allow_code:
        raise ConfigError(
            f"scoring {task} runs the program in the reply, which is off",
            remedy="read in sigmix/tasks/sandbox.py what the sandbox does not stop, then add --allow-code",
        )


def score_program(program: str, tests: str, *, stdin: str = "", timeout: float = 5.0) -> Score:
    """1 if all of ``tests`` pass after ``program``; 0 if not; None if the sandbox itself failed."""
    if not program.strip():
        return Score(0.0, None, "no program")
    outcome = run_tests(program, tests, stdin=stdin, timeout=timeout)
    if outcome.kind == "sandbox":
        return Score(None, program, f"the sandbox failed: {outcome.detail}")
    return Score.of(outcome.kind == "passed", program, f"{outcome.kind}: {outcome.detail}".rstrip(": "))
