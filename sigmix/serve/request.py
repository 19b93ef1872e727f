"""From a request to the batcher and back, whole or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from sigmix.errors import OutputError, SigmixError
from sigmix.serve.adaptation import arm_and_context
from sigmix.serve.auth import Key
from sigmix.serve.fair_queue import QueueFull
from sigmix.serve.protocol import ApiError, ChatForm, Choice, Generate, PlainForm, about, busy, from_sigmix, usage
from sigmix.serve.scheduler import Closing, Event, Failed, Finished, Job, Started, Token
from sigmix.serve.service import Service

log = logging.getLogger("sigmix.serve")


SILENCE = 15.0
"""Seconds after which a stream that has nothing to say says so, to keep the connection open."""


FAILED = {"model": 503, "mix": 404, "time": 504, "closing": 503, "internal": 500}


class Gone(Exception):
    """The client has left."""


class Answering:
    """One request for text: several prompts, each with ``n`` answers, numbered through.

    Args:
        service: the server's parts. request: to notice that the client leaves. key: whose it is.
        asked: what is wanted. prompts: (token ids, the user's turn) of each. form: how replies look.
        top: most probable tokens to tell. logprobs: whether to tell log-probabilities at all.

    Raises:
        ApiError: it cannot be answered.
    """

    def __init__(
        self,
        service: Service,
        request: Request,
        key: Key,
        asked: Generate,
        prompts: Sequence[tuple[list[int], str]],
        form: type[ChatForm] | type[PlainForm],
        limit: int | None,
        top: int,
        logprobs: bool,
    ) -> None:
        self.service, self.request, self.key, self.asked = service, request, key, asked
        self.logprobs = logprobs
        self.form = form(
            form.prefix + uuid.uuid4().hex, asked.model, int(time.time()), service.fingerprint, service.token_text
        )
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        settings = service.settings
        if asked.n > settings.max_choices or len(prompts) > settings.max_choices:
            message = f"this server gives {settings.max_choices} answers, or answers to as many prompts, at most"
            raise ApiError(400, message, param="n")
        if asked.n > settings.rows:
            raise ApiError(400, f"n must be at most {settings.rows}", param="n")
        try:
            mix = service.catalogue.resolve(asked.model)
        except SigmixError as error:
            raise from_sigmix(error, "model") from error
        policy = (asked.sigmix.policy if asked.sigmix else None) or ""
        try:
            policy = service.decider.check(policy)
            lengths = [service.check_length(ids, limit) for ids, _ in prompts]
        except SigmixError as error:
            raise from_sigmix(error) from error
        most = key.max_new_tokens or settings.max_new_tokens
        seed = asked.seed if asked.seed is not None else secrets.randbits(31)
        temperature = settings.default_temperature if asked.temperature is None else asked.temperature
        self.jobs = [
            Job(
                key.name, ids, mix, self._deliver(number), text, policy, asked.n, min(length, most), temperature,
                1.0 if asked.top_p is None else asked.top_p, seed + number * asked.n, asked.stops(), top,
                time.monotonic() + settings.request_seconds,
            )
            for number, ((ids, text), length) in enumerate(zip(prompts, lengths, strict=True))
        ]  # fmt: skip
        self.choices = [Choice() for _ in range(asked.n * len(prompts))]
        self.about: list[dict[str, Any] | None] = [None] * len(prompts)
        self._first = True
        self._since = time.monotonic()

    def _deliver(self, number: int) -> Any:
        def deliver(event: Event) -> None:
            # the loop may be closed already when a server goes down
            try:
                self.loop.call_soon_threadsafe(self.queue.put_nowait, (number, event))
            except RuntimeError:
                log.debug("an event came after the end of the loop")

        return deliver

    def submit(self) -> None:
        """Hand the jobs to the batcher.

        Raises:
            ApiError: too many wait, or the server is going down.
        """
        done: list[Job] = []
        try:
            for job in self.jobs:
                self.service.batcher.submit(job)
                done.append(job)
        except (QueueFull, Closing) as error:
            for job in done:
                self.service.batcher.cancel(job)
            if isinstance(error, Closing):
                raise ApiError(503, "the server is going down", "server_error", "closing", retry=5) from error
            rows, waiting = self.service.batcher.load()
            raise busy(str(error), 1 + waiting / max(rows, 1)) from error

    # ------------------------------------------------------------------ events

    async def events(self, silence: float | None = None) -> AsyncIterator[tuple[int, Event] | None]:
        """What happens, until all is done; None after ``silence`` seconds in which nothing did.

        Raises:
            Gone: the client has left.
        """
        gone = asyncio.ensure_future(self._gone())
        following: asyncio.Future[Any] | None = None
        left = len(self.choices)
        try:
            while left:
                following = following or asyncio.ensure_future(self.queue.get())
                await asyncio.wait({gone, following}, timeout=silence, return_when=asyncio.FIRST_COMPLETED)
                if following.done():
                    number, event = following.result()
                    following = None
                    left -= isinstance(event, Finished)
                    yield number, event
                    if isinstance(event, Failed):
                        return
                elif gone.done():
                    raise Gone
                else:
                    yield None
        finally:
            gone.cancel()
            if following is not None:
                following.cancel()
            for job in self.jobs:
                self.service.batcher.cancel(job)

    async def _gone(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    def _count(self, number: int, event: Event) -> Choice | None:
        """Keep what an event says; returns the answer that it is about."""
        if isinstance(event, Started):
            self.about[number] = about(event.decision, event.waited)
            self._note(event)
            return None
        if isinstance(event, Failed):
            raise ApiError(
                FAILED[event.kind], event.message, "server_error", event.kind, retry=5 if event.kind != "mix" else None
            )
        choice = self.choices[number * self.asked.n + event.index]
        choice.text += event.piece
        if isinstance(event, Token):
            choice.tokens.append(event)
            if self._first:
                self._first = False
                self.service.metrics.first.observe(time.monotonic() - self._since)
        else:
            choice.finish = event.reason
        return choice

    def _note(self, event: Started) -> None:
        """Keep what feedback on this reply could be learned from; an answer does not fail because that fails."""
        if len(self.choices) > 1:
            return
        arm, context = arm_and_context(event.decision)
        try:
            self.service.state.note_reply(self.form.head["id"], self.key.name, arm, context)
        except (OutputError, SigmixError):
            log.warning("a reply could not be noted for feedback", exc_info=True)

    def _usage(self) -> dict[str, int]:
        return usage(sum(len(job.ids) for job in self.jobs), sum(len(choice.tokens) for choice in self.choices))

    def _sigmix(self) -> Any:
        return self.about[0] if len(self.about) == 1 else self.about

    # ------------------------------------------------------------------ answers

    async def response(self) -> Response:
        """The answer, whole or as a stream.

        Raises:
            ApiError: there is none. A stream that has begun ends with an event that holds the error.
        """
        self.submit()
        if not self.asked.stream:
            try:
                async for found in self.events():
                    assert found is not None
                    self._count(*found)
            except Gone:
                return Response(status_code=499)
            made = [self.form.choice(i, choice, self.logprobs) for i, choice in enumerate(self.choices)]
            return JSONResponse(self.form.whole(made, self._usage(), self._sigmix()))
        events = self.events(SILENCE)
        # the status can still say what is wrong until the first event of every prompt is there
        early: list[tuple[int, Event]] = []
        try:
            async for found in events:
                if found is None:
                    continue
                early.append(found)
                if isinstance(found[1], Failed):
                    self._count(*found)
                break
        except Gone:
            return Response(status_code=499)
        except ApiError:
            await events.aclose()  # type: ignore[attr-defined]
            raise
        return StreamingResponse(self._stream(early, events), media_type="text/event-stream")

    async def _stream(self, early: list[tuple[int, Event]], events: AsyncIterator[Any]) -> AsyncIterator[str]:
        try:
            for found in early:
                for line in self._lines(*found):
                    yield line
            async for found in events:
                if found is None:
                    yield ": waiting\n\n"
                    continue
                for line in self._lines(*found):
                    yield line
            if self.asked.stream_options and self.asked.stream_options.include_usage:
                yield _line(self.form.part([], usage=self._usage()))
            yield "data: [DONE]\n\n"
        except Gone:
            return
        except ApiError as error:
            yield _line(error.body())
            yield "data: [DONE]\n\n"
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    def _lines(self, number: int, event: Event) -> list[str]:
        choice = self._count(number, event)
        if choice is None:
            start = number * self.asked.n
            first = [self.form.first(start + index) for index in range(self.asked.n)]
            return [_line(self.form.part([one for one in first if one], sigmix=self.about[number]))]
        assert isinstance(event, (Token, Finished))
        index = number * self.asked.n + event.index
        made = []
        tokens = [event] if isinstance(event, Token) else []
        if event.piece or (self.logprobs and tokens):
            offset = len(choice.text) - len(event.piece)
            made.append(self.form.piece(index, event.piece, tokens, self.logprobs, offset))
        if isinstance(event, Finished):
            made.append(self.form.last(index, event.reason))
        return [_line(self.form.part([one])) for one in made]


def _line(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
