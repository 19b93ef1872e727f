"""Models, experts, saved mixtures, feedback, adaptation, health and metrics."""

from __future__ import annotations

import shutil
import threading

import pytest
from helpers_engine import expert
from helpers_serve import NAMES, TIMEOUT, serving, wait_until
from helpers_tiny import build_tiny, build_tokenizer

from sigmix.engine import Engine
from sigmix.experts.mix import Mix
from sigmix.serve.scheduler import GenerationRequest

EXAMPLES = [{"prompt": "one", "answer": "two"}, {"prompt": "three", "answer": "four"}]


def test_models(server):
    _, found, _ = server.call("GET", "/v1/models")
    kinds = {model["id"]: model["sigmix"]["kind"] for model in found["data"]}
    assert kinds.items() >= {"auto": "auto", "base": "base", **dict.fromkeys(NAMES, "expert")}.items()
    assert server.call("GET", "/v1/models/math")[1]["id"] == "math"
    assert server.call("GET", "/v1/models/math:.5+code:.5")[1]["sigmix"]["mix"] == "code:0.5+math:0.5"
    status, found, _ = server.call("GET", "/v1/models/maths")
    assert (status, found["error"]["code"]) == (404, "model_not_found")
    assert "math" in found["error"]["message"]


@pytest.mark.parametrize("method, path, status", [("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405)])
def test_unknown_routes(server, method, path, status):
    got, found, _ = server.call(method, path)
    assert got == status
    assert set(found["error"]) == {"message", "type", "param", "code"}


def test_load_and_unload_an_expert(server):
    new = expert(build_tiny(), "new", 9)
    new.save_pretrained(server.folder / "new")
    assert server.chat(model="new")[0] == 404
    status, found, _ = server.call("POST", "/v1/experts", {"path": "new"})
    assert (status, found) == (201, {"id": "new", "object": "sigmix.expert", "loaded": True})
    engine = Engine(build_tiny(), build_tokenizer(), {"new": new})
    reply = server.chat("one", model="new")[1]["choices"][0]["message"]["content"]
    assert reply == engine.generate(["one"], "new", max_new_tokens=6)[0].text
    assert server.call("POST", "/v1/experts", {"path": "new"})[0] == 400
    _, listed, _ = server.call("GET", "/v1/experts")
    assert {entry["id"] for entry in listed["data"]} == {*NAMES, "new"}
    assert server.call("DELETE", "/v1/experts/new")[0] == 200
    assert server.call("DELETE", "/v1/experts/new")[0] == 404
    assert server.chat(model="new")[0] == 404


def test_list_of_experts_has_the_fields_of_the_schema(server):
    licensed = expert(build_tiny(), "licensed", 9).with_meta(license="mit")
    server.service.registry.add(licensed)
    try:
        _, listed, _ = server.call("GET", "/v1/experts")
        (entry,) = (entry for entry in listed["data"] if entry["id"] == "licensed")
        assert entry["license"] == "mit"
        assert entry["running_requests"] == 0
        assert entry["num_parameters"] > 0
        assert listed["folders"] == [str(server.folder)]
    finally:
        server.service.registry.remove("licensed")


def test_an_expert_in_use_is_not_unloaded(server, monkeypatch):
    request = GenerationRequest("client", [5], Mix.one("math"), lambda event: None)
    monkeypatch.setattr(server.service.scheduler, "running", lambda: [request])
    status, found, _ = server.call("DELETE", "/v1/experts/math")
    assert (status, found["error"]["code"]) == (409, "in_use")
    counts = {entry["id"]: entry["running_requests"] for entry in server.call("GET", "/v1/experts")[1]["data"]}
    assert (counts["math"], counts["code"]) == (1, 0)


def test_invalid_experts_are_rejected(server, tmp_path):
    good = expert(build_tiny(), "good", 9)
    good.save_pretrained(server.folder / "broken")
    (server.folder / "broken" / "adapter_model.safetensors").write_bytes(b"x" * 100)
    other = build_tiny(seed=7)
    expert(other, "foreign", 9).sealed(build_tiny(seed=7)).save_pretrained(server.folder / "foreign")
    good.save_pretrained(tmp_path / "outside")
    (server.folder / "link").symlink_to(tmp_path / "outside")
    good.save_pretrained(server.folder / "linked")
    weights = server.folder / "linked" / "adapter_model.safetensors"
    shutil.move(weights, tmp_path / "weights")
    weights.symlink_to(tmp_path / "weights")
    good.save_pretrained(server.folder / "pickled")
    (server.folder / "pickled" / "adapter_model.safetensors").unlink()
    (server.folder / "pickled" / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    paths = ["broken", "foreign", "link", "linked", "pickled", "../outside", str(tmp_path / "outside"), "/etc", ".",
             "a\0b", "none"]  # fmt: skip
    for path in paths:
        status, found, _ = server.call("POST", "/v1/experts", {"path": path})
        assert status == 400, (path, found)
    assert server.chat(model="math")[0] == 200


def test_saved_mixtures(server):
    assert server.call("POST", "/v1/mixes", {"name": "both", "mix": "math:.5+code:.5"})[0] == 201
    assert server.chat("one", model="both")[1]["choices"] == server.chat("one", model="math:0.5+code:0.5")[1]["choices"]
    layers = {"name": "layered", "mix": {"weights": {"math": [1.0, 0.2]}}}
    assert server.call("POST", "/v1/mixes", layers)[0] == 201
    assert server.chat("one", model="layered")[1]["sigmix"]["weights"] == {"math": [1.0, 0.2]}
    for invalid in (
        {"name": "math", "mix": "code"}, {"name": "auto", "mix": "code"}, {"name": "No", "mix": "code"},
        {"name": "x", "mix": "auto"}, {"name": "x", "mix": {"weights": {"math": [1.0]}}}, {"name": "x", "mix": {}},
    ):  # fmt: skip
        assert server.call("POST", "/v1/mixes", invalid)[0] == 400, invalid
    assert server.call("POST", "/v1/mixes", {"name": "x", "mix": "none"})[0] == 404
    assert server.call("DELETE", "/v1/mixes/both")[0] == 200
    assert server.call("DELETE", "/v1/mixes/both")[0] == 404
    assert server.chat(model="both")[0] == 404


def test_feedback(server):
    _, found = server.chat(model="math")
    status, result, _ = server.call("POST", "/v1/feedback", {"id": found["id"], "reward": 1})
    assert (status, result["learned"]) == (200, False)  # the mixture was given
    assert server.call("POST", "/v1/feedback", {"id": found["id"], "reward": 1})[0] == 409
    assert server.call("POST", "/v1/feedback", {"id": "chatcmpl-none", "reward": 1})[0] == 404
    assert server.call("POST", "/v1/feedback", {"id": found["id"], "reward": 2})[0] == 400
    _, two = server.chat(model="math", n=2)
    assert server.call("POST", "/v1/feedback", {"id": two["id"], "reward": 1})[0] == 404


def test_the_server_answers_while_examples_are_checked(server, monkeypatch):
    called, release = threading.Event(), threading.Event()

    def grade(reply: str, reference: str) -> float:
        called.set()
        release.wait(TIMEOUT)
        return 0.0  # no reply can match

    monkeypatch.setitem(server.service.adaptations.graders, "exact", grade)
    body, statuses = {"examples": [{"prompt": "one", "answer": "two"}]}, []
    thread = threading.Thread(target=lambda: statuses.append(server.call("POST", "/v1/adapt", body)[0]))
    thread.start()
    assert called.wait(TIMEOUT)
    assert server.call("GET", "/health")[0] == 200
    assert thread.is_alive()
    release.set()
    thread.join(TIMEOUT)
    assert statuses == [400]


def test_adaptation(server):
    body = {"name": "fitted", "examples": EXAMPLES}
    status, found, _ = server.call("POST", "/v1/adapt", body)
    assert status == 202

    def finished() -> bool:
        assert server.chat(model="code")[0] == 200
        return server.call("GET", f"/v1/adapt/{found['id']}")[1]["status"] not in ("waiting", "running")

    wait_until(finished)
    found = server.call("GET", f"/v1/adapt/{found['id']}")[1]
    assert found["status"] == "done", found
    assert found["progress"]["round"] == len(found["trace"]) > 0
    assert found["evidence"]["examples"] == 2
    assert server.chat(model="fitted")[1]["sigmix"]["mix"] == found["mix"]["id"]
    assert server.call("GET", "/v1/adapt/none")[0] == 404


@pytest.mark.parametrize(
    "change, status",
    [({"examples": []}, 400), ({"score": "none"}, 404), ({"name": "math"}, 400), ({"examples": EXAMPLES * 20}, 400),
     ({"examples": [{"prompt": "x " * 400, "answer": "y"}]}, 400)],
)  # fmt: skip
def test_invalid_adaptations(server, change, status):
    assert server.call("POST", "/v1/adapt", {"examples": EXAMPLES, **change})[0] == status


def test_cancelled_adaptation(server):
    _, slow, _ = server.call("POST", "/v1/adapt", {"examples": EXAMPLES, "settings": "full", "name": "slow"})
    assert server.call("DELETE", f"/v1/adapt/{slow['id']}")[1]["status"] == "cancelled"
    assert server.chat(model="slow")[0] == 404


def test_health_and_metrics(server):
    assert server.call("GET", "/health")[:2] == (200, {"status": "ok", "compiled": False})
    server.chat(model="math")
    status, text, _ = server.call("GET", "/metrics")
    assert status == 200
    assert 'sigmix_mix_requests_total{mix="math"}' in text
    assert 'sigmix_requests_total{route="/v1/chat/completions",status="200"}' in text
    assert "sigmix_first_token_seconds_count" in text


def test_page(server):
    assert "script" in server.call("GET", "/")[1]
    for name in ("app.js", "api.js", "style.css", "icon.svg"):
        assert server.call("GET", f"/static/{name}")[0] == 200
    assert server.call("GET", "/static/../app.py")[0] == 404


def test_tokenizer(server, alone):
    text = "one two three"
    _, found, _ = server.call("POST", "/tokenize", {"prompt": text})
    ids = alone.encode(text, chat=False)
    assert found == {"tokens": ids, "count": len(ids), "max_model_len": alone.context_length}
    assert server.call("POST", "/detokenize", {"tokens": ids})[1] == {"prompt": text}
    _, info, _ = server.call("GET", "/tokenizer_info")
    assert info["eos_token"] == alone.tokenizer.eos_token
    assert info["chat_template"] == alone.tokenizer.chat_template
    for token in (2**70, 10**6, -1):
        status, found, _ = server.call("POST", "/detokenize", {"tokens": [5, token]})
        assert (status, found["error"]["param"].partition(".")[0]) == (400, "tokens")
    assert server.call("POST", "/tokenize", {"prompt": text, "text": text})[0] == 400


def test_health_reports_a_scheduler_that_died(tmp_path, monkeypatch):
    monkeypatch.setenv("SIGMIX_CACHE", str(tmp_path / "cache"))
    with serving(tmp_path) as server:
        assert server.call("GET", "/health")[:2] == (200, {"status": "ok", "compiled": False})
        scheduler = server.service.scheduler

        def broken(*_, **__):
            raise SystemError("bug")

        monkeypatch.setattr(scheduler.queue, "charge", broken)
        for _ in range(2):
            status, found = server.chat()
            assert (status, found["error"]["code"]) == (500, "internal")
        assert server.call("GET", "/health")[:2] == (503, {"status": "failed", "compiled": False})
