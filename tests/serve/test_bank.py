"""Models, experts, mixes, feedback and adaptation of a running server, and what it tells of itself."""

from __future__ import annotations

import http.client
import json
import shutil
import time

from helpers_engine import expert
from helpers_serve import NAMES
from helpers_tiny import build_tiny, build_tokenizer

from sigmix.engine import Engine

ASK = {"messages": [{"role": "user", "content": "one two three"}], "max_tokens": 8}


# ------------------------------------------------------------------ models, experts, mixes


def test_models(server):
    _, found, _ = server.call("GET", "/v1/models")
    kinds = {one["id"]: one["sigmix"]["kind"] for one in found["data"]}
    assert kinds.items() >= {"auto": "auto", "base": "base", **dict.fromkeys(NAMES, "expert")}.items()
    assert server.call("GET", "/v1/models/math")[1]["id"] == "math"
    assert server.call("GET", "/v1/models/math:.5+code:.5")[1]["sigmix"]["mix"] == "code:0.5+math:0.5"


def test_experts_come_and_go(server):
    new = expert(build_tiny(), "new", 9)
    new.save_pretrained(server.folder / "new")
    assert server.chat(model="new")[0] == 404
    assert server.call("POST", "/v1/experts", {"path": "new"})[:2] == (
        201,
        {"id": "new", "object": "sigmix.expert", "loaded": True},
    )
    engine = Engine(build_tiny(), build_tokenizer(), {"new": new})
    assert (
        server.chat("one", model="new")[1]["choices"][0]["message"]["content"]
        == engine.generate(["one"], "new", max_new_tokens=6)[0].text
    )
    assert server.call("POST", "/v1/experts", {"path": "new"})[0] == 400
    _, listed, _ = server.call("GET", "/v1/experts")
    assert {one["id"] for one in listed["data"]} == {*NAMES, "new"}
    assert server.call("DELETE", "/v1/experts/new")[0] == 200
    assert server.call("DELETE", "/v1/experts/new")[0] == 404
    assert server.chat(model="new")[0] == 404


