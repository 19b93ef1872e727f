"""What a request is to the batcher, and what the batcher tells about it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from sigmix.adapt import Decision
from sigmix.engine.running import Member
from sigmix.experts.mix import Mix

NUMBERS = itertools.count()


@dataclass(frozen=True)
class Started:
    """Pass one is done. ``seconds`` that the request had waited before; prompts are being read."""

    decision: Decision
    waited: float


@dataclass(frozen=True)
class Token:
    """A token of answer number ``index``; ``best`` are the most probable ones with natural log-probabilities."""

    index: int
    id: int
    logprob: float
    best: list[tuple[int, float]]
    piece: str


@dataclass(frozen=True)
class Finished:
    """Answer number ``index`` ended: "stop" or "length"; ``piece`` is what was held back of its text."""

    index: int
    reason: str
    piece: str = ""


@dataclass(frozen=True)
class Failed:
    """The whole request ended without an answer.

    Attributes:
        kind: "model" (its logits were not finite), "mix" (an expert is gone), "time", "closing" or "internal".
    """

    kind: str
    message: str


Event: TypeAlias = "Started | Token | Finished | Failed"


@dataclass(eq=False)
class Job:
    """One request, with ``n`` answers to one prompt.

    Attributes:
        client: whose turn it counts as. ids: the prompt's tokens.
        mix: what answers; None: ``policy`` decides on ``text``, the user's turn.
        policy: name of what decides, see `sigmix.serve.deciding`.
        deadline: `time.monotonic` after which it is given up. deliver: told every event, in the batcher's thread.
        members: of answers that are under way. context: whatever the caller wants to find here again.
    """

    client: str
    ids: list[int]
    mix: Mix | None
    deliver: Callable[[Event], None]
    text: str = ""
    policy: str = ""
    n: int = 1
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    top: int = 0
    deadline: float = float("inf")
    number: int = field(default_factory=lambda: next(NUMBERS))
    since: float = field(default_factory=time.monotonic)
    members: list[Member] = field(default_factory=list)
    context: Any = None

    @property
    def width(self) -> int:
        """Tokens that a row of it can come to."""
        return len(self.ids) + self.max_new_tokens


@dataclass(frozen=True)
class Limits:
    """Of a batch.

    Attributes:
        rows: answers that decode together. tokens: rows times the tokens that the longest may come to; a job that is
            larger runs alone. reading: prompt tokens that are admitted between two steps.
        waiting, each: jobs that wait at most, in all and of one client.
    """

    rows: int = 32
    tokens: int = 65536
    reading: int = 1024
    waiting: int = 256
    each: int = 64


class Decides(Protocol):
    """Pass one: a decision for each job, in order; called in the batcher's thread."""

    def __call__(self, jobs: Sequence[Job]) -> list[Decision]: ...


class Watch(Protocol):
    """Told what happens, for metrics."""

    def stepped(self, rows: int, tokens: int, waiting: int, mixes: int) -> None: ...

    def started(self, job: Job, waited: float) -> None: ...


class Closing(Exception):
    """The server is going down and takes no more jobs."""
