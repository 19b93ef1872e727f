"""Server on a tiny random model: in-process over ASGI (`Client`), or on a loopback socket (`Live`)."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from helpers_engine import expert
from helpers_tiny import build_tiny, build_tokenizer

from sigmix.engine.continuous_batching import ContinuousBatch
from sigmix.serve.app import Server, create_app
from sigmix.serve.scheduler import Scheduler
from sigmix.serve.service import Service
from sigmix.serve.settings import load_settings

TIMEOUT = 240.0
"""Seconds after which a test that waits fails: a safety net, also on a loaded machine."""
NAMES = ("math", "code", "word")
CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "one two three"}], "max_tokens": 8}
NEVER_ENDS = {"logit_bias": {"2": -100}}
"""Field of a request that generates up to its limit: the end-of-sequence token is never drawn."""


def bank() -> dict[str, Any]:
    """Three random experts of the tiny Llama."""
    return {name: expert(build_tiny(), name, seed) for seed, name in enumerate(NAMES, 1)}


def make_service(folder, experts=None, model=None, **settings: Any) -> Service:
    """A service that is not started; its model is the tiny Llama by default."""
    made = load_settings(None, **{"state": folder / "state", "shutdown_timeout": 5.0, "port": 0, **settings})
    graders = {"exact": lambda reply, gold: float(reply.strip() == gold)}
    return Service(model or build_tiny(), build_tokenizer(), bank() if experts is None else experts, made, graders)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def wait_until(condition: Callable[[], bool], timeout: float = TIMEOUT) -> None:
    """Poll a condition; fail after the timeout."""
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, "timeout"
        time.sleep(0.002)


def hold(scheduler: Scheduler) -> threading.Event:
    """Block the scheduler's thread until the returned event is set; requests that are submitted now stay queued."""
    entered, release = threading.Event(), threading.Event()

    def block() -> None:
        entered.set()
        release.wait(TIMEOUT)

    scheduler.call(block)
    assert entered.wait(TIMEOUT)
    return release


def gate_steps(monkeypatch) -> threading.Semaphore:
    """Let every decoding step from now on take a permit of the returned semaphore, which has none."""
    permits, step = threading.Semaphore(0), ContinuousBatch.step

    def gated(batch: ContinuousBatch) -> None:
        assert permits.acquire(timeout=TIMEOUT)
        step(batch)

    monkeypatch.setattr(ContinuousBatch, "step", gated)
    return permits


class Caller:
    """Requests to a server; subclasses implement `send`."""

    service: Service

    def send(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> tuple[int, str, dict[str, str]]:
        raise NotImplementedError

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """(status, JSON or text, headers) of a request; a body of bytes is sent as it is."""
        sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        status, text, got = self.send(method, path, sent, {"content-type": "application/json", **named})
        return status, json.loads(text) if "json" in got.get("content-type", "") else text, got

    def chat(self, content: str = "one two", **more: Any) -> tuple[int, Any]:
        """(status, response) of a chat completion."""
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 6, **more}
        return self.call("POST", CHAT, body)[:2]

    def stream(self, body: dict[str, Any], path: str = CHAT) -> list[dict[str, Any]]:
        """JSON of a stream's events; it must end with [DONE]."""
        status, text, headers = self.call("POST", path, {**body, "stream": True})
        assert status == 200, text
        assert headers["content-type"].startswith("text/event-stream")
        lines = [part for part in text.split("\n\n") if part]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1] if line.startswith("data: ")]

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Block the scheduler's thread inside the context."""
        release = hold(self.service.scheduler)
        try:
            yield
        finally:
            release.set()

    @contextmanager
    def queued_chats(self, count: int, **headers: str) -> Iterator[list[int]]:
        """Hold the scheduler with ``count`` queued chats; yields the list that receives their status afterwards."""
        statuses: list[int] = []
        body = {**BODY, "model": "math"}
        threads = [
            threading.Thread(target=lambda: statuses.append(self.call("POST", CHAT, body, **headers)[0]))
            for _ in range(count)
        ]
        with self.hold():
            for thread in threads:
                thread.start()
            wait_until(lambda: len(self.service.scheduler.queue) == count)
            yield statuses
        for thread in threads:
            thread.join(TIMEOUT)


class Client(Caller):
    """In-process client."""

    def __init__(self, service: Service) -> None:
        from starlette.testclient import TestClient

        self.service = service
        self.url = "http://localhost"
        self.http = TestClient(create_app(service), base_url=self.url, raise_server_exceptions=False)

    def send(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> tuple[int, str, dict[str, str]]:
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        answer = self.http.request(method, path, content=body, headers=raw)
        return answer.status_code, answer.text, dict(answer.headers)


class Live(Caller):
    """Running server on a socket."""

    def __init__(self, service: Service) -> None:
        self.service = service
        service.start()
        self.server = Server(service)
        self.socket = self.server.bind()
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(TIMEOUT)
        assert not self.thread.is_alive()

    def send(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> tuple[int, str, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            text = answer.read().decode("utf-8", "replace")
            return answer.status, text, {name.lower(): value for name, value in answer.getheaders()}
        finally:
            connection.close()


def raw_chat(body: dict) -> bytes:
    """Bytes of an HTTP request for a chat completion."""
    sent = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(sent)}\r\n"
    return head.encode() + b"content-type: application/json\r\n\r\n" + sent


@contextmanager
def serving(folder, experts=None, **settings: Any) -> Iterator[Client]:
    """In-process server, closed at the end."""
    client = Client(make_service(folder, experts, **settings))
    with client.http:
        yield client


@contextmanager
def live(folder, experts=None, **settings: Any) -> Iterator[Live]:
    """Server on a socket, stopped at the end."""
    server = Live(make_service(folder, experts, **settings))
    try:
        yield server
    finally:
        server.stop()
