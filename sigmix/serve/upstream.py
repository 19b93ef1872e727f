"""Pool of upstreams that generate for this server: vLLM with sigmix's plugin, llama-server with adapters, or sigmix."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import httpx

from sigmix.experts.mix import Mix
from sigmix.serve.observability import Metrics
from sigmix.serve.protocol.errors import ApiError
from sigmix.serve.settings import Settings

log = logging.getLogger("sigmix.serve.upstream")

ATTEMPTS = 2  # upstreams that a request is sent to, if the first cannot be reached
CONNECT_SECONDS = 10.0
CHECK_SECONDS = 10.0  # without a response a health check has failed
KEEPALIVE_SECONDS = 2.0  # less than in servers (uvicorn: 5), so that no request meets a connection that is being closed


LLAMA_SERVER = frozenset(
    "messages prompt max_tokens temperature top_p top_k min_p seed stop logit_bias n stream stream_options logprobs "
    "top_logprobs response_format tools tool_choice parallel_tool_calls chat_template_kwargs "
    "add_generation_prompt".split()
)
"""Fields of a request that llama-server takes; it ignores others in silence. Its penalties count other tokens."""

WITHOUT_EFFECT = {
    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "echo": False, "best_of": 1,
    "continue_final_message": False,
}  # fmt: skip

SAMPLERS = ("temperature", "min_p", "top_k", "top_p")
"""Order in which the engine samples; llama-server's has the temperature last."""


@dataclass(eq=False)
class Upstream:
    """One server.

    Attributes:
        url: base URL of its API, without a slash at the end.
        base: its name for the base model.
        adapters: of llama-server: {name of the file, without .gguf: id}; None: another server.
        problem: why it is left out; empty: it is healthy.
        in_flight: requests that it has not answered yet.
    """

    url: str
    base: str = ""
    adapters: Mapping[str, int] | None = None
    problem: str = "not checked yet"
    in_flight: int = 0

    def has(self, mix: Mix) -> bool:
        """Return False if it is a llama-server that lacks an expert of a mixture."""
        return self.adapters is None or set(mix.weights) <= set(self.adapters)

    def unsupported(self, body: Mapping[str, Any]) -> str | None:
        """Return a field with an effect that it lacks, if it is a llama-server."""
        if self.adapters is None:
            return None
        return min(_effective(body).keys() - LLAMA_SERVER, default=None)

    def request(self, body: Mapping[str, Any], mix: Mix) -> dict[str, Any]:
        """Return the body of a request for a mixture.

        llama-server's prompt cache is off, since it does not depend on the scales, see docs/exports.md.
        """
        if self.adapters is None:
            return {**body, "model": self.base if mix == Mix.base() else mix.id}
        return {
            **_effective(body), "model": self.base, "cache_prompt": False, "samplers": SAMPLERS,
            "lora": [{"id": id, "scale": mix.weights.get(name, 0.0)} for name, id in self.adapters.items()],
        }  # fmt: skip


def _effective(body: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in body.items()
        if value is not None and (name not in WITHOUT_EFFECT or value != WITHOUT_EFFECT[name])
    }


