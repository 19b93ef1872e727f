"""Continuous-batching scheduler: the thread that owns the model.

Between decoding steps it admits queued requests, chooses the mixtures of those with the model `auto`, and drops
cancelled or expired ones. Events are delivered from this thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from sigmix.adapt import OTHER, Decision, TwoPass
from sigmix.adapt.two_pass import AUTO
from sigmix.engine import Engine
from sigmix.engine.continuous_batching import ContinuousBatch
from sigmix.engine.detokenizer import StreamingDetokenizer
from sigmix.engine.generation import SamplingParams, SequenceState, TokenLogprobs
from sigmix.engine.prefix_cache import Entry, StoredPrefix
from sigmix.errors import SigmixError, StructuredOutputError, UnknownNameError
from sigmix.experts.mix import Mix
from sigmix.serve.fair_queue import FairQueue
from sigmix.serve.observability import Metrics
from sigmix.serve.settings import Settings

if TYPE_CHECKING:
    from llguidance import LLMatcher

log = logging.getLogger("sigmix.serve")

T = TypeVar("T")

MAX_PREFILL_TOKENS = 1024  # prompt tokens admitted between two steps


@dataclass(frozen=True)
class Started:
    """The request left the queue; its mixture is decided."""

    decision: Decision
    queue_seconds: float


@dataclass(frozen=True)
class PromptLogprobs:
    """Log-probabilities of the next tokens of the prompt, from its second one on."""

    logprobs: list[TokenLogprobs]


@dataclass(frozen=True)
class Token:
    """Token of the prompt, or generated token of the choice ``index``."""

    index: int
    id: int
    logprob: float | None  # natural; None: the first token of the prompt
    top: list[tuple[int, float]]  # most probable tokens, with natural log-probabilities
    text: str = ""  # became final with this token
    offset: int = 0  # of the token's first character in the choice's text


@dataclass(frozen=True)
class Finished:
    """End of one choice: "stop" or "length"; ``text`` is the rest of its text."""

    index: int
    reason: str
    text: str = ""


@dataclass(frozen=True)
class Failed:
    """End of the whole request without a result.

    Attributes:
        code: "model" (logits are not finite), "mix" (mixture unavailable), "structured_output" (a constraint that
            cannot be continued), "memory", "timeout", "closing" or "internal".
    """

    code: str
    message: str


INTERNAL = Failed("internal", "internal server error")

Event = Started | PromptLogprobs | Token | Finished | Failed


@dataclass(eq=False)
class GenerationRequest:
    """Prompt with one or more choices to generate.

    Attributes:
        mix: mixture; None: the strategy decides on ``text``, the user turn.
        on_event: receives every event, in the scheduler's thread.
        matcher: constraint on every choice, at its beginning, from `Engine.compile_grammar`.
        continues: the text continues the prompt, so its first space is kept; False: a reply, a text of its own.
        visible_tokens: texts of special tokens that are part of the text.
        deadline: `time.monotonic` after which the request is given up.
    """

    client: str
    ids: list[int]
    mix: Mix | None
    on_event: Callable[[Event], None]
    text: str = ""
    strategy: str = ""
    params: SamplingParams = field(default_factory=SamplingParams)  # except the seed
    seeds: Sequence[int] = (0,)  # one per choice; none: the request ends once its mixture is decided
    stop_strings: tuple[str, ...] = ()
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    matcher: LLMatcher | None = None
    continues: bool = False
    visible_tokens: tuple[str, ...] = ()
    deadline: float = float("inf")
    queued_at: float = field(default_factory=time.monotonic)
    running: list[SequenceState] = field(default_factory=list)  # choices that are still decoding

    @property
    def max_length(self) -> int:
        """Largest number of tokens of one sequence."""
        return len(self.ids) + self.params.max_new_tokens


class ClosingError(Exception):
    """The server is shutting down and accepts no requests."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class Scheduler:
    """Continuous batching for many clients.

    Args:
        engine: used by this thread, and between its steps by others.
        strategies: {name: two-pass runner} for requests without a mixture.
        settings: limits of queue and batch.
    """

    def __init__(self, engine: SharedEngine, strategies: Mapping[str, TwoPass], settings: Settings) -> None:
        self.engine, self.strategies, self.settings = engine, strategies, settings
        self.metrics = Metrics(self.load)
        self.queue = FairQueue(settings.max_queue_size, settings.max_queue_size_per_client)
        self.batch = ContinuousBatch(engine, isolate=True)
        self._running: set[GenerationRequest] = set()
        self._cancelled: deque[GenerationRequest] = deque()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._wake = threading.Condition()  # guards queue, _running, _cancelled, _calls and the two flags
        self._closing = self._stopped = False
        self._generated = 0
        self._thread = threading.Thread(target=self._run, name="sigmix-scheduler", daemon=True)

    # Methods for other threads

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request.

        Raises:
            QueueFullError: too many queued requests.
            ClosingError: the server is shutting down.
        """
        with self._wake:
            if self._closing:
                raise ClosingError
            if self._stopped:
                raise RuntimeError("the scheduler has stopped; restart the server")
            self.queue.push(request)
            self._wake.notify()

    def cancel(self, request: GenerationRequest) -> None:
        """End a request without another event; no effect on a finished one."""
        with self._wake:
            if not self.queue.remove(request):
                self._cancelled.append(request)
            self._wake.notify()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function in the scheduler's thread between two steps.

        Raises:
            ClosingError: the server is shutting down.
        """
        future: Future[T] = Future()
        with self._wake:
            if self._stopped:
                raise ClosingError
            self._calls.append((future, function))
            self._wake.notify()
        return future

    def running(self) -> list[GenerationRequest]:
        """Return the admitted requests."""
        with self._wake:
            return list(self._running)

    def users(self, expert: str) -> int:
        """Return the number of running requests with a mixture that contains an expert."""
        return sum(request.mix is not None and expert in request.mix.weights for request in self.running())

    def load(self) -> tuple[int, int]:
        """Return (running sequences, queued requests)."""
        return len(self.batch), len(self.queue)

    @property
    def alive(self) -> bool:
        """True if the thread runs and accepts requests or calls."""
        return self._thread.is_alive() and not self._stopped

    def close(self, timeout: float) -> bool:
        """Stop accepting requests, finish the accepted ones, and give up the rest after ``timeout`` seconds.

        Returns:
            Whether all requests finished.
        """
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout)
        finished = not self._thread.is_alive()
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join()
        return finished

    # Methods of the scheduler's thread

    def _run(self) -> None:
        end = Failed("internal", "internal server error: the scheduler has stopped")
        try:
            self._loop()
            end = Failed("closing", "the server is shutting down")
        except BaseException:
            log.critical("the scheduler has stopped; restart the server", exc_info=True)
        finally:
            self._abort(end)

    def _loop(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(self._has_work)
                if self._stopped or (self._closing and not self.queue and not self._running):
                    break
                admitted = self._select()
                cancelled, self._cancelled = self._cancelled, deque()
                calls, self._calls = self._calls, deque()
            for future, function in calls:
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    self.batch.release()  # releases the engine
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)
            try:
                for request in cancelled:
                    self._finish(request)
                self._expire()
                if admitted:
                    self._admit(admitted)
                if self.batch:
                    self._step()
            except Exception:
                log.exception("the scheduler failed; all running requests are given up")
                self._give_up(INTERNAL)

    def _has_work(self) -> bool:
        pending = self.queue or self._running or self._cancelled or self._calls
        return bool(pending) or self._closing or self._stopped

    def _select(self) -> list[GenerationRequest]:
        """Pop the requests that fit into the batch now."""
        limits, selected = self.settings, list[GenerationRequest]()
        size = sum(len(request.seeds) for request in self._running)
        length = max((request.max_length for request in self._running), default=0)
        prefill = 0

        def fits(request: GenerationRequest) -> bool:
            new_size = size + len(request.seeds)
            return size == 0 or (
                new_size <= limits.max_batch_size
                and new_size * max(length, request.max_length) <= limits.max_batch_tokens
                and (not selected or prefill + len(request.ids) <= MAX_PREFILL_TOKENS)
            )

        while (request := self.queue.pop(fits)) is not None:
            self._running.add(request)
            selected.append(request)
            size, length = size + len(request.seeds), max(length, request.max_length)
            prefill += len(request.ids)
            self.queue.charge(request.client, prompt_tokens=len(request.ids))
        return selected

    def _admit(self, requests: Sequence[GenerationRequest]) -> None:
        self.batch.release()  # strategies use the engine
        now = time.monotonic()
        new = []
        for request, decision in zip(requests, self._decide(requests), strict=True):
            with self._isolating(request):
                self._start(request, decision, now - request.queued_at)
                new += request.running
            if not request.running:
                self._finish(request)
        self.batch.add(new)

    def _start(self, request: GenerationRequest, decision: Decision, queue_seconds: float) -> None:
        try:
            self.engine.z(decision.mix)  # the mixture's only check; an expert can be unloaded while it is queued
        except SigmixError as error:
            if request.mix is not None:
                self._finish(request, Failed("mix", str(error)))
                return
            decision = Decision(Mix.base(), OTHER, f"{decision.reason}; unavailable: {error}", decision.evidence)
        request.mix = decision.mix
        request.on_event(Started(decision, queue_seconds))
        self.metrics.on_start(request.mix.id, len(request.ids), queue_seconds)
        request.running = [self._sequence(request, index) for index in range(len(request.seeds))]

    def _decide(self, requests: Sequence[GenerationRequest]) -> list[Decision]:
        decisions: dict[GenerationRequest, Decision] = {}
        for strategy in dict.fromkeys(request.strategy for request in requests):
            decisions |= self._apply(strategy, [request for request in requests if request.strategy == strategy])
        return [decisions[request] for request in requests]

    def _apply(self, strategy: str, requests: Sequence[GenerationRequest]) -> dict[GenerationRequest, Decision]:
        """Return a strategy's decisions; the base model for requests on which it fails."""
        mixes = [AUTO if request.mix is None else request.mix for request in requests]
        try:
            decided = self.strategies[strategy].decide([request.text for request in requests], mixes)
            return dict(zip(requests, decided, strict=True))
        except Exception:
            log.exception("strategy %s failed", strategy)
        if len(requests) > 1:
            return {one: decision for one in requests for decision in self._apply(strategy, [one]).values()}
        (request,) = requests
        failed = Decision(Mix.base(), OTHER, "the strategy failed")
        return {request: failed if request.mix is None else Decision(request.mix, request.mix.id, "given")}

    def _sequence(self, request: GenerationRequest, index: int) -> SequenceState:
        prefix = request.ids if request.continues or request.matcher is not None else ()
        detokenizer = StreamingDetokenizer(
            self.engine.tokenizer, request.stop_strings, prefix, visible_tokens=request.visible_tokens
        )
        assert request.mix is not None

        def on_token(token: int, logprob: float, top: list[tuple[int, float]], text: str) -> None:
            self._generated += 1
            self.queue.charge(request.client, output_tokens=1)
            request.on_event(Token(index, token, logprob, top, text, detokenizer.offset))

        def on_prompt(logprobs: list[TokenLogprobs]) -> None:
            request.on_event(PromptLogprobs(logprobs))

        return SequenceState(
            prompt_ids=request.ids, params=replace(request.params, seed=request.seeds[index]), mix=request.mix,
            detokenizer=detokenizer, on_token=on_token,
            on_prompt=on_prompt if request.prompt_logprobs and index == 0 else None,
            top_logprobs=request.top_logprobs, cache_prefix=index == 0,
            matcher=None if request.matcher is None else request.matcher.deep_copy(),
            context=(request, index, detokenizer),
        )  # fmt: skip

    def _step(self) -> None:
        before, batch = self._generated, list(self.batch.sequences)
        running = [sequence for request in self._running for sequence in request.running]  # some still prefill
        self.batch.step()
        self._collect(running)
        if batch:
            self.metrics.batch_size.observe(len(batch))
            self.metrics.batch_mixes.observe(len({sequence.mix for sequence in batch}))
        self.metrics.tokens.labels("generated").inc(self._generated - before)
        if self.engine.lock.waiting:
            self.batch.release()

    def _collect(self, sequences: Sequence[SequenceState]) -> None:
        """Deliver the ends of sequences."""
        for sequence in sequences:
            request, index, detokenizer = sequence.context
            if not sequence.finish or sequence not in request.running:
                continue
            if sequence.error is not None:
                self._finish(request, _failure(sequence.error))
                continue
            with self._isolating(request):
                request.running.remove(sequence)
                request.on_event(Finished(index, sequence.finish, detokenizer.flush()))
            if not request.running:
                self._finish(request)

    @contextmanager
    def _isolating(self, request: GenerationRequest) -> Iterator[None]:
        """End a request, and no other, with an error that is raised inside this context."""
        try:
            yield
        except Exception as error:
            self._finish(request, _failure(error))

    def _expire(self) -> None:
        now = time.monotonic()
        with self._wake:
            late = [request for request in self.queue if request.deadline < now]
            for request in late:
                self.queue.remove(request)
        for request in late:
            self._send(request, Failed("timeout", "timeout in the queue"))
        for request in [request for request in self._running if request.deadline < now]:
            self._finish(request, Failed("timeout", "timeout during generation"))

    def _finish(self, request: GenerationRequest, event: Failed | None = None) -> None:
        """Remove an admitted request; no effect on a finished one."""
        if request not in self._running:
            return
        if request.running:
            self.batch.remove(request.running)
            request.running = []
        with self._wake:
            self._running.discard(request)
            self.queue.finish(request.client)
        if event is not None:
            self._send(request, event)

    def _send(self, request: GenerationRequest, event: Failed) -> None:
        """Deliver the last event of a request."""
        try:
            request.on_event(event)
        except Exception:
            log.exception("an event could not be delivered")

    def _give_up(self, event: Failed) -> None:
        """Fail all running requests; start an empty batch."""
        try:
            self.batch.release()
        except Exception:
            log.exception("the engine's state could not be restored")
        self.batch = ContinuousBatch(self.engine, isolate=True)
        for request in list(self._running):
            request.running = []
            self._finish(request, event)

    def _abort(self, event: Failed) -> None:
        """Fail all requests and calls, and accept no more."""
        with self._wake:
            self._stopped = True
            queued, calls = list(self.queue), list(self._calls)
            for request in queued:
                self.queue.remove(request)
            requests = [*self._running, *queued]
            self._running.clear()
        for request in requests:
            self._send(request, event)
        for future, _ in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(ClosingError())
        self.batch.release()


