"""Pool of upstreams: OpenAI-compatible servers, such as vLLM with sigmix's plugin, that generate for this one."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
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


@dataclass(eq=False)
class Upstream:
    """One server.

    Attributes:
        url: base URL of its API, without a slash at the end.
        base: its name for the base model.
        problem: why it is left out; empty: it is healthy.
        in_flight: requests that it has not answered yet.
    """

    url: str
    base: str = ""
    problem: str = "not checked yet"
    in_flight: int = 0

    def model(self, mix: Mix) -> str:
        """Return its name for a mixture."""
        return self.base if mix == Mix.base() else mix.id


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
            ApiError: status 503, none is healthy; 502, several sent no response, or a response is cut.
        """
        for _ in range(ATTEMPTS):
            upstream = self._choose()
            content = json.dumps({**body, "model": upstream.model(mix)})  # ASCII: httpx's own fails for lone surrogates
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

    def _choose(self) -> Upstream:
        if not self.healthy:
            message = f"none of {len(self.all)} upstreams is healthy; the log has the reasons"
            raise ApiError(503, message, "server_error", code="upstream", retry_after=self.interval)
        return min(self.healthy, key=lambda one: one.in_flight)


def base_name(models: Collection[Mapping[str, Any]]) -> str:
    """Return an upstream's name for the base model: `base` in sigmix; in vLLM the first model that has no parent."""
    names = [model["id"] for model in models if not model.get("parent")]
    return Mix.base().id if Mix.base().id in names else names[0]


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
