"""Both passes: decide on a mix for every request, then answer all of them in one mixed batch.

Pass two reads the requests again. It never goes on from pass one's keys and values: those are the base's, and the
weights are others now.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sigmix.adapt.decision import Decision, Strategy
from sigmix.engine.engine import Generation


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
