"""API keys, rate limits, and the ASGI middleware that enforces them.

A key is 32 random bytes, shown once and stored as its SHA-256: a slow hash would add nothing to that much entropy.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
import time
import uuid
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi.exceptions import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sigmix.errors import ConfigError, UnknownNameError, reraised
from sigmix.experts.metadata import check_name
from sigmix.serve.observability import REQUEST_ID, Metrics
from sigmix.serve.protocol.errors import ApiError, internal_error, rate_limited
from sigmix.serve.settings import Settings
from sigmix.utils.io import atomic_file, read_text

log = logging.getLogger("sigmix.serve.auth")

PREFIX = "sk-sigmix-"


@dataclass
class ApiKey:
    """API key of the client ``name``.

    Attributes:
        admin: may load experts, save mixtures, read metrics, and see all files and jobs.
        allow_code: may use python graders, where the server allows them.
    """

    name: str
    hash: str  # hexadecimal SHA-256
    admin: bool = False
    allow_code: bool = False
    per_minute: int | None = None  # requests
    at_once: int | None = None  # concurrent requests
    max_new_tokens: int | None = None  # per choice
    created: float = 0.0  # Unix time

    @property
    def owner(self) -> str | None:
        """Owner of the files, jobs and searches that the key may see; None: all of them, for an administrator."""
        return None if self.admin else self.name


LOCAL = ApiKey("local", "", admin=True, allow_code=True)  # client of a loopback server without keys


def hash_key(key: str) -> str:
    """Return the hexadecimal SHA-256 of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def read_keys(path: Path) -> list[ApiKey]:
    """Read a key file; a missing file holds no keys.

    Raises:
        ConfigError: damaged file.
    """
    if not path.is_file():
        return []
    with reraised(ConfigError, f"cannot read API keys from {path}", f"fix or delete {path}"):
        keys = [ApiKey(**entry) for entry in json.loads(read_text(path, ConfigError))["keys"]]
        if not all(isinstance(key.hash, str) and len(key.hash) == 64 for key in keys):
            raise ValueError("missing hash")
    return keys


def write_keys(path: Path, keys: list[ApiKey]) -> None:
    """Write a key file that only its owner can read."""
    text = json.dumps({"keys": [asdict(key) for key in keys]}, indent=2) + "\n"
    with atomic_file(path, mode=0o600) as temporary:
        temporary.write_text(text, encoding="utf-8")


def add_key(path: Path, name: str, **limits: Any) -> str:
    """Create a key and return its text, which is not stored.

    Args:
        limits: fields of `ApiKey`.

    Raises:
        ConfigError: the name is taken.
        ExpertError: invalid name.
        OutputError: the file cannot be written.
    """
    keys = read_keys(path)
    if any(key.name == check_name(name) for key in keys):
        raise ConfigError(f"client {name!r} already has a key", remedy=f"sigmix keys remove {name}")
    text = PREFIX + secrets.token_urlsafe(32)
    write_keys(path, [*keys, ApiKey(name, hash_key(text), created=round(time.time()), **limits)])
    return text


def remove_key(path: Path, name: str) -> None:
    """Delete a key; a running server applies the change within seconds.

    Raises:
        UnknownNameError: no key of that name.
    """
    keys = read_keys(path)
    if all(key.name != name for key in keys):
        raise UnknownNameError("key", name, [key.name for key in keys])
    write_keys(path, [key for key in keys if key.name != name])


class ApiKeys:
    """Keys of a file, reloaded when it changes, with the current usage of each client."""

    reload_seconds = 2.0  # between checks of the file

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checked = self._modified = -1.0
        self._keys: list[ApiKey] = []
        self._running: Counter[str] = Counter()  # requests by client
        self._buckets: dict[str, tuple[float, float]] = {}  # allowance of requests, and when it was computed

    def keys(self) -> list[ApiKey]:
        """Return all keys."""
        now = time.monotonic()
        if self._checked < 0 or now - self._checked > self.reload_seconds:
            self._checked = now
            modified = self.path.stat().st_mtime_ns if self.path.is_file() else 0
            if modified != self._modified:
                self._modified = modified  # of a damaged file, too: it is reported once, and the earlier keys remain
                self._keys = read_keys(self.path)
        return self._keys

    def find(self, text: str) -> ApiKey | None:
        """Return the key with a given text; compares all hashes, each in constant time."""
        hashed = hash_key(text)
        matches = [key for key in self.keys() if hmac.compare_digest(key.hash, hashed)]
        return matches[0] if matches else None

    def acquire(self, key: ApiKey) -> float | None:
        """Count a request against the limits; return None, or the seconds to wait if a limit is reached."""
        if key.at_once is not None and self._running[key.name] >= key.at_once:
            return 1.0
        if key.per_minute is not None:  # token bucket
            now, rate = time.monotonic(), key.per_minute / 60
            allowance, updated = self._buckets.get(key.name, (key.per_minute, now))
            allowance = min(allowance + (now - updated) * rate, key.per_minute)
            taken = 1 if allowance >= 1 else 0
            self._buckets[key.name] = allowance - taken, now
            if not taken:
                return (1 - allowance) / rate
        self._running[key.name] += 1
        return None

    def release(self, key: ApiKey) -> None:
        """End a request that `acquire` has counted."""
        self._running[key.name] -= 1


SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "content-security-policy": (
        "default-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; frame-ancestors 'none'"
    ),
}

PUBLIC_PATHS = ("/", "/health")  # paths that need no key, besides /static/

UPLOAD_PATH = "/v1/files"

FORM_BYTES = 64 << 10
"""Bytes of an upload besides the file: other fields and the headers of the parts."""

MAX_DRAIN = 16 << 20
"""Bytes of an oversized body that are read and dropped: most clients read the response only after sending it all."""


class RequestLogMiddleware:
    """Request ids, access log, request metrics, security headers, and a 500 response for unexpected errors."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", given) else f"req-{uuid.uuid4().hex}"
        token = REQUEST_ID.set(request_id)
        started, status = time.perf_counter(), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update({"x-request-id": request_id, **SECURITY_HEADERS})
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except Exception:
            log.exception("request failed")
            if not status:
                await internal_error().response()(scope, receive, send_with_headers)
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "(none)")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.request_seconds.labels(route).observe(seconds)
            client = scope.get("state", {}).get("key", LOCAL).name
            fields = {"method": scope["method"], "route": route, "status": status, "client": client}
            log.info("request", extra={**fields, "seconds": round(seconds, 4)})
            REQUEST_ID.reset(token)


class AuthMiddleware:
    """API keys, limits per key, cross-site request protection and the limit of the body size."""

    def __init__(self, app: ASGIApp, settings: Settings, keys: ApiKeys) -> None:
        self.app, self.settings, self.keys = app, settings, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        key: ApiKey | None = None
        try:
            self._check_origin(scope["method"], headers)
            key = self._authenticate(scope["path"], headers)
            scope.setdefault("state", {})["key"] = key or LOCAL
            await self.app(scope, self._limit_body(scope, headers, receive), send)
        except ApiError as error:
            await error.response()(scope, receive, send)
        finally:
            if key is not None:
                self.keys.release(key)

    def _authenticate(self, path: str, headers: Headers) -> ApiKey | None:
        """Return the client's key, counted against its limits; None if no key is needed."""
        if path in PUBLIC_PATHS or path.startswith("/static/") or not (self.keys.keys() or not self.settings.loopback):
            return None
        scheme, _, text = headers.get("authorization", "").partition(" ")
        key = self.keys.find(text.strip()) if scheme.lower() == "bearer" and text.strip() else None
        if key is None:
            problem = "unknown API key" if text else "missing API key"
            raise ApiError(401, f"{problem}; send the header 'Authorization: Bearer KEY'", code="invalid_api_key")
        if (wait := self.keys.acquire(key)) is not None:
            raise rate_limited(f"rate limit of client {key.name} reached", wait)
        return key

    def _check_origin(self, method: str, headers: Headers) -> None:
        """Reject changes from pages of other sites, which browsers send without a preflight request (CSRF)."""
        origin = headers.get("origin")
        if origin is None or method in ("GET", "HEAD", "OPTIONS") or origin in self.settings.allowed_origins:
            return
        if urlsplit(origin).netloc != headers.get("host"):
            raise ApiError(403, f"origin {origin!r} is not allowed", "permission_error", code="bad_origin")

    def _limit_body(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """Wrap ``receive`` so that a body above the limit raises an HTTPException, which FastAPI lets through."""
        uploaded = (scope["method"], scope["path"]) == ("POST", UPLOAD_PATH)
        limit = self.settings.max_file_bytes + FORM_BYTES if uploaded else self.settings.max_body_bytes
        size = 0
        too_large = HTTPException(413, f"the request body is larger than {limit} bytes")
        length = headers.get("content-length", "0")
        declared = int(length) if length.isdigit() else 0

        async def limited() -> Message:
            nonlocal size
            if declared > limit and headers.get("expect", "").lower() == "100-continue":
                raise too_large  # reading on would request the body
            message = await receive()
            size += len(message.get("body", b""))
            if max(size, declared) > limit:
                while message.get("more_body", False) and size < MAX_DRAIN:
                    message = await receive()
                    size += len(message.get("body", b""))
                raise too_large
            return message

        return limited
