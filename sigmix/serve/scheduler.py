"""What a request is to the batcher, and what the batcher tells about it."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch

from sigmix.adapt import OTHER, Decision
from sigmix.engine import Engine
from sigmix.engine.continuous_batching import Member, Running
from sigmix.engine.detokenizer import Pieces
from sigmix.engine.prefix_cache import Entry, StoredPrefix
from sigmix.errors import SigmixError
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix
from sigmix.serve.fair_queue import FairQueue

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
        policy: name of what decides, see `sigmix.serve.adaptation`.
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


# --- The thread that owns the model: it admits jobs, decides on their mixes, and steps the batch that they share.


log = logging.getLogger("sigmix.serve")


class Batcher:
    """Continuous batching for many clients.

    Args:
        engine: its model is used by this thread alone, but for what goes through the engine's turnstile.
        decide: pass one. limits: of the batch. form: see `Running`. watch: metrics.
    """

    def __init__(
        self,
        engine: SharedEngine,
        decide: Decides,
        limits: Limits | None = None,
        form: str = "factored",
        watch: Watch | None = None,
    ) -> None:
        self.engine, self.decide, self.watch = engine, decide, watch
        self.limits = limits or Limits()
        self.queue: FairQueue[Job] = FairQueue(self.limits.waiting, self.limits.each)
        self._fresh = lambda: Running(engine, form)
        self.running: Running = self._fresh()
        self.jobs: set[Job] = set()  # under way
        self._cancelled: deque[Job] = deque()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._wake = threading.Condition()
        self._closing = self._stopped = False
        self._written = 0
        self._thread = threading.Thread(target=self._loop, name="sigmix-batcher", daemon=True)

    # ------------------------------------------------------------------ from other threads

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Add a job; its events come through ``job.deliver``.

        Raises:
            QueueFull: too many wait. Closing: the server is going down.
        """
        with self._wake:
            if self._closing:
                raise Closing
            self.queue.push(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """End a job without another event; one that has ended is passed over."""
        with self._wake:
            if not self.queue.remove(job):
                self._cancelled.append(job)
            self._wake.notify()

    def call(self, work: Callable[[], Any]) -> Future[Any]:
        """Let the batcher's thread do something between two steps, when no job is half admitted."""
        future: Future[Any] = Future()
        with self._wake:
            if self._stopped:
                raise Closing
            self._calls.append((future, work))
            self._wake.notify()
        return future

    def using(self, name: str) -> int:
        """Jobs under way whose mix has an expert; meant for `call`."""
        return sum(job.mix is not None and name in job.mix.weights for job in self.jobs)

    def close(self, patience: float) -> bool:
        """Take no more jobs, finish those there are, give up what is left after ``patience`` seconds.

        Returns:
            Whether all were finished.
        """
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(patience)
        finished = not self._thread.is_alive()
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join()
        return finished

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def load(self) -> tuple[int, int]:
        """(rows under way, jobs that wait)."""
        return len(self.running), len(self.queue)

    # ------------------------------------------------------------------ the thread

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not self._busy():
                    self._wake.wait()
                if self._stopped or (self._closing and not self.queue and not self.jobs):
                    break
                chosen = self._next()
                dropped = [self._cancelled.popleft() for _ in range(len(self._cancelled))]
                calls = [self._calls.popleft() for _ in range(len(self._calls))]
            for future, work in calls:
                try:
                    self.running.rest()  # so that it can have the engine
                    future.set_result(work())
                except Exception as error:
                    future.set_exception(error)
            try:
                self._drop(dropped)
                self._expire()
                if chosen:
                    self._begin(chosen)
                if self.running:
                    self._step()
            except Exception:
                log.exception("a step failed; its requests are given up")
                self._give_up("internal", "the server failed on this batch of requests")
        self._give_up("closing", "the server is going down")

    def _busy(self) -> bool:
        waits = self.queue or self.jobs or self._cancelled or self._calls
        return bool(waits) or self._closing or self._stopped

    def _next(self) -> list[Job]:
        """Jobs to admit now; holds the lock."""
        found: list[Job] = []
        rows = sum(job.n for job in self.jobs)
        widest = max((job.width for job in self.jobs), default=0)
        reading = 0

        def fits(job: Job) -> bool:
            if not rows:
                return True
            wide = max(widest, job.width)
            room = rows + job.n <= self.limits.rows and (rows + job.n) * wide <= self.limits.tokens
            return room and (not found or reading + len(job.ids) <= self.limits.reading)

        while (job := self.queue.pop(fits)) is not None:
            found.append(job)
            rows, widest, reading = rows + job.n, max(widest, job.width), reading + len(job.ids)
            self.queue.charge(job.client, read=len(job.ids))
        self.jobs.update(found)
        return found

    def _begin(self, jobs: Sequence[Job]) -> None:
        self.running.rest()  # pass one uses the engine
        now = time.monotonic()
        undecided = [job for job in jobs if job.mix is None]
        decided = dict(zip(map(id, undecided), self._decisions(undecided), strict=True))
        members = []
        for job in jobs:
            decision = decided.get(id(job))
            if decision is None:
                assert job.mix is not None
                decision = Decision(job.mix, "", "the request asked for it")
            job.mix = decision.mix
            try:
                self.engine.z(job.mix)
            except SigmixError as error:  # an expert that was unloaded while the job waited
                self._close(job, Failed("mix", str(error)))
                continue
            job.deliver(Started(decision, now - job.since))
            if self.watch is not None:
                self.watch.started(job, now - job.since)
            job.members = [self._member(job, index) for index in range(job.n)]
            members += job.members
        if members:
            self.running.join(members)
            self._ended(members)

    def _decisions(self, jobs: list[Job]) -> list[Decision]:
        if not jobs:
            return []
        try:
            return self.decide(jobs)
        except Exception:
            log.exception("pass one failed; the base answers")
            return [Decision(Mix.base(), OTHER, "pass one failed, so the base answers") for _ in jobs]

    def _member(self, job: Job, index: int) -> Member:
        pieces = Pieces(self.engine.tokenizer, job.stop)
        assert job.mix is not None

        def take(token: int, logprob: float, best: list[tuple[int, float]]) -> bool:
            self._written += 1
            piece = "" if token in self.engine.ends else pieces.add(token)
            job.deliver(Token(index, token, logprob, best, piece))
            return pieces.stopped is not None

        return Member(
            job.ids, job.mix, take, job.max_new_tokens, job.temperature, job.top_p, job.seed + index, job.top,
            remember=index == 0, context=(job, index, pieces),
        )  # fmt: skip

    def _step(self) -> None:
        members = list(self.running.members)
        everyone = [member for job in self.jobs for member in job.members]  # a prompt's last part may be all it takes
        before = self._written
        self.running.step()
        self._ended(everyone)
        for job in {member.context[0] for member in members}:
            self.queue.charge(job.client, written=sum(member.context[0] is job for member in members))
        if self.watch is not None:
            mixes = len({member.mix for member in members})
            self.watch.stepped(len(members), self._written - before, len(self.queue), mixes)
        if self.engine.turnstile.waiting:
            self.running.rest()

    def _ended(self, members: Sequence[Member]) -> None:
        """Tell the jobs whose answers have ended."""
        for member in members:
            job, index, pieces = member.context
            if not member.finish or member not in job.members:
                continue
            if member.finish == "error":
                self.running.leave(job.members)
                job.members = []
                self._close(job, Failed("model", f"under {member.mix.id} the model's values are not finite"))
                continue
            job.members.remove(member)
            job.deliver(Finished(index, member.finish, pieces.end()))
            if not job.members:
                self._close(job)

    def _drop(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if job in self.jobs:
                self.running.leave(job.members)
                self._close(job)

    def _expire(self) -> None:
        now = time.monotonic()
        for job in [job for job in self.jobs if job.deadline < now and job.members]:
            self.running.leave(job.members)
            self._close(job, Failed("time", "the answer took longer than this server allows"))
        with self._wake:
            late = [job for job in self.queue if job.deadline < now]
            for job in late:
                self.queue.remove(job)
        for job in late:
            job.deliver(Failed("time", "the request waited longer than this server allows"))

    def _close(self, job: Job, event: Any = None) -> None:
        with self._wake:
            self.jobs.discard(job)
            self.queue.done(job.client)
        if event is not None:
            job.deliver(event)

    def _give_up(self, kind: str, message: str) -> None:
        """Fail all jobs under way, and those that wait if the server closes; begin with an empty batch."""
        try:
            self.running.rest()
        except Exception:
            log.exception("the batch's state could not be left")
        self.running = self._fresh()
        for job in list(self.jobs):
            self._close(job, Failed(kind, message))
        if kind == "closing":
            with self._wake:
                left = list(self.queue)
                for job in left:
                    self.queue.remove(job)
            for job in left:
                job.deliver(Failed(kind, message))


# --- One model, several threads: whoever wants the engine gets it in the order of asking.


class Turnstile:
    """A first-come, first-served lock. Python's own lets a busy thread take it again before those who wait wake up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[threading.Event] = deque()
        self._held = False

    @property
    def waiting(self) -> int:
        """How many threads wait."""
        return len(self._queue)

    def __enter__(self) -> None:
        with self._lock:
            if not self._held:
                self._held = True
                return
            mine = threading.Event()
            self._queue.append(mine)
        mine.wait()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._queue:
                self._queue.popleft().set()  # handed over: it stays held
            else:
                self._held = False


class SharedEngine(Engine):
    """An `Engine` for several threads: between entering and leaving `under` it belongs to one of them.

    A thread must not enter it twice, nor call what takes the turnstile while it has entered.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.turnstile = Turnstile()
        super().__init__(*args, **kwargs)

    def z(self, mix: Mix) -> dict[str, torch.Tensor]:
        """See `Engine.z`; an expert is checked against the base's own weights, which no other thread may have moved."""
        with self.turnstile:
            return super().z(mix)

    def check(self, expert: Expert) -> None:
        """Check an expert that is in no bank yet; see `Expert.check`."""
        with self.turnstile:
            expert.check(self.model)

    def known_beginning(self, ids: Sequence[int], mix: Mix, form: str | None = None) -> StoredPrefix | None:
        """See `Engine.known_beginning`."""
        with self.turnstile:
            return super().known_beginning(ids, mix, form)

    def keep_beginning(self, ids: Sequence[int], mix: Mix, entry: Entry, form: str | None = None) -> None:
        """See `Engine.keep_beginning`."""
        with self.turnstile:
            super().keep_beginning(ids, mix, entry, form)

    @contextmanager
    def _turn_of(self, mixes: list[Mix], form: str | None) -> Iterator[tuple[Any, int]]:
        with self.turnstile, super()._turn_of(mixes, form) as entered:
            yield entered
