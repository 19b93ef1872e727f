"""What commands share about strategies: opening one by its letter, and saying what it decided."""

from __future__ import annotations

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
    from sigmix.adapt.opening import open_strategy as opened

    return opened(engine, choice)


def explained(decision: Any) -> str:
    """ "larger: the probe says comparing (99%)"."""
    return f"{decision.mix.id}: {decision.reason}"
