"""Errors of sigmix. Each names the offending thing, what was expected and the remedy, in one line.

Every class is also the built-in error that callers expect: a ValueError, KeyError or OSError. The command line prints
``str(error)`` on one line of stderr and exits with ``error.exit_code``: 2 for input that the user can fix, 1 otherwise.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator

MAX_NAME = 128
"""Characters of an unknown name that an error quotes."""


class SigmixError(Exception):
    """Base of all errors that sigmix raises on purpose.

    Args:
        message: one sentence: what was found and what was expected.
        remedy: how to fix it, ideally a command. Appended to the message.
    """

    exit_code = 1

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        self.message = " ".join(str(message).split())
        self.remedy = " ".join(remedy.split()) if remedy else None
        super().__init__(f"{self.message} -> {self.remedy}" if self.remedy else self.message)

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would print its repr


@contextlib.contextmanager
def reraised(
    to: type[SigmixError], message: str, remedy: str | None = None,
    of: type[Exception] | tuple[type[Exception], ...] = Exception,
) -> Iterator[None]:  # fmt: skip
    """Re-raise errors ``of`` other libraries as ``to``, with their class and text after ``message``."""
    try:
        yield
    except SigmixError:
        raise
    except of as error:
        raise to(f"{message}: {type(error).__name__}: {error}", remedy=remedy) from error


class InputError(SigmixError, ValueError):
    """Invalid input: an option, a file, a name. Exit code 2."""

    exit_code = 2


class UnknownNameError(InputError, KeyError):
    """Unregistered name; the message lists the nearest valid names."""

    def __init__(self, kind: str, name: str, names: Iterable[str], *, remedy: str | None = None) -> None:
        names = sorted(names)
        name = name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}…"
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names[:8]
        hint = f"nearest: {', '.join(near)}" if near else "there are none"
        super().__init__(f"unknown {kind} {name!r}; {hint}", remedy=remedy)


class ConfigError(InputError):
    """Invalid option, or options that cannot be combined."""


class StructuredOutputError(ConfigError):
    """Constraint on an answer that is invalid, unsupported, too large, or that no token continues."""


class BaseModelError(InputError, OSError):
    """Base model that cannot be found, downloaded, read or used."""


class CacheError(InputError, OSError):
    """Cache entry that is damaged or cannot be written."""


class ExpertError(InputError):
    """Expert directory that is damaged, incomplete or holds invalid values."""


class FingerprintError(ExpertError):
    """Expert made on another base than the one it is loaded on."""


class HubError(InputError, OSError):
    """Hub that refuses, cannot be reached, or lacks the requested repository."""


class TaskError(InputError):
    """Task that cannot be built, or whose splits or grader are unsound."""


class DataError(InputError):
    """Data file that cannot be read, or an invalid row; names file and line."""


class ContextError(InputError):
    """Prompt longer than the model's context."""


class PromptError(ContextError):
    """Prompt that the model cannot read at any length."""


class OutputError(InputError, OSError):
    """Output path that cannot be written, is full, or is in use by another run."""


class DiskFullError(OutputError):
    """Output beyond the space of a disk, a quota, or a limit of the file's size."""


class DivergedError(SigmixError, ArithmeticError):
    """Training stopped by NaN or collapse; the message holds the diagnosis."""
