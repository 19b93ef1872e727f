"""A server on a tiny random model, in this process, on loopback."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from helpers_engine import expert
from helpers_tiny import build_tiny, build_tokenizer

from sigmix.serve import Server, Service, load_settings

NAMES = ("math", "code", "word")


def bank() -> dict[str, Any]:
    """Three random experts of the tiny Llama."""
    return {name: expert(build_tiny(), name, seed) for seed, name in enumerate(NAMES, 1)}


def judges() -> dict[str, Any]:
    return {"exact": lambda reply, gold: float(reply.strip() == gold)}


def make_service(folder, experts=None, **settings: Any) -> Service:
    """A service that is not started."""
    made = load_settings(None, **{"state": folder / "state", "grace_seconds": 5.0, "port": 0, **settings})
    return Service(build_tiny(), build_tokenizer(), bank() if experts is None else experts, made, judges())


class Live:
    """A running server."""

    def __init__(self, service: Service) -> None:
        self.service = service
        service.start()
        self.server = Server(service)
        self.socket = self.server.config.bind_socket()
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        until = time.monotonic() + 20
        while not self.server.started and time.monotonic() < until:
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """(status, JSON or text, headers) of a request; a body that is bytes goes as it is."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            link.request(method, path, sent, {"content-type": "application/json", **named})
            answer = link.getresponse()
            text = answer.read().decode("utf-8", "replace")
            found = {name.lower(): value for name, value in answer.getheaders()}
        finally:
            link.close()
        return answer.status, json.loads(text) if "json" in found.get("content-type", "") else text, found

    def chat(self, content: str = "one two", **more: Any) -> tuple[int, Any]:
        """(status, reply) of a chat completion."""
        status, found, _ = self.call(
            "POST",
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": content}], "max_tokens": 6, **more},
        )
        return status, found


def raw(body: dict) -> bytes:
    """A request as it goes over the wire."""
    sent = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(sent)}\r\n"
    return head.encode() + b"content-type: application/json\r\n\r\n" + sent


@contextmanager
def live(folder, experts=None, **settings: Any) -> Iterator[Live]:
    """A running server, stopped at the end."""
    made = Live(make_service(folder, experts, **settings))
    try:
        yield made
    finally:
        made.stop()