class Upstreams:
    """Upstreams with health checks, which run inside the asynchronous context.

    Attributes:
        stopped: future that is done once the requests in flight have to end; see `stop`.
    """

    stopped: asyncio.Future[None]

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.all = [Upstream(url) for url in dict.fromkeys(settings.upstream)]
        self.interval, self.metrics = settings.upstream_interval, metrics
        key = settings.upstream_key
        self._client = httpx.AsyncClient(
            headers={} if key is None else {"authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),  # a request has its own deadline
            limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_SECONDS),
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._checks: list[asyncio.Task[None]] = []
        for one in self.all:
            metrics.watch_upstream(one)

    @property
    def healthy(self) -> list[Upstream]:
        """Upstreams that receive requests."""
        return [one for one in self.all if not one.problem]

    async def __aenter__(self) -> Upstreams:
        self._loop = asyncio.get_running_loop()
        self.stopped = self._loop.create_future()
        await asyncio.gather(*map(self._check, self.all))
        self._checks = [asyncio.create_task(self._check_again(one)) for one in self.all]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._loop = None
        for task in self._checks:
            task.cancel()
        await asyncio.gather(*self._checks, return_exceptions=True)
        await self._client.aclose()

    def stop(self, seconds: float) -> None:
        """End the requests that are still in flight after some seconds; for any thread."""

        def end() -> None:
            if not self.stopped.done():
                self.stopped.set_result(None)

        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.call_later, seconds, end)

    # Health checks

    async def _check_again(self, upstream: Upstream) -> None:
        while True:
            await asyncio.sleep(self.interval)
            await self._check(upstream)

    async def _check(self, upstream: Upstream) -> None:
        """Leave out an upstream that fails, or take it back; its models are read only then, against limits of a key."""
        try:
            health = await self._client.get(f"{upstream.url.removesuffix('/v1')}/health", timeout=CHECK_SECONDS)
            if health.is_server_error:  # others: servers without this route
                health.raise_for_status()
            if upstream.problem:
                models = await self._client.get(f"{upstream.url}/models", timeout=CHECK_SECONDS)
                upstream.base = base_name(models.raise_for_status().json()["data"])
            if upstream.problem or upstream.adapters is not None:  # it may have been started again with others
                url = f"{upstream.url.removesuffix('/v1')}/lora-adapters"
                adapters = await self._client.get(url, timeout=CHECK_SECONDS)
                missing = adapters.status_code in (404, 405)  # another server
                upstream.adapters = None if missing else llama_adapters(adapters.raise_for_status().json())
        except Exception as error:
            self._leave_out(upstream, error)
        else:
            if upstream.problem:
                log.info("upstream %s is healthy; it serves the base model as %s", upstream.url, upstream.base)
            upstream.problem = ""

    def _leave_out(self, upstream: Upstream, error: Exception) -> None:
        problem = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if problem != upstream.problem:
            log.warning("upstream %s is left out: %s", upstream.url, problem)
        upstream.problem = problem

    # Requests

    @asynccontextmanager
    async def send(
        self, path: str, body: Mapping[str, Any], mix: Mix, deadline: float
    ) -> AsyncIterator[httpx.Response]:
        """Send a request to the healthy upstream with the fewest requests in flight; yield the response, unread.

        An upstream that sends no response is left out, and another one is tried.

        Args:
            path: below the URL of the API. body: without the model.
            deadline: `time.monotonic` from which on a cancelled request counts as a failure.

        Raises:
            ApiError: status 503, none is healthy; 502, several sent no response, or a response is cut; 404, none has
                the mixture's experts; 400, none of those that have them supports a field.
        """
        for _ in range(ATTEMPTS):
            upstream = self._choose(mix, body)
            content = json.dumps(upstream.request(body, mix))  # ASCII: httpx's own fails for lone surrogates
            headers = {"content-type": "application/json"}
            request = self._client.build_request("POST", f"{upstream.url}/{path}", content=content, headers=headers)
            failures = self.metrics.upstream_failures.labels(upstream.url)
            self.metrics.upstream_requests.labels(upstream.url).inc()
            upstream.in_flight += 1
            try:
                try:
                    response = await self._client.send(request, stream=True)
                except httpx.TransportError as error:
                    failures.inc()
                    self._leave_out(upstream, error)
                    continue
                if response.is_server_error:
                    failures.inc()
                async with aclosing(response):
                    yield response
                return
            except httpx.HTTPError as error:
                failures.inc()
                log.warning("upstream %s: %s: %s", upstream.url, type(error).__name__, error)
                raise bad_gateway("the answer of an upstream is cut or invalid; repeat the request") from error
            except asyncio.CancelledError:
                if time.monotonic() >= deadline:
                    failures.inc()
                raise
            finally:
                upstream.in_flight -= 1
        raise bad_gateway("the upstreams cannot be reached")

    def _choose(self, mix: Mix, body: Mapping[str, Any]) -> Upstream:
        able = [one for one in self.all if one.has(mix)]
        if not able:
            message = f"no upstream has all adapters of {mix.id}; start llama-server with --lora-scaled NAME.gguf:0"
            raise ApiError(404, message, code="model_not_found", param="model")
        fitting = [one for one in able if one.unsupported(body) is None]
        if not fitting:
            field = able[0].unsupported(body)
            message = f"llama-server, which generates here, does not support {field}"
            raise ApiError(400, message, param=field)
        ready = [one for one in fitting if not one.problem]
        if not ready:
            message = f"none of {len(self.all)} upstreams is healthy; the log has the reasons"
            raise ApiError(503, message, "server_error", code="upstream", retry_after=self.interval)
        return min(ready, key=lambda one: one.in_flight)


def base_name(models: Collection[Mapping[str, Any]]) -> str:
    """Return an upstream's name for the base model: `base` in sigmix; in vLLM the first model that has no parent."""
    names = [model["id"] for model in models if not model.get("parent")]
    return Mix.base().id if Mix.base().id in names else names[0]


def llama_adapters(found: Collection[Mapping[str, Any]]) -> dict[str, int]:
    """Return the ids of llama-server's adapters by the names of their files, without ``.gguf``."""
    return {PurePath(one["path"]).name.removesuffix(".gguf"): one["id"] for one in found}


def bad_gateway(message: str) -> ApiError:
    """Return the error for an upstream that failed."""
    return ApiError(502, message, "server_error", code="upstream", retry_after=1)


def upstream_error(status: int, content: Any, retry_after: str = "") -> ApiError:
    """Return the error that an upstream responded with, in OpenAI's schema or as FastAPI's ``detail``.

    Its status is kept, but 502 replaces that of an error of this server: of its key, or of its address.
    """
    if status in (401, 403):
        return bad_gateway("an upstream refuses the key of this server; start it with another upstream_key")
    if not 400 <= status < 600:
        return bad_gateway(f"an upstream responded with status {status}")
    error = content.get("error", content) if isinstance(content, dict) else {}
    fields = error if isinstance(error, dict) else {"message": error}
    message, kind, code, param = (
        value if isinstance(value := fields.get(name), str) else None for name in ("message", "type", "code", "param")
    )
    return ApiError(
        status, message or f"an upstream responded with status {status}",
        kind or ("server_error" if status >= 500 else "invalid_request_error"), code=code, param=param,
        retry_after=float(retry_after) if retry_after.isdecimal() else None,
    )  # fmt: skip
