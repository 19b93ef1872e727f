"""Too many, too large and too slow: requests, bodies, clients."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest
from helpers_serve import live, raw

pytestmark = pytest.mark.usefixtures("cache")
ASK = {"messages": [{"role": "user", "content": "one two"}], "max_tokens": 4, "model": "math"}


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


def test_more_requests_at_once_than_allowed(tmp_path):
    with live(tmp_path, connections=1) as server:
        hold = threading.Event()
        server.service.batcher.call(lambda: hold.wait(20))
        got = []
        thread = threading.Thread(target=lambda: got.append(server.chat()[0]))
        thread.start()
        until = time.monotonic() + 10
        while not len(server.service.batcher.queue) and time.monotonic() < until:
            time.sleep(0.01)
        status, found, headers = server.call("GET", "/v1/models")
        assert (status, found["error"]["code"], "retry-after" in headers) == (503, "overloaded", True)
        hold.set()
        thread.join(20)
        assert got == [200]
        assert server.call("GET", "/v1/models")[0] == 200


def test_bodies_too_large_or_too_slow(tmp_path):
    with live(tmp_path, max_body=20_000, body_seconds=1.0) as server:
        large = {"messages": [{"role": "user", "content": "x" * 30_000}]}
        status, found, _ = server.call("POST", "/v1/chat/completions", large)
        assert (status, found["error"]["code"]) == (413, "too_large")
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as link:
            link.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
            with contextlib.suppress(ConnectionError):  # it answers before it has all, and closes
                for _ in range(30):
                    link.sendall(b"400\r\n" + b"y" * 1024 + b"\r\n")
            assert b" 413 " in link.recv(4096)
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as link:
            link.sendall(head + b'content-length: 100\r\n\r\n{"mess')
            assert b" 408 " in link.recv(4096)
        for begun in (b"", b"POST /v1/chat", head):  # and a head that never ends
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as link:
                link.sendall(begun)
                with contextlib.suppress(ConnectionResetError):
                    assert link.recv(4096) == b""
        assert server.chat()[0] == 200


def test_small_writes_leave_at_once(tmp_path):
    with live(tmp_path) as server, socket.create_connection(("127.0.0.1", server.port), timeout=20) as link:
        link.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert b" 200 " in link.recv(4096)
        (found,) = server.server.server_state.connections
        asked = found.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert asked  # else a token waits for the acknowledgement of the one before


def test_a_slow_reader_keeps_nobody_waiting(tmp_path):
    with live(tmp_path, max_new_tokens=150) as server:
        sent = raw({**ASK, "max_tokens": 150, "stream": True})
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as link:
            link.sendall(sent)
            assert server.chat(model="code")[0] == 200
            until = time.monotonic() + 20
            while server.service.batcher.jobs and time.monotonic() < until:
                time.sleep(0.01)
            assert not server.service.batcher.jobs
            found = b""
            while b"[DONE]" not in found:
                found += link.recv(4096)


def test_a_client_that_does_not_read_is_given_up(tmp_path):
    with live(tmp_path, body_seconds=0.5, max_body=8 << 20) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as link:
            # requests whose answers nobody reads, until the server cannot write any more
            link.settimeout(1)
            with contextlib.suppress(OSError):
                for _ in range(4000):
                    link.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n")
            until = time.monotonic() + 20
            while server.server.server_state.connections and time.monotonic() < until:
                time.sleep(0.05)
            assert not server.server.server_state.connections
        assert server.chat()[0] == 200
