"""API keys, limits per key, cross-site requests, hosts, body size, and what the logs contain."""

from __future__ import annotations

import json
import logging
import sys

import pytest
from helpers_serve import BODY, CHAT, bearer, make_service, serving, wait_until

from sigmix.cli import main
from sigmix.errors import ConfigError, ExpertError, UnknownNameError
from sigmix.serve.auth import ApiKeys, add_key, read_keys, remove_key
from sigmix.serve.observability import JsonFormatter

pytestmark = pytest.mark.usefixtures("cache")
ASK = {**BODY, "max_tokens": 4, "model": "math"}
EVIL = "https://evil.example"
GOOD = "https://good.example"


@pytest.fixture
def keys(tmp_path):
    return tmp_path / "state" / "keys.json"


# --- Keys


def test_key_file(tmp_path):
    path = tmp_path / "keys.json"
    alice = add_key(path, "alice", admin=True)
    bob = add_key(path, "bob")
    assert alice.startswith("sk-sigmix-")
    assert alice not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    keys = ApiKeys(path)
    assert keys.find(alice).admin
    assert keys.find(bob).name == "bob"
    assert keys.find("sk-sigmix-guess") is None
    with pytest.raises(ConfigError) as error:
        add_key(path, "alice")
    assert "sigmix keys remove alice" in str(error.value)
    with pytest.raises(ExpertError):
        add_key(path, "No Name")
    remove_key(path, "bob")
    with pytest.raises(UnknownNameError):
        remove_key(path, "bob")
    keys.reload_seconds = 0.0
    assert keys.find(bob) is None
    path.write_text("{}")
    with pytest.raises(ConfigError) as error:
        read_keys(path)
    assert str(path) in str(error.value)
    with pytest.raises(ConfigError):
        keys.find(alice)
    assert keys.find(alice).admin  # the earlier keys remain


def test_rights_are_given_on_the_command_line(tmp_path, monkeypatch, capsys):
    for name, flags in (("alice", ["--allow-code"]), ("bob", ["--admin"])):
        monkeypatch.setattr(sys, "argv", ["sigmix", "keys", "add", name, *flags, "--state", str(tmp_path)])
        main()
    keys = [(key.name, key.admin, key.allow_code) for key in read_keys(tmp_path / "keys.json")]
    assert keys == [("alice", False, True), ("bob", True, False)]
    assert capsys.readouterr().out.count("sk-sigmix-") == 2


def test_limits_of_a_key(tmp_path):
    path = tmp_path / "keys.json"
    keys = ApiKeys(path)
    key = keys.find(add_key(path, "bob", per_minute=2, at_once=1))
    assert keys.acquire(key) is None
    assert keys.acquire(key) == 1.0  # concurrent requests
    keys.release(key)
    assert keys.acquire(key) is None
    keys.release(key)
    assert 20 < keys.acquire(key) <= 30  # requests per minute


def test_a_public_address_requires_keys(tmp_path, keys):
    with pytest.raises(ConfigError) as error:
        make_service(tmp_path, host="0.0.0.0")
    assert "0.0.0.0" in str(error.value)
    assert "sigmix keys add" in str(error.value)
    add_key(keys, "alice")
    make_service(tmp_path, host="0.0.0.0").store.close()


def test_keys_and_roles(tmp_path, keys):
    user, admin = add_key(keys, "alice", max_new_tokens=2), add_key(keys, "root", admin=True)
    with serving(tmp_path, expert_folders=[tmp_path]) as server:
        server.service.keys.reload_seconds = 0.0
        for headers in ({}, bearer("wrong"), bearer(""), {"authorization": f"Basic {user}"}, bearer("\xff")):
            status, found, got = server.call("POST", CHAT, ASK, **headers)
            assert (status, found["error"]["code"]) == (401, "invalid_api_key")
            assert got["www-authenticate"] == "Bearer"
        status, found, _ = server.call("POST", CHAT, ASK, **bearer(user))
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
        _, reply, _ = server.call("POST", CHAT, ASK, **bearer(admin))
        reward = {"id": reply["id"], "reward": 1}
        assert server.call("POST", "/v1/feedback", reward, **bearer(user))[0] == 404  # another client's reply
        assert server.call("POST", "/v1/feedback", reward, **bearer(admin))[0] == 200
        remove_key(keys, "alice")
        assert server.call("POST", CHAT, ASK, **bearer(user))[0] == 401


def test_rate_limits_of_a_server(tmp_path, keys):
    few, one = add_key(keys, "few", per_minute=3), add_key(keys, "one", at_once=1)
    with serving(tmp_path) as server:
        answers = [server.call("GET", "/v1/models", None, **bearer(few)) for _ in range(5)]
        assert [status for status, _, _ in answers] == [200, 200, 200, 429, 429]
        assert 1 <= int(answers[-1][2]["retry-after"]) <= 60
        assert answers[-1][1]["error"]["type"] == "rate_limit_error"
        with server.queued_chats(1, **bearer(one)) as statuses:
            assert server.call("GET", "/v1/models", None, **bearer(one))[0] == 429
        assert statuses == [200]
        assert server.call("GET", "/v1/models", None, **bearer(one))[0] == 200