def test_damaged_and_foreign_experts_are_refused(server, tmp_path):
    good = expert(build_tiny(), "good", 9)
    good.save_pretrained(server.folder / "broken")
    (server.folder / "broken" / "adapter_model.safetensors").write_bytes(b"x" * 100)
    expert(build_tiny(seed=7), "foreign", 9).sealed(build_tiny(seed=7)).save_pretrained(server.folder / "foreign")
    good.save_pretrained(tmp_path / "outside")
    (server.folder / "link").symlink_to(tmp_path / "outside")
    good.save_pretrained(server.folder / "linked")
    weights = server.folder / "linked" / "adapter_model.safetensors"
    shutil.move(weights, tmp_path / "weights")
    weights.symlink_to(tmp_path / "weights")
    good.save_pretrained(server.folder / "pickled")
    (server.folder / "pickled" / "adapter_model.safetensors").unlink()
    (server.folder / "pickled" / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    for path in (
        "broken",
        "foreign",
        "link",
        "linked",
        "pickled",
        "../outside",
        str(tmp_path / "outside"),
        "/etc",
        ".",
        "a\0b",
        "none",
    ):
        status, found, _ = server.call("POST", "/v1/experts", {"path": path})
        assert status == 400, (path, found)
    assert server.chat(model="math")[0] == 200


def test_a_mix_by_name(server):
    asked = {"name": "both", "mix": "math:.5+code:.5"}
    assert server.call("POST", "/v1/mixes", asked)[0] == 201
    assert server.chat("one", model="both")[1]["choices"] == server.chat("one", model="math:0.5+code:0.5")[1]["choices"]
    layers = {"name": "layered", "mix": {"weights": {"math": [1.0, 0.2]}}}
    assert server.call("POST", "/v1/mixes", layers)[0] == 201
    assert server.chat("one", model="layered")[1]["sigmix"]["weights"] == {"math": [1.0, 0.2]}
    for bad in (
        {"name": "math", "mix": "code"},
        {"name": "auto", "mix": "code"},
        {"name": "No", "mix": "code"},
        {"name": "x", "mix": "auto"},
        {"name": "x", "mix": {"weights": {"math": [1.0]}}},
        {"name": "x", "mix": {}},
    ):
        assert server.call("POST", "/v1/mixes", bad)[0] == 400, bad
    assert server.call("POST", "/v1/mixes", {"name": "x", "mix": "none"})[0] == 404
    assert server.call("DELETE", "/v1/mixes/both")[0] == 200
    assert server.call("DELETE", "/v1/mixes/both")[0] == 404
    assert server.chat(model="both")[0] == 404


# ------------------------------------------------------------------ feedback, adaptation, health


def test_feedback(server):
    _, found = server.chat(model="math")
    status, told, _ = server.call("POST", "/v1/feedback", {"id": found["id"], "reward": 1})
    assert (status, told["learned"]) == (200, False)  # nothing was chosen
    assert server.call("POST", "/v1/feedback", {"id": found["id"], "reward": 1})[0] == 409
    assert server.call("POST", "/v1/feedback", {"id": "chatcmpl-none", "reward": 1})[0] == 404
    assert server.call("POST", "/v1/feedback", {"id": found["id"], "reward": 2})[0] == 400
    _, two = server.chat(model="math", n=2)
    assert server.call("POST", "/v1/feedback", {"id": two["id"], "reward": 1})[0] == 404


def test_adaptation(server):
    asked = {"name": "fitted", "examples": [{"prompt": "one", "answer": "two"}, {"prompt": "three", "answer": "four"}]}
    status, found, _ = server.call("POST", "/v1/adapt", asked)
    assert (status, found["status"] in ("waiting", "running")) == (202, True)
    until = time.monotonic() + 60
    while found["status"] in ("waiting", "running") and time.monotonic() < until:
        assert server.chat(model="code")[0] == 200
        found = server.call("GET", f"/v1/adapt/{found['id']}")[1]
    assert found["status"] == "done", found
    assert found["progress"]["round"] == len(found["trace"]) > 0
    assert found["evidence"]["examples"] == 2
    _, answer = server.chat(model="fitted")
    assert answer["sigmix"]["mix"] == found["mix"]["id"]
    assert server.call("GET", "/v1/adapt/none")[0] == 404
    for bad in (
        {"examples": []},
        {**asked, "score": "none"},
        {**asked, "name": "math"},
        {**asked, "examples": asked["examples"] * 20},
    ):
        assert server.call("POST", "/v1/adapt", bad)[0] in (400, 404), bad
    _, slow, _ = server.call("POST", "/v1/adapt", {**asked, "settings": "full", "name": "slow"})
    assert server.call("DELETE", f"/v1/adapt/{slow['id']}")[1]["status"] == "cancelled"
    assert server.chat(model="slow")[0] == 404


def test_health_and_metrics(server):
    assert server.call("GET", "/health")[:2] == (200, {"status": "ok"})
    server.chat(model="math")
    status, text, _ = server.call("GET", "/metrics")
    assert status == 200
    assert 'sigmix_mix_requests_total{mix="math"}' in text
    assert 'sigmix_requests_total{route="/v1/chat/completions",status="200"}' in text
    assert "sigmix_first_token_seconds_count" in text
    assert server.call("GET", "/")[0] == 200
    assert "script" in server.call("GET", "/")[1]
    for name in ("app.js", "api.js", "style.css", "icon.svg"):
        assert server.call("GET", f"/static/{name}")[0] == 200
    assert server.call("GET", "/static/../app.py")[0] == 404


def test_a_client_that_leaves_frees_its_place(server):
    for stream in (True, False):
        link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        body = json.dumps({**ASK, "model": "math", "max_tokens": 64, "n": 8, "temperature": 1, "stream": stream})
        link.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        until = time.monotonic() + 20
        while server.service.batcher.load()[0] < 8 and time.monotonic() < until:
            time.sleep(0.001)
        link.close()
        while server.service.batcher.jobs and time.monotonic() < until:
            time.sleep(0.01)
        assert not server.service.batcher.jobs
