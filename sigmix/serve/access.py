"""Who may do what: request ids, host names, body sizes and times, API keys."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from sigmix.serve.errors import ApiError, busy
from sigmix.serve.keys import Key, Keyring
from sigmix.serve.logs import REQUEST
from sigmix.serve.metrics import Metrics
from sigmix.serve.settings import Settings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
log = logging.getLogger("sigmix.serve.access")
ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
LOCAL = Key("local", "", admin=True)
"""Who calls a server that only this machine can reach and that has no keys."""
LINGER = 16 << 20
"""Bytes of a refused body that are read past before the connection is closed."""
OPEN = ("/", "/health")
"""What needs no key, with the page's files: the page itself, and whether the server is up."""


class Gate:
    """The outermost layer of the application (ASGI).

    Args:
        app: what lies behind. settings: of the server. keyring: API keys. metrics: counted here.
    """

    def __init__(self, app: Any, settings: Settings, keyring: Keyring, metrics: Metrics) -> None:
        self.app, self.settings, self.keyring, self.metrics = app, settings, keyring, metrics
        given = {settings.host, *settings.hosts}
        self.hosts = given | ({"localhost", "127.0.0.1", "[::1]", "::1"} if settings.loopback else set())
        self.any_host = not settings.loopback and not settings.hosts
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        request = asked if ID.fullmatch(asked) else f"req-{uuid.uuid4().hex}"
        token = REQUEST.set(request)
        started, status = time.perf_counter(), 0

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request.encode()), *SAFE]
            await send(message)

        key: Key | None = None
        self._under_way += 1
        try:
            key = self._admit(scope, headers)
            scope.setdefault("state", {})["key"] = key or LOCAL
            await self.app(scope, self._limited(headers, receive), answer)
        except ApiError as error:
            if not status:
                await self._let_end(headers, receive)
                await _reply(answer, error)
        except TooMuch as error:
            if not status:
                await _reply(answer, error.error)
        finally:
            self._under_way -= 1
            if key is not None and key is not LOCAL:
                self.keyring.leave(key)
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "(none)")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            log.info(
                "request",
                extra={
                    "method": scope["method"], "route": route, "status": status, "seconds": round(seconds, 4),
                    "client": (scope.get("state", {}).get("key") or LOCAL).name,
                },
            )  # fmt: skip
            REQUEST.reset(token)

    # ------------------------------------------------------------------ checks

    def _admit(self, scope: Scope, headers: Headers) -> Key | None:
        """Whose request this is; it has entered the keyring.

        Raises:
            ApiError: it may not go on.
        """
        self._check_host(headers)
        self._check_origin(scope["method"], headers)
        if self._under_way > self.settings.connections:
            raise ApiError(503, "too many requests at once", "server_error", "overloaded", retry=1)
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.settings.max_body:
            raise too_large(self.settings.max_body)
        path = scope["path"]
        if path in OPEN or path.startswith("/static/"):
            return None
        keys = self.keyring.keys()
        if not keys and self.settings.loopback:
            return LOCAL
        scheme, _, text = headers.get("authorization", "").partition(" ")
        key = self.keyring.find(text.strip()) if scheme.lower() == "bearer" and text.strip() else None
        if key is None:
            message = "an API key is needed" if not text else "this API key is not known"
            raise ApiError(401, f"{message}: send it as 'Authorization: Bearer KEY'", code="invalid_api_key")
        wait = self.keyring.enter(key)
        if wait is not None:
            raise busy(f"the client {key.name} has reached its limit of requests", wait)
        return key

    def _check_host(self, headers: Headers) -> None:
        """A page on another site must not reach this server through a name that it has pointed here."""
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        if not self.any_host and name not in self.hosts:
            raise ApiError(421, f"this server does not answer as {name!r}; start it with --allow-host", code="bad_host")

    def _check_origin(self, method: str, headers: Headers) -> None:
        """A page on another site must not have a browser send what changes something, which it may without asking."""
        origin = headers.get("origin")
        if origin is None or method in ("GET", "HEAD", "OPTIONS") or origin in self.settings.origins:
            return
        if urlsplit(origin).netloc != headers.get("host"):
            raise ApiError(403, f"pages of {origin!r} may not use this server", "permission_error", "bad_origin")

    async def _let_end(self, headers: Headers, receive: Receive) -> None:
        """Read past a body that is not wanted: most clients look for an answer only when they have sent everything."""
        if headers.get("expect", "").lower() == "100-continue":  # this one waits for our word
            return
        left, until = LINGER, time.monotonic() + self.settings.body_seconds
        while left > 0 and (seconds := until - time.monotonic()) > 0:
            try:
                message = await asyncio.wait_for(receive(), seconds)
            except asyncio.TimeoutError:
                return
            left -= len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body", False):
                return

    def _limited(self, headers: Headers, receive: Receive) -> Receive:
        """A body that is neither too long nor too slow."""
        read, until = 0, time.monotonic() + self.settings.body_seconds
        whole = False

        async def limited() -> MutableMapping[str, Any]:
            nonlocal read, whole
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(until - time.monotonic(), 0.001))
            except asyncio.TimeoutError:
                raise TooMuch(ApiError(408, "the request's body did not come in time", code="timeout")) from None
            read += len(message.get("body", b""))
            whole = message["type"] != "http.request" or not message.get("more_body", False)
            if read > self.settings.max_body:
                if not whole:
                    await self._let_end(headers, receive)
                raise TooMuch(too_large(self.settings.max_body))
            return message

        return limited


class TooMuch(BaseException):
    """Ends a request from inside `receive`; no framework's own error handling may catch it."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


def too_large(limit: int) -> ApiError:
    """413."""
    return ApiError(413, f"the request's body is larger than {limit} bytes", code="too_large")


POLICY = "default-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; frame-ancestors 'none'"
SAFE = [
    (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"), (b"cache-control", b"no-store"),
    (b"content-security-policy", POLICY.encode()),
]  # fmt: skip


async def _reply(send: Send, error: ApiError) -> None:
    content = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(content)), **error.headers()}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status in (408, 413):
        headers["connection"] = "close"
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": content})
