"""API keys: made here, shown once, kept as SHA-256. A key is 32 random bytes, so a fast hash gives nothing away."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import secrets
import socket
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from uvicorn.protocols.http.h11_impl import H11Protocol

from sigmix.errors import ConfigError, UnknownNameError
from sigmix.experts.metadata import check_name
from sigmix.serve.observability import REQUEST, Metrics
from sigmix.serve.protocol import ApiError, busy
from sigmix.serve.settings import Settings
from sigmix.utils.io import atomic_file

PREFIX = "sk-sigmix-"


@dataclass
class Key:
    """Who a key is for, and what it allows.

    Attributes:
        name: of the client. hash: hex SHA-256 of the key. admin: may load experts and see metrics.
        per_minute: requests. at_once: requests under way. max_new_tokens: of an answer. None: no limit of its own.
    """

    name: str
    hash: str
    admin: bool = False
    per_minute: int | None = None
    at_once: int | None = None
    max_new_tokens: int | None = None
    made: float = 0.0


def digest(key: str) -> str:
    """Hex SHA-256 of a key's text."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def read_keys(path: Path) -> list[Key]:
    """Keys of a file; none where there is no file.

    Raises:
        ConfigError: damaged.
    """
    if not path.is_file():
        return []
    try:
        found = [Key(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["keys"]]
        if not all(isinstance(key.hash, str) and len(key.hash) == 64 for key in found):
            raise ValueError("a hash is missing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"the file of API keys {path} cannot be read: {error}", remedy="mend or remove it") from error
    return found


def _write(path: Path, keys: list[Key]) -> None:
    text = json.dumps({"keys": [asdict(key) for key in keys]}, indent=2) + "\n"
    with atomic_file(path, mode=0o600) as temporary:
        temporary.write_text(text, encoding="utf-8")


def add_key(path: Path, name: str, **allowed: Any) -> str:
    """Make a key; returns its text, which is stored nowhere.

    Raises:
        ConfigError: the name is taken. ExpertError: it is no name. OutputError: the file cannot be written.
    """
    keys = read_keys(path)
    if any(key.name == check_name(name) for key in keys):
        raise ConfigError(f"there is a key {name!r} already", remedy=f"remove it first: sigmix keys remove {name}")
    text = PREFIX + secrets.token_urlsafe(32)
    _write(path, [*keys, Key(name, digest(text), made=round(time.time()), **allowed)])
    return text


def remove_key(path: Path, name: str) -> None:
    """Take a key away; a server that runs notices within seconds.

    Raises:
        UnknownNameError: there is none of that name.
    """
    keys = read_keys(path)
    if all(key.name != name for key in keys):
        raise UnknownNameError("key", name, [key.name for key in keys])
    _write(path, [key for key in keys if key.name != name])


@dataclass
class Use:
    """What one client is doing."""

    at_once: int = 0
    allowance: float = 0.0
    since: float = field(default_factory=time.monotonic)


class Keyring:
    """The keys of a file, read anew when it changes, and what their clients are doing.

    Args:
        path: of the file.
    """

    LOOK = 2.0
    """Seconds after which the file is looked at again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._looked = self._changed = -1.0
        self._keys: list[Key] = []
        self._uses: dict[str, Use] = {}

    def keys(self) -> list[Key]:
        """All keys as they are now."""
        now = time.monotonic()
        if self._looked < 0 or now - self._looked > self.LOOK:
            self._looked = now
            try:
                changed = self.path.stat().st_mtime_ns
            except OSError:
                changed = 0
            if changed != self._changed:
                self._keys, self._changed = read_keys(self.path), changed
        return self._keys

    def find(self, text: str) -> Key | None:
        """The key with a text; all hashes are compared, each in constant time."""
        wanted, found = digest(text), None
        for key in self.keys():
            if hmac.compare_digest(key.hash, wanted):
                found = key
        return found

    def enter(self, key: Key) -> float | None:
        """Count a request; returns None if it may go on, else the seconds after which to try again."""
        use = self._uses.setdefault(key.name, Use(allowance=float(key.per_minute or 0)))
        if key.at_once is not None and use.at_once >= key.at_once:
            return 1.0
        if key.per_minute is not None:
            now, rate = time.monotonic(), key.per_minute / 60
            use.allowance = min(use.allowance + (now - use.since) * rate, float(key.per_minute))
            use.since = now
            if use.allowance < 1:
                return (1 - use.allowance) / rate
            use.allowance -= 1
        use.at_once += 1
        return None

    def leave(self, key: Key) -> None:
        """A request that had entered has ended."""
        self._uses[key.name].at_once -= 1


# --- Who may do what: request ids, host names, body sizes and times, API keys.


Scope = MutableMapping[str, Any]


Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


log = logging.getLogger("sigmix.serve.auth")


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


# --- Connections whose clients are too slow to be waited for.


def patient(seconds: float) -> type[H11Protocol]:
    """A protocol that gives up connections on which nothing has moved for ``seconds``, or for twice as long at most.

    uvicorn itself waits for ever for a request's head, and for a client that does not read its answer. Between those
    two it is the application that a client waits for; that is left alone, and bodies have a limit of their own
    (`access.Gate`).
    """

    class Patient(H11Protocol):
        _tick: asyncio.TimerHandle | None = None
        _before: Any = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            found = transport.get_extra_info("socket")
            if found is not None and found.family in (socket.AF_INET, socket.AF_INET6):
                # asyncio does so only where a socket names its protocol; else an answer's body waits 40 ms for an ACK
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._tick = self.loop.call_later(seconds, self._look)

        def connection_lost(self, exc: Exception | None) -> None:
            if self._tick is not None:
                self._tick.cancel()
            super().connection_lost(exc)

        def _look(self) -> None:
            waits = self.cycle is None or self.cycle.response_complete
            stuck = self.flow.write_paused
            now = (id(self.cycle), waits, stuck, self.transport.get_write_buffer_size() if stuck else 0)
            if (waits or stuck) and now == self._before:
                self.transport.abort()
                return
            self._before = now
            self._tick = self.loop.call_later(seconds, self._look)

    return Patient
