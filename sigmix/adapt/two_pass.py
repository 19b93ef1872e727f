"""Both passes: decide on a mix for every request, then answer all of them in one mixed batch.

Pass two reads the requests again. It never goes on from pass one's keys and values: those are the base's, and the
weights are others now.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sigmix.adapt.base import DISPATCH, Decision, Strategy
from sigmix.adapt.classifier import ClassifierDispatch
from sigmix.adapt.probe import FILE, ProbeDispatch
from sigmix.adapt.prompt import PromptDispatch
from sigmix.engine.generation import Generation
from sigmix.errors import UnknownNameError


@dataclass(frozen=True)
class Answer:
    """One answer with the decision behind it; ``text`` is the generation's."""

    decision: Decision
    generation: Generation

    @property
    def text(self) -> str:
        return self.generation.text


@dataclass
class TwoPass:
    """A strategy and the engine that it decides for.

    Attributes:
        seconds: of pass one and pass two in the last `generate`.
    """

    engine: Any
    strategy: Strategy
    seconds: tuple[float, float] = (0.0, 0.0)

    def generate(self, prompts: Sequence[str], **options: Any) -> list[Answer]:
        """Answer requests (user turns); ``options`` are those of `Engine.generate`, less ``mix``."""
        started = time.perf_counter()
        decisions = self.strategy.decide(prompts)
        decided = time.perf_counter()
        done = self.engine.generate(prompts, [decision.mix for decision in decisions], **options)
        self.seconds = decided - started, time.perf_counter() - decided
        return [Answer(decision, generation) for decision, generation in zip(decisions, done, strict=True)]


# --- Opening a strategy by its letter, its name, or "auto".


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
