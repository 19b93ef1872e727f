"""What commands share about strategies: opening one by its letter, and saying what it decided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

AUTO = "auto"
LETTERS = {"A": "prompt", "B": "classifier", "D": "probe"}
STRATEGY = typer.Option(
    AUTO,
    help="How auto chooses: A (prompt), B (classifier), D (probe); auto: the bank's probe, else classifier, else A.",
)


def open_strategy(engine: Any, choice: str = AUTO) -> Any:
    """A strategy for an engine's bank, by letter, name or "auto".

    Raises:
        UnknownNameError: no such strategy. Others: see the strategies.
    """
    from sigmix.adapt import ClassifierDispatch, ProbeDispatch, PromptDispatch
    from sigmix.adapt.labels import DISPATCH
    from sigmix.adapt.probe import FILE
    from sigmix.errors import UnknownNameError

    bank = engine.bank
    names = {**{letter.lower(): letter for letter in LETTERS}, **{name: letter for letter, name in LETTERS.items()}}
    letter = names.get(choice.lower())
    if choice.lower() == AUTO:
        folder = getattr(bank, "folder", None)
        experts = [name for name in bank if bank[name].meta.get("domain") == DISPATCH]
        letter = "D" if folder is not None and (Path(folder) / FILE).is_file() else "B" if len(experts) == 1 else "A"
    if letter is None:
        raise UnknownNameError("strategy", choice, [*LETTERS, *LETTERS.values(), AUTO])
    return {"A": PromptDispatch, "B": ClassifierDispatch, "D": ProbeDispatch}[letter](engine)


def explained(decision: Any) -> str:
    """ "larger: the probe says comparing (99%)"."""
    return f"{decision.mix.id}: {decision.reason}"
