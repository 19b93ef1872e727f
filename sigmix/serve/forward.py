"""One generation request over HTTP that an upstream answers, once this server has decided on the mixture."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

import httpx
from starlette.responses import JSONResponse, Response

from sigmix.engine.tokenization import TEMPLATE_DEFAULTS, chat_template
from sigmix.serve.protocol.builder import sse
from sigmix.serve.protocol.errors import ApiError
from sigmix.serve.protocol.requests import ChatCompletionRequest
from sigmix.serve.request import HEARTBEAT_SECONDS, ClientDisconnected, RequestHandler
from sigmix.serve.scheduler import ClosingError
from sigmix.serve.upstream import upstream_error

DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Options that are always sent, since vLLM's defaults are those of the model's ``generation_config.json``."""


class ForwardHandler(RequestHandler):
    """Handler of a chat or text completion that an upstream generates.

    The scheduler only decides on the mixture. Fields of the answer are the upstream's, except the model's name, the
    reply's id and ``sigmix``.
    """

    async def respond(self) -> Response:
        mix = self.requests[0].mix
        if mix is None and len(self.requests) > 1:
            message = "on a server with upstreams a request for the model auto has one prompt; send one for each"
            raise ApiError(400, message, param="prompt")
        if mix is not None and not all(isinstance(alpha, float) for alpha in mix.weights.values()):
            message = f"{self.options.model} has weights per layer or matrix, and no name that an upstream understands"
            raise ApiError(400, message, param="model")
        if self.count > self.options.n:
            raise ApiError(400, "best_of must be n on a server with upstreams", param="best_of")
        self._body = await self._forwarded()
        for request in self.requests:
            request.seeds = ()
        self._submit()
        return await (self._streamed() if self.options.stream else self._whole())

    async def _forwarded(self) -> dict[str, Any]:
        """Return the body for an upstream: the valid fields but the model, with this server's limits and defaults."""
        options, params = self.options, self.requests[0].params
        sent = await self.request.json()
        names = options.model_fields_set - {"model", "sigmix", "max_completion_tokens"}
        body = {name: sent[name] for name in names} | {name: getattr(params, name) for name in DEFAULTED}
        body["max_tokens"] = min(request.params.max_new_tokens for request in self.requests)  # one for all prompts
        if not options.stream:
            body.pop("stream_options", None)  # an error in vLLM
        for name in [name for name in body if name.startswith("guided_")]:  # ignored by vLLM
            body["structured_outputs"] = {name.removeprefix("guided_"): body.pop(name)}
        if isinstance(options, ChatCompletionRequest):
            if not options.tools:
                for name in ("tools", "tool_choice", "parallel_tool_calls"):
                    body.pop(name, None)  # an error in vLLM
            if options.continue_final_message:
                body["add_generation_prompt"] = False
            template = chat_template(self.service.engine.tokenizer) or ""
            defaults = {name: value for name, value in TEMPLATE_DEFAULTS.items() if name in template}
            if defaults:
                body["chat_template_kwargs"] = {**defaults, **options.chat_template_kwargs}
        return body

    async def _whole(self) -> Response:
        try:
            async with aclosing(self._answer()) as answers:
                (answer,) = [one async for one in answers if one is not None]
        except ClientDisconnected:
            return Response(status_code=499)
        sigmix = self.decisions[0] if len(self.decisions) == 1 else self.decisions
        return JSONResponse({**answer, **self.builder.head, "sigmix": sigmix})

    async def _lines(self) -> AsyncGenerator[str, None]:
        started = False
        async with aclosing(self._answer(HEARTBEAT_SECONDS)) as events:
            async for event in events:
                if event is None:
                    if started:
                        yield ": waiting\n\n"
                    continue
                extra = {} if started else {"sigmix": self.decisions[0]}
                if not started:
                    self.service.metrics.first_token_seconds.observe(time.monotonic() - self.started_at)
                started = True
                yield sse({**event, **self.builder.head, **extra})

    async def _answer(self, heartbeat: float | None = None) -> AsyncGenerator[dict[str, Any] | None, None]:
        """Decide, then yield the upstream's answer or the events of its stream; None after silent seconds.

        Raises:
            ApiError: the request failed. ClientDisconnected: the upstream's request is cancelled.
        """
        async with aclosing(self._follow()) as decided:
            async for item in decided:
                assert item is not None
                self._record(*item)
                if None not in self.decisions:
                    break
        async with (
            aclosing(self._exchange()) as exchange,
            aclosing(self._watch(lambda: anext(exchange, {}), heartbeat)) as events,
        ):
            async for event in events:
                if event == {}:  # the end
                    return
                yield event

    async def _exchange(self) -> AsyncGenerator[dict[str, Any], None]:
        """Send the request and yield the JSON objects of the answer."""
        assert self.service.upstreams is not None
        path = "chat/completions" if isinstance(self.options, ChatCompletionRequest) else "completions"
        (mix,) = {request.mix for request in self.requests}
        assert mix is not None
        async with self.service.upstreams.send(path, self._body, mix, self.requests[0].deadline) as response:
            if response.status_code != 200:
                content = None
                with suppress(ValueError):
                    content = json.loads(await response.aread())
                raise upstream_error(response.status_code, content, response.headers.get("retry-after", ""))
            if not self.options.stream:
                yield _parse(await response.aread())
                return
            rest = b""
            async for part in response.aiter_bytes():  # aiter_lines splits at U+2028, too, which JSON may contain
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    if not line.startswith(b"data:"):
                        continue
                    if (data := line.removeprefix(b"data:").strip()) == b"[DONE]":
                        return
                    yield _parse(data)
            raise httpx.RemoteProtocolError("the stream has no end")

    async def _disconnected(self) -> None:
        """Return once the client has closed the connection.

        Raises:
            ApiError: the deadline has passed, or the server stops.
        """
        assert self.service.upstreams is not None
        stopped = self.service.upstreams.stopped
        closed = asyncio.ensure_future(super()._disconnected())
        try:
            seconds = max(0.0, self.requests[0].deadline - time.monotonic())
            await asyncio.wait({closed, stopped}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            closed.cancel()
        if stopped.done():
            raise ApiError(503, str(ClosingError()), "server_error", code="closing", retry_after=5)
        if not closed.done():
            raise ApiError(504, "timeout", "server_error", code="timeout", retry_after=5)


def _parse(data: bytes) -> dict[str, Any]:
    """Parse an answer or the event of a stream.

    Raises:
        ApiError: it is an error. RemoteProtocolError: it is not a JSON object.
    """
    try:
        value = json.loads(data)
    except ValueError as error:
        raise httpx.RemoteProtocolError("not JSON") from error
    if not isinstance(value, dict) or not value:
        raise httpx.RemoteProtocolError("not a JSON object")
    if isinstance(failure := value.get("error"), dict):
        status = failure.get("code")
        raise upstream_error(status if isinstance(status, int) else 502, value)
    return value
