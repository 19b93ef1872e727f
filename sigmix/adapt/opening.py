"""Opening a strategy by its letter, its name, or "auto"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sigmix.adapt.labels import DISPATCH
from sigmix.adapt.probe import FILE, ProbeDispatch
from sigmix.adapt.prompt import ClassifierDispatch, PromptDispatch
from sigmix.errors import UnknownNameError

AUTO = "auto"
LETTERS = {"A": "prompt", "B": "classifier", "D": "probe"}


def letter_of(choice: str) -> str:
    """A, B, D or "auto", from a letter or a name in upper or lower case.

    Raises:
        UnknownNameError: no such strategy.
    """
    names = {**{letter.lower(): letter for letter in LETTERS}, **{name: letter for letter, name in LETTERS.items()}}
    if choice.lower() not in (*names, AUTO):
        raise UnknownNameError("strategy", choice, [*LETTERS, *LETTERS.values(), AUTO])
    return names.get(choice.lower(), AUTO)


def open_strategy(engine: Any, choice: str = AUTO) -> Any:
    """A strategy for an engine's bank; "auto" is the bank's probe if it has one, else its classifier, else A.

    Raises:
        UnknownNameError: no such strategy. Others: see the strategies.
    """
    letter, bank = letter_of(choice), engine.bank
    if letter == AUTO:
        folder = getattr(bank, "folder", None)
        experts = [name for name in bank if bank[name].meta.get("domain") == DISPATCH]
        letter = "D" if folder is not None and (Path(folder) / FILE).is_file() else "B" if len(experts) == 1 else "A"
    return {"A": PromptDispatch, "B": ClassifierDispatch, "D": ProbeDispatch}[letter](engine)