def _failure(error: Exception) -> Failed:
    """Return the event of a request that an error ends."""
    if isinstance(error, UnknownNameError):
        return Failed("mix", str(error))
    if isinstance(error, StructuredOutputError):
        return Failed("structured_output", str(error))
    if isinstance(error, SigmixError):
        return Failed("model", str(error))
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return Failed("memory", "the server is out of memory")
    log.error("a request failed", exc_info=error)
    return INTERNAL


# --- Sharing the engine between threads


class FIFOLock:
    """Lock granted in order of arrival; `threading.Lock` lets a busy thread reacquire it before others wake up."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._tickets: deque[threading.Event] = deque()  # the first one holds the lock

    @property
    def waiting(self) -> int:
        """Number of blocked threads."""
        return max(len(self._tickets) - 1, 0)

    def __enter__(self) -> None:
        ticket = threading.Event()
        with self._mutex:
            self._tickets.append(ticket)
            if self._tickets[0] is ticket:
                ticket.set()
        ticket.wait()

    def __exit__(self, *_: object) -> None:
        with self._mutex:
            self._tickets.popleft()
            if self._tickets:
                self._tickets[0].set()


class SharedEngine(Engine):
    """Engine for several threads: its states and all that reads weights hold a FIFO lock, which is not reentrant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.lock = FIFOLock()
        super().__init__(*args, **kwargs)

    def z(self, mix: Mix) -> dict[str, torch.Tensor]:
        with self.lock:
            return super().z(mix)

    def cached_prefix(self, ids: Sequence[int], mix: Mix) -> StoredPrefix | None:
        with self.lock:
            return super().cached_prefix(ids, mix)

    def cache_prefix(self, ids: Sequence[int], mix: Mix, entry: Entry) -> None:
        with self.lock:
            super().cache_prefix(ids, mix, entry)

    @contextmanager
    def _switched(self) -> Iterator[None]:
        with self.lock, super()._switched():
            yield
