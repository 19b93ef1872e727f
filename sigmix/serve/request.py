"""One generation request over HTTP: submission to the scheduler, then a whole response or a stream of events."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from sigmix.adapt.bandit import arm_and_context
from sigmix.engine.generation import choice_seed
from sigmix.errors import SigmixError
from sigmix.serve.auth import ApiKey
from sigmix.serve.fair_queue import QueueFullError
from sigmix.serve.protocol.builder import Choice, ResponseBuilder, decision_json
from sigmix.serve.protocol.errors import ApiError, api_errors, internal_error, rate_limited
from sigmix.serve.protocol.requests import ChatCompletionRequest, CompletionRequest
from sigmix.serve.scheduler import (
    ClosingError,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    PromptLogprobs,
    Started,
    Token,
)
from sigmix.serve.service import Service
from sigmix.serve.tool_parser import ToolCallParser

log = logging.getLogger("sigmix.serve")

T = TypeVar("T")

HEARTBEAT_SECONDS = 15.0  # interval of comments in a silent stream, which keep proxies from closing the connection

STATUS = {
    "model": 503, "memory": 503, "mix": 404, "structured_output": 400, "timeout": 504, "closing": 503, "internal": 500,
}  # fmt: skip
"""HTTP status by the code of `Failed`."""


class ClientDisconnected(Exception):
    """The client closed the connection."""


class RequestHandler:
    """Handler of a chat or text completion with several prompts, each with one or more choices, numbered through.

    Args:
        service: parts of the server.
        request: HTTP request, to detect a disconnect.
        key: API key of the client.
        options: parsed body.
        prompts: (token ids, user turn) of each prompt.
        echoes: text of each prompt, to be returned before every completion; None: only completions are returned.
        new_parser: returns a parser of tool calls for one reply; None: replies are text.
        builder: of the responses; default: chat or text completions.

    Raises:
        ApiError: invalid request.
    """

    def __init__(
        self, service: Service, request: Request, key: ApiKey, options: ChatCompletionRequest | CompletionRequest,
        prompts: Sequence[tuple[list[int], str]], echoes: Sequence[str] | None = None, *,
        new_parser: Callable[[], ToolCallParser] | None = None, builder: ResponseBuilder | None = None,
    ) -> None:  # fmt: skip
        self.service, self.request, self.key, self.options = service, request, key, options
        settings = service.settings
        self.count = count = options.choice_count()
        if (limit := min(settings.max_choices, settings.max_batch_size)) < count:
            name = "n" if count == options.n else "best_of"
            raise ApiError(400, f"{name} must be at most {limit}, not {count}", param=name)
        with api_errors("model"):
            mix = service.registry.resolve(options.model)
        with api_errors("sigmix.strategy"):
            strategy = service.check_strategy((options.sigmix and options.sigmix.strategy) or "")
        self.builder = builder or ResponseBuilder(
            isinstance(options, ChatCompletionRequest), options.model, service.fingerprint, service.token_bytes,
            options.logprob_count() is not None,
        )  # fmt: skip
        limits = []
        for number, (ids, _) in enumerate(prompts):
            param = "messages" if isinstance(options, ChatCompletionRequest) else "prompt"
            with api_errors(f"{param}.{number}" if len(prompts) > 1 else param):
                limits.append(service.fit_context(ids, options.token_limit()))
        params = options.sampling_params(settings.default_temperature)
        with api_errors("logit_bias"):  # the schema has checked the other options
            service.engine.check_params(params)
        parsers = [new_parser() for _ in range(count * len(prompts))] if new_parser else []
        seed = options.seed if options.seed is not None else secrets.randbits(31)
        self.started_at = time.monotonic()
        self.requests = [
            GenerationRequest(
                client=key.name, ids=ids, mix=mix, on_event=self._receiver(number), text=text, strategy=strategy,
                seeds=[choice_seed(seed, number * count + index) for index in range(count)],
                params=replace(params, max_new_tokens=min(limit, key.max_new_tokens or limit)),
                stop_strings=options.stop_strings, top_logprobs=options.logprob_count() or 0,
                prompt_logprobs=echoes is not None and options.logprob_count() is not None,
                continues=isinstance(options, CompletionRequest) or options.continue_final_message,
                visible_tokens=parsers[0].markers if parsers else (),
                deadline=self.started_at + settings.request_timeout,
            )
            for number, ((ids, text), limit) in enumerate(zip(prompts, limits, strict=True))
        ]  # fmt: skip
        self.choices = [Choice() for _ in range(count * len(prompts))]
        self.parsers = parsers
        self._sent_calls = [0] * len(self.choices)
        self.echoes = [Choice() for _ in prompts]
        self._prompt_tokens: list[Iterator[tuple[int, int]]] = [iter(())] * len(prompts)  # ids and offsets that follow
        for echo, text in zip(self.echoes, echoes or (), strict=False):
            echo.text = text
        self.decisions: list[dict[str, Any] | None] = [None] * len(prompts)
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def _receiver(self, number: int) -> Callable[[Event], None]:
        """Return a callback that moves events of prompt ``number`` from the scheduler's thread to the event loop."""

        def receive(event: Event) -> None:
            if isinstance(event, Token) and (shift := len(self.echoes[number].text)):
                event = replace(event, offset=event.offset + shift)
            try:
                self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))
            except RuntimeError:
                log.debug("event dropped: the event loop is closed")

        return receive

    def _submit(self) -> None:
        try:
            for request in self.requests:
                self.service.scheduler.submit(request)
        except (QueueFullError, ClosingError) as error:
            for request in self.requests:  # no effect on those that were not submitted
                self.service.scheduler.cancel(request)
            if isinstance(error, ClosingError):
                raise
            running, queued = self.service.scheduler.load()
            raise rate_limited(str(error), 1 + queued / max(running, 1)) from error

    async def _follow(self, heartbeat: float | None = None) -> AsyncGenerator[tuple[int, Event] | None, None]:
        """Yield (prompt number, event) until all choices have finished; None after ``heartbeat`` silent seconds.

        Raises:
            ClientDisconnected: the client closed the connection; its requests are cancelled.
        """
        unfinished = len(self.choices)
        try:
            async with aclosing(self._watch(self._events.get, heartbeat)) as events:
                async for item in events:
                    unfinished -= item is not None and isinstance(item[1], Finished)
                    yield item
                    if not unfinished:
                        break
        finally:
            for request in self.requests:
                self.service.scheduler.cancel(request)

    async def _watch(
        self, receive: Callable[[], Awaitable[T]], heartbeat: float | None = None
    ) -> AsyncGenerator[T | None, None]:
        """Yield what ``receive`` returns, again and again; None after ``heartbeat`` silent seconds.

        Raises:
            ClientDisconnected: the client closed the connection.
        """
        disconnected: asyncio.Future[Any] = asyncio.ensure_future(self._disconnected())
        upcoming: asyncio.Future[Any] | None = None
        try:
            while True:
                upcoming = upcoming or asyncio.ensure_future(receive())
                await asyncio.wait({disconnected, upcoming}, timeout=heartbeat, return_when=asyncio.FIRST_COMPLETED)
                if upcoming.done():
                    item, upcoming = upcoming.result(), None
                    yield item
                elif disconnected.done():
                    disconnected.result()
                    raise ClientDisconnected
                else:
                    yield None
        finally:
            pending: list[asyncio.Future[Any]] = [disconnected, *filter(None, [upcoming])]
            for future in pending:
                future.cancel()
            with anyio.CancelScope(shield=True):  # ``receive`` may have a connection to close
                await asyncio.gather(*pending, return_exceptions=True)

    async def _disconnected(self) -> None:
        """Return once the client has closed the connection."""
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    def _parse(self, number: int, event: Event) -> Event:
        """Return an event without the markup of tool calls, which are added to the choice."""
        if not self.parsers or not isinstance(event, (Token, Finished)):
            return event
        index = number * self.count + event.index
        parser = self.parsers[index]
        text = parser.feed(event.text, final=isinstance(event, Finished))
        self.choices[index].calls = parser.calls
        return replace(event, text=text)

    def _record(self, number: int, event: Event) -> None:
        """Add an event to the response.

        Raises:
            ApiError: the request failed.
        """
        if isinstance(event, Failed):
            status = STATUS[event.code]
            kind, retry_after = ("server_error", 5) if status >= 500 else ("invalid_request_error", None)
            raise ApiError(status, event.message, kind, code=event.code, retry_after=retry_after)
        if isinstance(event, Started):
            self.decisions[number] = decision_json(event.decision, event.queue_seconds)
            self._save_for_feedback(event)
            return
        if isinstance(event, PromptLogprobs):
            following = zip(event.logprobs, self._prompt_tokens[number], strict=False)
            self.echoes[number].tokens += [Token(0, id, *scores, offset=offset) for scores, (id, offset) in following]
            return
        choice = self.choices[number * self.count + event.index]
        choice.text += event.text
        if isinstance(event, Finished):
            choice.finish_reason = "tool_calls" if choice.calls and event.reason == "stop" else event.reason
            return
        if not any(other.tokens for other in self.choices):
            self.service.metrics.first_token_seconds.observe(time.monotonic() - self.started_at)
        choice.tokens.append(event)

    def _save_for_feedback(self, event: Started) -> None:
        if len(self.choices) > 1:
            return
        try:
            self.service.store.save_reply(self.builder.id, self.key.name, *arm_and_context(event.decision))
        except SigmixError:
            log.warning("reply not saved; it cannot receive feedback", exc_info=True)

    def _listed(self) -> Iterator[Choice]:
        """Yield the choices of the response: the best ones of each prompt, after its text with ``echo``."""
        for number, echo in enumerate(self.echoes):
            choices = self.choices[number * self.count : (number + 1) * self.count]
            if self.count > self.options.n:
                choices = sorted(choices, key=lambda choice: choice.mean_logprob, reverse=True)[: self.options.n]
            for choice in choices:
                yield replace(choice, text=echo.text + choice.text, tokens=echo.tokens + choice.tokens)

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(request.ids) for request in self.requests)
        completion = sum(len(choice.tokens) for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    async def respond(self) -> Response:
        """Return the response.

        Raises:
            ApiError: the request failed. A stream that has begun ends with an error event instead.
        """
        for number, (request, echo) in enumerate(zip(self.requests, self.echoes, strict=True)):
            if request.prompt_logprobs:
                offsets = await run_in_threadpool(self.service.text_offsets, request.ids, echo.text)
                self._prompt_tokens[number] = places = iter(zip(request.ids, offsets, strict=True))
                id, offset = next(places)
                echo.tokens = [Token(0, id, None, [], offset=offset)]
        name, output = self.options.structured_output()
        if output is not None:
            try:
                matcher = await run_in_threadpool(self.service.engine.compile_grammar, output)
            except SigmixError as error:
                raise ApiError(400, f"{name}: {error}", param=name) from error
            for request in self.requests:
                request.matcher = matcher
        self._submit()
        return await (self._streamed() if self.options.stream else self._whole())

    async def _whole(self) -> Response:
        try:
            async with aclosing(self._follow()) as events:
                async for item in events:
                    assert item is not None
                    number, event = item[0], self._parse(*item)
                    self._record(number, event)
                    if self.builder.incremental:
                        deque(self._events_of(number, event), maxlen=0)
        except ClientDisconnected:
            return Response(status_code=499)
        sigmix = self.decisions[0] if len(self.decisions) == 1 else self.decisions
        return JSONResponse(self.builder.response([*self._listed()], self._usage(), sigmix))

    async def _streamed(self) -> Response:
        lines = self._lines()
        try:
            first = await anext(lines)  # an error in the first event still sets the status
        except ClientDisconnected:
            return Response(status_code=499)
        return StreamingResponse(self._stream(first, lines), media_type="text/event-stream")

    async def _stream(self, first: str, lines: AsyncGenerator[str, None]) -> AsyncIterator[str]:
        async with aclosing(lines):
            yield first
            try:
                async for line in lines:
                    yield line
            except ClientDisconnected:
                return
            except ApiError as error:
                yield self.builder.failed(error)
            except Exception:
                log.exception("a stream failed")
                yield self.builder.failed(internal_error())
            yield self.builder.end

    async def _lines(self) -> AsyncGenerator[str, None]:
        """Yield the events of a stream, without the end; heartbeats only after the first event.

        Raises:
            ApiError: the request failed.
        """
        started = False
        async with aclosing(self._follow(HEARTBEAT_SECONDS)) as events:
            async for item in events:
                if item is not None:
                    number, event = item[0], self._parse(*item)
                    self._record(number, event)
                    for line in self._events_of(number, event):
                        started = True
                        yield line
                elif started:
                    yield ": waiting\n\n"
        include_usage = bool(self.options.stream_options and self.options.stream_options.include_usage)
        for line in self.builder.finish(self.choices, self._usage(), include_usage):
            yield line

    def _events_of(self, number: int, event: Event) -> Iterator[str]:
        """Yield the lines of a stream for an event that was recorded."""
        builder, request, echo = self.builder, self.requests[number], self.echoes[number]
        if isinstance(event, (Started, PromptLogprobs)):
            if not request.prompt_logprobs or len(echo.tokens) == len(request.ids):
                indices = range(number * self.count, (number + 1) * self.count)
                yield from builder.first(indices, echo, self.decisions[number])
            return
        assert isinstance(event, (Token, Finished))
        index = number * self.count + event.index
        choice = self.choices[index]
        calls = list(enumerate(choice.calls))[self._sent_calls[index] :]
        self._sent_calls[index] += len(calls)
        yield from builder.delta(index, event.text, [event] if isinstance(event, Token) else [], calls)
        if isinstance(event, Finished):
            yield from builder.last(index, choice)
