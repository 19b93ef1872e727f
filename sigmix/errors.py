"""The error tree. Every error a user can cause names the thing, what was expected and how to mend it.

The command line prints ``str(error)`` on one line of stderr and exits with ``error.exit_code``: 2 for input that
the user can mend, 1 for a failure of the work itself. Nothing here imports anything, so every module may use it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SigmixError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: what was found and what was expected, one sentence, naming the thing.
        remedy: what to do about it, ideally a command to run. Appended to the message.
    """

    exit_code = 1

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        self.message = " ".join(str(message).split())
        self.remedy = " ".join(remedy.split()) if remedy else None
        super().__init__(f"{self.message} -> {self.remedy}" if self.remedy else self.message)


class InputError(SigmixError):
    """Input that the user can mend: an option, a file, a name. Exit code 2."""

    exit_code = 2


class UnknownNameError(InputError):
    """A name that nothing is registered under; the message lists the nearest valid names."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, remedy: str | None = None) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known[:8]
        hint = f"nearest: {', '.join(near)}" if near else "there are none"
        super().__init__(f"unknown {kind} {name!r}; {hint}", remedy=remedy)


class ConfigError(InputError):
    """An option or a combination of options that cannot work."""


class BaseModelError(InputError):
    """A base model that cannot be found, fetched, read or used."""


class CacheError(InputError):
    """A cache entry that is damaged or cannot be written."""


class ExpertError(InputError):
    """An expert directory that is damaged, incomplete or holds values that no expert can have."""


class FingerprintError(ExpertError):
    """An expert that was made on another base than the one it is loaded on."""


class HubError(InputError):
    """A hub that refuses, cannot be reached, or has not what was asked for."""


class TaskError(InputError):
    """A task that cannot be built, or whose splits or verifier are not sound."""


class DataError(InputError):
    """A data file that cannot be read, or a row without what the task needs; names file and line."""


class ContextError(InputError):
    """A prompt longer than the model's context."""


class OutputError(InputError):
    """An output place that cannot be written, is full, or is in use by another run."""


class DivergedError(SigmixError):
    """Training that stopped because of NaN or collapse; the message holds the diagnosis."""
