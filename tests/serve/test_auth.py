"""Who gets in: keys, roles, hosts, origins; what is logged; how the server stops."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time

import pytest
from helpers_serve import Live, live, make_service, raw

from sigmix.errors import ConfigError
from sigmix.serve.auth import add_key, remove_key
from sigmix.serve.observability import JsonLines

pytestmark = pytest.mark.usefixtures("cache")
ASK = {"messages": [{"role": "user", "content": "one two"}], "max_tokens": 4, "model": "math"}


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


def test_other_addresses_need_keys(tmp_path):
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0 .*sigmix keys add"):
        make_service(tmp_path, host="0.0.0.0")
    add_key(tmp_path / "state" / "keys.json", "alice")
    make_service(tmp_path, host="0.0.0.0").state.close()


def test_keys_and_roles(tmp_path):
    keys = tmp_path / "state" / "keys.json"
    user, admin = add_key(keys, "alice", max_new_tokens=2), add_key(keys, "root", admin=True)
    with live(tmp_path, expert_folders=[tmp_path]) as server:
        server.service.keyring.LOOK = 0.0
        for headers in ({}, bearer("wrong"), bearer(""), {"authorization": f"Basic {user}"}, bearer("\xff")):
            status, found, got = server.call("POST", "/v1/chat/completions", ASK, **headers)
            assert (status, found["error"]["code"]) == (401, "invalid_api_key")
            assert got["www-authenticate"] == "Bearer"
        status, found, _ = server.call("POST", "/v1/chat/completions", ASK, **bearer(user))
        assert (status, found["usage"]["completion_tokens"]) == (200, 2)
        assert server.call("GET", "/health")[0] == 200
        assert server.call("GET", "/")[0] == 200
        for method, path, body in (
            ("GET", "/v1/experts", None), ("POST", "/v1/experts", {"path": "x"}), ("DELETE", "/v1/experts/word", None),
            ("POST", "/v1/mixes", {"name": "x", "mix": "math"}), ("DELETE", "/v1/mixes/x", None),
            ("GET", "/metrics", None),
        ):  # fmt: skip
            assert server.call(method, path, body)[0] == 401, path
            assert server.call(method, path, body, **bearer(user))[0] == 403, path
            assert server.call(method, path, body, **bearer(admin))[0] not in (401, 403), path
        # what one client has, another does not see
        _, mine, _ = server.call("POST", "/v1/chat/completions", ASK, **bearer(admin))
        asked = {"id": mine["id"], "reward": 1}
        assert server.call("POST", "/v1/feedback", asked, **bearer(user))[0] == 404
        assert server.call("POST", "/v1/feedback", asked, **bearer(admin))[0] == 200
        remove_key(keys, "alice")
        assert server.call("POST", "/v1/chat/completions", ASK, **bearer(user))[0] == 401


def test_limits_of_a_key(tmp_path):
    keys = tmp_path / "state" / "keys.json"
    few, one = add_key(keys, "few", per_minute=3), add_key(keys, "one", at_once=1)
    with live(tmp_path) as server:
        answers = [server.call("GET", "/v1/models", None, **bearer(few)) for _ in range(5)]
        assert [status for status, _, _ in answers] == [200, 200, 200, 429, 429]
        assert 1 <= int(answers[-1][2]["retry-after"]) <= 60
        assert answers[-1][1]["error"]["type"] == "rate_limit_error"
        hold = threading.Event()
        server.service.batcher.call(lambda: hold.wait(20))
        got = []
        thread = threading.Thread(
            target=lambda: got.append(server.call("POST", "/v1/chat/completions", ASK, **bearer(one))[0])
        )
        thread.start()
        until = time.monotonic() + 10
        while not len(server.service.batcher.queue) and time.monotonic() < until:
            time.sleep(0.01)
        assert server.call("GET", "/v1/models", None, **bearer(one))[0] == 429
        hold.set()
        thread.join(20)
        assert got == [200]
        assert server.call("GET", "/v1/models", None, **bearer(one))[0] == 200


def test_a_full_queue_says_when_to_come_back(tmp_path):
    with live(tmp_path, waiting=2, waiting_each=2, rows=1) as server:
        hold = threading.Event()
        server.service.batcher.call(lambda: hold.wait(20))
        got = []
        threads = [threading.Thread(target=lambda: got.append(server.chat()[0])) for _ in range(2)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 10
        while len(server.service.batcher.queue) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        for stream in (False, True):
            status, found, headers = server.call("POST", "/v1/chat/completions", {**ASK, "stream": stream})
            assert (status, found["error"]["code"]) == (429, "rate_limit_exceeded")
            assert int(headers["retry-after"]) >= 1
        hold.set()
        for thread in threads:
            thread.join(20)
        assert got == [200, 200]


def test_hosts_and_origins(tmp_path):
    with live(tmp_path, origins=["https://good.example"], hosts=["box.lan"]) as server:
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
            assert server.call("GET", "/v1/models", host=host)[0] == 421
        for host in ("localhost", f"127.0.0.1:{server.port}", "[::1]:8000", "box.lan"):
            assert server.call("GET", "/v1/models", host=host)[0] == 200
        _, _, good = server.call("GET", "/v1/models", origin="https://good.example")
        assert good["access-control-allow-origin"] == "https://good.example"
        _, _, bad = server.call("GET", "/v1/models", origin="https://evil.example")
        assert "access-control-allow-origin" not in bad
        # a form on another site can send text/plain without asking first
        status, _, _ = server.call("POST", "/v1/chat/completions", json.dumps(ASK).encode(), content_type="text/plain")
        assert status == 400
    with live(tmp_path / "closed") as server:
        assert "access-control-allow-origin" not in server.call("GET", "/v1/models", origin="https://good.example")[2]
        assert (
            server.call("OPTIONS", "/v1/models", origin="https://x.example", access_control_request_method="GET")[0]
            == 405
        )


def test_pages_of_other_sites_change_nothing(tmp_path):
    add_key(tmp_path / "keyed" / "state" / "keys.json", "alice")
    with live(tmp_path) as server:
        mix = {"name": "mine", "mix": "math"}
        for origin in ("https://evil.example", "null", "http://127.0.0.1:1", f"https://localhost.evil:{server.port}"):
            status, found, _ = server.call("POST", "/v1/mixes", mix, origin=origin)
            assert (status, found["error"]["code"]) == (403, "bad_origin")
            assert server.call("DELETE", "/v1/experts/math", origin=origin)[0] == 403
        assert server.call("POST", "/v1/mixes", mix, origin=server.url)[0] == 201  # the server's own page
    with live(tmp_path / "keyed", origins=["https://good.example"]) as server:
        good = {"origin": "https://good.example"}
        # a browser asks first, without a key, and may read why it was refused
        status, _, found = server.call("OPTIONS", "/v1/models", **good, access_control_request_method="GET",
                                       access_control_request_headers="authorization")  # fmt: skip
        assert (status, found["access-control-allow-origin"]) == (200, "https://good.example")
        status, _, found = server.call("POST", "/v1/chat/completions", ASK, **good)
        assert (status, found["access-control-allow-origin"]) == (401, "https://good.example")
        status, _, found = server.call("OPTIONS", "/v1/models", origin="https://evil.example",
                                       access_control_request_method="GET")  # fmt: skip
        assert (status, "access-control-allow-origin" in found) == (400, False)


def test_a_mix_of_somebody_else_is_not_replaced(tmp_path):
    keys = tmp_path / "state" / "keys.json"
    alice, bob, root = add_key(keys, "alice"), add_key(keys, "bob"), add_key(keys, "root", admin=True)
    with live(tmp_path) as server:
        asked = {"examples": [{"prompt": "one", "answer": "two"}], "name": "shared"}

        def adapt(key: str, **more) -> int:
            status, found, _ = server.call("POST", "/v1/adapt", {**asked, **more}, **bearer(key))
            until = time.monotonic() + 60
            while status == 202 and found["status"] in ("waiting", "running") and time.monotonic() < until:
                found = server.call("GET", f"/v1/adapt/{found['id']}", **bearer(key))[1]
                assert server.call("GET", f"/v1/adapt/{found['id']}", **bearer(bob))[0] == (200 if key == bob else 404)
            return status

        assert server.call("POST", "/v1/mixes", {"name": "house", "mix": "math"}, **bearer(root))[0] == 201
        assert adapt(alice, name="house") == 400
        assert adapt(alice) == 202
        assert adapt(bob) == 400
        assert adapt(alice) == 202
        assert server.call("POST", "/v1/mixes", {"name": "shared", "mix": "code"}, **bearer(root))[0] == 201
        assert adapt(alice) == 400  # it is the administrator's now
        assert "alice" not in json.dumps(server.call("GET", "/v1/models", **bearer(bob))[1])


def test_searches_of_one_client_leave_room_for_others(tmp_path):
    keys = tmp_path / "state" / "keys.json"
    alice, bob = add_key(keys, "alice"), add_key(keys, "bob")
    with live(tmp_path) as server:
        hold = threading.Event()
        server.service.batcher.call(lambda: hold.wait(20))
        asked = {"examples": [{"prompt": "one", "answer": "two"}], "settings": "full"}
        got = [server.call("POST", "/v1/adapt", asked, **bearer(alice))[0] for _ in range(6)]
        assert got[:2] == [202, 202]
        assert got[-2:] == [429, 429]
        assert server.call("POST", "/v1/adapt", asked, **bearer(bob))[0] == 202
        hold.set()


def test_logs_hold_no_secrets(tmp_path):
    keys = tmp_path / "state" / "keys.json"
    key = add_key(keys, "alice")
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append(JsonLines().format(record))

    handler, logger = Keep(), logging.getLogger("sigmix")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel("DEBUG")
    try:
        with live(tmp_path) as server:
            secret = {**ASK, "messages": [{"role": "user", "content": "mypassword"}]}
            _, _, headers = server.call("POST", "/v1/chat/completions", secret, **bearer(key), x_request_id="abc-1")
            assert headers["x-request-id"] == "abc-1"
            server.call("POST", "/v1/chat/completions?key=" + key, b"{", **bearer(key))
            server.call("POST", "/v1/chat/completions", secret, **bearer("sk-sigmix-wrong"))
            assert server.call("GET", "/health", x_request_id="a b\x7f")[2]["x-request-id"].startswith("req-")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    found = [json.loads(line) for line in lines]
    assert [one["request"] for one in found if one.get("request") == "abc-1"]
    assert {"method", "route", "status", "seconds", "client"} <= set(
        next(o for o in found if o["message"] == "request")
    )
    text = "\n".join(lines)
    for hidden in (key, "sk-sigmix-wrong", "mypassword"):
        assert hidden not in text


def test_stopping_finishes_a_stream(tmp_path):
    server = Live(make_service(tmp_path, max_new_tokens=150))
    sent = raw({**ASK, "max_tokens": 100, "stream": True})
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as link:
        link.sendall(sent)
        found = link.recv(4096)
        closing = threading.Thread(target=server.server.handle_exit, args=(15, None))
        closing.start()
        while part := link.recv(65536):
            found += part
    assert b'"finish_reason": "length"' in found
    assert b"data: [DONE]" in found
    closing.join()
    server.thread.join(30)
    assert not server.thread.is_alive()
    assert not server.service.ready


def test_what_does_not_end_is_ended_cleanly(tmp_path):
    server = Live(make_service(tmp_path, grace_seconds=0.0))
    hold = threading.Event()
    sent = raw({**ASK, "stream": True, "max_tokens": 200})
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as link:
        link.sendall(sent)
        found = link.recv(4096)
        server.service.batcher.call(lambda: hold.wait(1))
        server.server.handle_exit(15, None)
        while part := link.recv(65536):
            found += part
    assert b"the server is going down" in found
    assert b"data: [DONE]" in found
    server.thread.join(30)
    assert not server.thread.is_alive()