def test_mixtures_and_searches_of_other_clients(tmp_path, keys):
    alice, bob, root = add_key(keys, "alice"), add_key(keys, "bob"), add_key(keys, "root", admin=True)
    with serving(tmp_path) as server:

        def adapt(key: str, name: str = "shared") -> int:
            body = {"examples": [{"prompt": "one", "answer": "two"}], "name": name}
            status, found, _ = server.call("POST", "/v1/adapt", body, **bearer(key))
            if status == 202:
                path = f"/v1/adapt/{found['id']}"
                wait_until(lambda: server.call("GET", path, **bearer(key))[1]["status"] == "done")
                assert server.call("GET", path, **bearer(bob))[0] == (200 if key == bob else 404)
            return status

        assert server.call("POST", "/v1/mixes", {"name": "house", "mix": "math"}, **bearer(root))[0] == 201
        assert [adapt(alice, "house"), adapt(alice), adapt(bob), adapt(alice)] == [400, 202, 400, 202]
        assert server.call("POST", "/v1/mixes", {"name": "shared", "mix": "code"}, **bearer(root))[0] == 201
        assert adapt(alice) == 400  # an administrator has replaced it
        assert "alice" not in json.dumps(server.call("GET", "/v1/models", **bearer(bob))[1])


def test_searches_of_one_client_leave_room_for_others(tmp_path, keys):
    alice, bob = add_key(keys, "alice"), add_key(keys, "bob")
    body = {"examples": [{"prompt": "one", "answer": "two"}], "settings": "full"}
    with serving(tmp_path) as server, server.hold():
        statuses = [server.call("POST", "/v1/adapt", body, **bearer(alice))[0] for _ in range(6)]
        assert statuses[:2] == [202, 202]
        assert statuses[-2:] == [429, 429]
        assert server.call("POST", "/v1/adapt", body, **bearer(bob))[0] == 202


# --- Hosts, origins, bodies


def test_hosts(tmp_path):
    with serving(tmp_path, allowed_hosts=["box.lan"]) as server:
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "www.box.lan"):
            assert server.call("GET", "/v1/models", host=host)[0] == 400
        for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "box.lan"):
            assert server.call("GET", "/v1/models", host=host)[0] == 200


def test_cors(tmp_path, keys):
    with serving(tmp_path / "closed") as server:
        assert "access-control-allow-origin" not in server.call("GET", "/v1/models", origin=GOOD)[2]
        status = server.call("OPTIONS", "/v1/models", origin=GOOD, access_control_request_method="GET")[0]
        assert status == 405
    add_key(keys, "alice")
    with serving(tmp_path, allowed_origins=[GOOD]) as server:
        preflight = {"access_control_request_method": "GET", "access_control_request_headers": "authorization"}
        status, _, headers = server.call("OPTIONS", "/v1/models", origin=GOOD, **preflight)
        assert (status, headers["access-control-allow-origin"]) == (200, GOOD)
        status, _, headers = server.call("POST", CHAT, ASK, origin=GOOD)
        assert (status, headers["access-control-allow-origin"]) == (401, GOOD)  # readable by the page
        status, _, headers = server.call("OPTIONS", "/v1/models", origin=EVIL, **preflight)
        assert (status, "access-control-allow-origin" in headers) == (400, False)


def test_other_sites_change_nothing(tmp_path):
    with serving(tmp_path) as server:
        mix = {"name": "mine", "mix": "math"}
        for origin in (EVIL, "null", "http://127.0.0.1:1", "https://localhost.evil"):
            status, found, _ = server.call("POST", "/v1/mixes", mix, origin=origin)
            assert (status, found["error"]["code"]) == (403, "bad_origin")
            assert server.call("DELETE", "/v1/experts/math", origin=origin)[0] == 403
        assert server.call("POST", "/v1/mixes", mix, origin=server.url)[0] == 201  # the server's own page
        # forms of other sites can send text/plain without a preflight request
        assert server.call("POST", CHAT, json.dumps(ASK).encode(), content_type="text/plain")[0] == 400


@pytest.mark.parametrize("chunked", [False, True])
def test_body_size(tmp_path, chunked):
    with serving(tmp_path, max_body_bytes=20_000) as server:
        body = json.dumps({"messages": [{"role": "user", "content": "x" * 30_000}]}).encode()
        content = iter([body[:15_000], body[15_000:]]) if chunked else body
        answer = server.http.post(CHAT, content=content, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
        assert server.chat()[0] == 200


# --- Logs


def test_logs_contain_no_secrets(tmp_path, keys):
    key = add_key(keys, "alice")
    lines: list[str] = []

    class Recorder(logging.Handler):
        def emit(self, record):
            lines.append(JsonFormatter().format(record))

    handler, logger = Recorder(), logging.getLogger("sigmix")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel("DEBUG")
    try:
        with serving(tmp_path) as server:
            secret = {**ASK, "messages": [{"role": "user", "content": "mypassword"}]}
            _, _, headers = server.call("POST", CHAT, secret, **bearer(key), x_request_id="abc-1")
            assert headers["x-request-id"] == "abc-1"
            server.call("POST", f"{CHAT}?key={key}", b"{", **bearer(key))
            server.call("POST", CHAT, secret, **bearer("sk-sigmix-wrong"))
            assert server.call("GET", "/health", x_request_id="a b\x7f")[2]["x-request-id"].startswith("req-")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    entries = [json.loads(line) for line in lines]
    assert [entry for entry in entries if entry.get("request") == "abc-1"]
    (first, *_) = (entry for entry in entries if entry["message"] == "request")
    assert first.keys() >= {"method", "route", "status", "seconds", "client"}
    for hidden in (key, "sk-sigmix-wrong", "mypassword"):
        assert hidden not in "\n".join(lines)
