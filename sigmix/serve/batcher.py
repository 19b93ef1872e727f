"""The thread that owns the model: it admits jobs, decides on their mixes, and steps the batch that they share."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from sigmix.adapt import OTHER, Decision
from sigmix.engine.running import Member, Running
from sigmix.errors import SigmixError
from sigmix.experts.mix import Mix
from sigmix.serve.fair import FairQueue
from sigmix.serve.jobs import Closing, Decides, Failed, Finished, Job, Limits, Started, Token, Watch
from sigmix.serve.pieces import Pieces
from sigmix.serve.turnstile import SharedEngine

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
