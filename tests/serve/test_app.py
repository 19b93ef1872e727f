"""Server on a socket: disconnects, slow readers, connection limits, shutdown."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import threading

import pytest
from helpers_serve import BODY, CHAT, NEVER_ENDS, TIMEOUT, Live, gate_steps, live, make_service, raw_chat, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]
ASK = {**BODY, "max_tokens": 4, "model": "math"}


def connect(server: Live) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT)


def read_all(connection: socket.socket) -> bytes:
    received = b""
    while part := connection.recv(65536):
        received += part
    return received


def test_a_disconnect_cancels_the_request(tmp_path, monkeypatch):
    with live(tmp_path) as server:
        permits = gate_steps(monkeypatch)  # it does not end by itself
        for stream in (True, False):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)
            body = {**ASK, **NEVER_ENDS, "max_tokens": 200, "n": 8, "temperature": 1, "stream": stream}
            connection.request("POST", CHAT, json.dumps(body), {"content-type": "application/json"})
            wait_until(lambda: server.service.scheduler.load()[0] == 8)
            connection.close()
            wait_until(lambda: server.service.scheduler._cancelled)
            permits.release()
            wait_until(lambda: not server.service.scheduler.running())
        generated = server.service.metrics.registry.get_sample_value("sigmix_tokens_total", {"kind": "generated"})
        assert generated < 2 * 8 * 200


def test_a_slow_reader_blocks_nobody(tmp_path):
    with live(tmp_path, max_new_tokens=150) as server, connect(server) as connection:
        connection.sendall(raw_chat({**ASK, "max_tokens": 150, "stream": True}))
        assert server.chat(model="code")[0] == 200
        wait_until(lambda: not server.service.scheduler.running())
        received = b""
        while b"[DONE]" not in received:
            received += connection.recv(4096)


def test_connections_have_no_nagle_delay(tmp_path):
    with live(tmp_path) as server, connect(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert b" 200 " in connection.recv(4096)
        (protocol,) = server.server.server_state.connections
        assert protocol.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_connection_limit(tmp_path):
    with live(tmp_path, max_connections=1) as server:
        with server.queued_chats(1) as statuses:
            assert server.send("GET", "/v1/models", None, {})[0] == 503
        assert statuses == [200]
        assert server.call("GET", "/v1/models")[0] == 200


def test_paths_outside_of_the_static_folder(tmp_path):
    with live(tmp_path) as server:
        assert server.call("GET", "/static/../app.py")[0] == 404
        assert server.call("GET", "/static/%2e%2e/app.py")[0] == 404


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("header", ["Expect:", "Expect: 100-continue", "Transfer-Encoding: chunked"])
def test_a_client_can_read_that_its_body_is_too_large(tmp_path, header):
    with live(tmp_path) as server:
        command = [
            "curl",
            "-sS",
            f"{server.url}{CHAT}",
            "-d",
            "@-",
            "-H",
            header,
            "-H",
            "content-type: application/json",
        ]
        done = subprocess.run(command, input="x" * (3 << 20), capture_output=True, text=True, timeout=TIMEOUT)
        assert json.loads(done.stdout)["error"]["code"] == "too_large", done.stderr


def test_a_prompt_of_one_megabyte(tmp_path):
    large = {**ASK, "messages": [{"role": "user", "content": "one two " * 131072}]}
    with live(tmp_path, max_body_bytes=4 << 20) as server:
        status, found, _ = server.call("POST", CHAT, large)
        assert (status, found["error"]["code"]) == (400, "context_length_exceeded")
        assert server.chat()[0] == 200


def test_shutdown_finishes_streams(tmp_path):
    server = Live(make_service(tmp_path, max_new_tokens=150, shutdown_timeout=TIMEOUT))
    with connect(server) as connection:
        connection.sendall(raw_chat({**ASK, "max_tokens": 100, "stream": True}))
        received = connection.recv(4096)
        closing = threading.Thread(target=server.server.handle_exit, args=(15, None))
        closing.start()
        received += read_all(connection)
    assert b'"finish_reason": "length"' in received
    assert b"data: [DONE]" in received
    closing.join()
    server.thread.join(TIMEOUT)
    assert not server.thread.is_alive()
    assert not server.service.ready


def test_shutdown_ends_streams_after_the_timeout(tmp_path, monkeypatch):
    server = Live(make_service(tmp_path, shutdown_timeout=0.0))
    permits = gate_steps(monkeypatch)
    with connect(server) as connection:
        connection.sendall(raw_chat({**ASK, **NEVER_ENDS, "stream": True, "max_tokens": 200}))
        received = connection.recv(4096)
        server.server.handle_exit(15, None)
        wait_until(lambda: server.service.scheduler._stopped)
        permits.release()
        received += read_all(connection)
    assert b'"code": "closing"' in received
    assert b"data: [DONE]" in received
    server.thread.join(TIMEOUT)
    assert not server.thread.is_alive()
