"""Errors of invalid requests: one sentence that names the field by its path and the expected value."""

from __future__ import annotations

import pytest
from helpers_serve import BODY, CHAT

TEXT = "/v1/completions"
USER = {"role": "user", "content": "x"}
TAIL = b'"messages": [{"role": "user", "content": "x"}]}'
PART = {"type": "text", "text": "a"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
INTERNAL = ("function-", "constrained", "list[", "union", "Input should", "Value error", "tagged", "RequestModel")


def error_of(server, path, body, expected=400):
    status, found, _ = server.call("POST", path, body)
    assert status == expected, found
    error = found["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert not any(word in error["message"] + str(error["param"]) for word in INTERNAL)
    assert "\n" not in error["message"]
    return error


@pytest.mark.parametrize(
    "fields, param, words",
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "a list"),
        ({"messages": ["hi"]}, "messages.0", "an object"),
        ({"messages": None}, "messages", "missing"),
        ({"messages": [{**USER, "role": "wizard"}]}, "messages.0.role", "'user'"),
        ({"messages": [{"content": "x"}]}, "messages.0.role", "missing"),
        ({"messages": [{**USER, "content": 5}]}, "messages.0.content", "a string or a list"),
        ({"messages": [{**USER, "content": [PART, IMAGE]}]}, "messages.0.content.1", "image_url"),
        ({"messages": [{**USER, "content": [{"type": "text"}]}]}, "messages.0.content.0.text", "missing"),
        ({"messages": [{**USER, "content": [{"type": "text", "text": 5}]}]}, "messages.0.content.0.text", "a string"),
        ({"messages": [{**USER, "content": ["x"]}]}, "messages.0.content.0", "an object"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "user"),
        ({"stop": ""}, "stop", "empty"),
        ({"stop": ["END", ""]}, "stop.1", "empty"),
        ({"stop": ["END", 5]}, "stop.1", "a string"),
        ({"stop": 5}, "stop", "a string or a list"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"temperature": 2.1}, "temperature", "at most 2"),
        ({"temperature": True}, "temperature", "a number"),
        ({"temperature": "0.5"}, "temperature", "a number"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"top_p": [1]}, "top_p", "a number"),
        ({"n": 0}, "n", "at least 1"),
        ({"n": 99}, "n", "at most"),
        ({"n": 1.5}, "n", "an integer"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": "8"}, "max_tokens", "an integer"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "at least 1"),
        ({"seed": 2**63}, "seed", "below"),
        ({"seed": "x"}, "seed", "an integer"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream": 1}, "stream", "true or false"),
        ({"stream_options": []}, "stream_options", "an object"),
        ({"logprobs": 3}, "logprobs", "true or false"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
        ({"model": 5}, "model", "a string"),
        ({"sigmix": "A"}, "sigmix", "an object"),
        ({"sigmix": {"strategy": 1}}, "sigmix.strategy", "a string"),
    ],
)
def test_chat_fields(server, fields, param, words):
    for stream in ({}, {"stream": True}):
        error = error_of(server, CHAT, {**BODY, **stream, **fields})
        assert error["param"] == param
        assert words in error["message"]
        assert error["message"].startswith(param)


@pytest.mark.parametrize(
    "prompt, param, words",
    [
        (["a", [1]], "prompt.1", "a string"),
        ([1, "a"], "prompt.1", "an integer"),
        ([[1], "a"], "prompt.1", "a list"),
        ([[1], [2, "x"]], "prompt.1.1", "an integer"),
        ([True], "prompt.0", "an integer"),
        ([1.5], "prompt.0", "an integer"),
        ({"a": 1}, "prompt", "a string or a list"),
        (None, "prompt", "missing"),
        ([], "prompt", "1 to"),
        ("", "prompt", "empty"),
        ([[]], "prompt", "empty"),
        ([10**9], "prompt", "1000000000"),
        ([[5], [-1]], "prompt.1", "-1"),
        ([10**30], "prompt", "0 to"),
    ],
)
def test_prompts_of_text_completions(server, prompt, param, words):
    error = error_of(server, TEXT, {"prompt": prompt})
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"{", b"", b"null", b"[]", b'"x"', b"\xff\xfe{}", b"[" * 100_000, b'{"\\ud800": 1}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"temperature": NaN, ' + TAIL, b'{"temperature": 1e400, ' + TAIL, b'{"top_p": -Infinity, ' + TAIL,
        b'{"seed": 1' + b"0" * 5000 + b", " + TAIL, b'{"max_tokens": 1e400, ' + TAIL,
    ],
)  # fmt: skip
def test_malformed_bodies(server, body):
    error_of(server, CHAT, body)


@pytest.mark.parametrize("prompt", ["one \ud800", ["one", "\udfff"]])
def test_prompts_that_are_not_unicode(server, prompt):
    error = error_of(server, TEXT, {"prompt": prompt, "echo": True})
    assert error["param"] == ("prompt" if isinstance(prompt, str) else "prompt.1")
    assert "Unicode" in error["message"]


def test_a_body_without_the_json_header(server):
    status, found, _ = server.call("POST", CHAT, BODY, content_type="application/x-www-form-urlencoded")
    assert status == 400
    assert "application/json" in found["error"]["message"]


@pytest.mark.parametrize(
    "model",
    ["gpt-4o-mini", "GPT-4", "meta-llama/Llama-3.1-8B-Instruct", "maths", "", " ", "a:x+b", "math:0.5+cod:0.5",
     "llama3.2:1b", "Größe", "x" * 5000, "math+", "model with spaces", "../etc", "auto:0.5"],
)  # fmt: skip
def test_unknown_models(server, model):
    for path, body in ((CHAT, BODY), (TEXT, {"prompt": "one"})):
        error = error_of(server, path, {**body, "model": model}, 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert len(error["message"]) < 500


@pytest.mark.parametrize("model", ["gpt-4o-mini", "GPT-4", "meta-llama/Llama-3.1-8B", "a:x+b", "x%20y", "Gr%C3%B6"])
def test_unknown_models_by_path(server, model):
    status, found, _ = server.call("GET", f"/v1/models/{model}")
    assert (status, found["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("model", ["math:x", "math:", "math:.5+code:1e999", "math+math", "base:x"])
def test_bad_weights_of_known_experts(server, model):
    assert error_of(server, CHAT, {**BODY, "model": model})["param"] == "model"


def test_numbers_with_an_exponent_are_weights(server):
    assert server.chat(model="math:1e-1+code:1e+0")[0] == 200


def test_unknown_strategy(server):
    error = error_of(server, CHAT, {**BODY, "sigmix": {"strategy": "Z"}}, 404)
    assert error["param"] == "sigmix.strategy"


def test_too_long_prompt(server):
    error = error_of(server, CHAT, {"messages": [{"role": "user", "content": "x " * 400}], "max_tokens": 4})
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")


@pytest.mark.parametrize(
    "path, body, status, param",
    [
        ("/v1/adapt", {"examples": [{"prompt": "a", "answer": "b"}], "score": "x"}, 404, "score"),
        ("/v1/adapt", {"examples": [{"prompt": "a", "answer": "b"}], "name": "A B"}, 400, "name"),
        ("/v1/adapt", {"examples": [{"prompt": "a", "answer": "b"}], "max_tokens": 250}, 400, "examples.0"),
        ("/v1/adapt", {"examples": [{"prompt": "a", "answer": 5}]}, 400, "examples.0.answer"),
        ("/v1/feedback", {"id": "x", "reward": True}, 400, "reward"),
        ("/v1/mixes", {"name": "A", "mix": "math"}, 400, "name"),
        ("/v1/mixes", {"name": "x", "mix": 5}, 400, "mix"),
        ("/v1/mixes", {"name": "x", "mix": {"weights": {"math": 1}, "other": 1}}, 400, "mix.other"),
        ("/v1/mixes", {"name": "x", "mix": {"weights": {"math": "a"}}}, 400, "mix"),
        ("/v1/mixes", {"name": "x", "mix": "nope"}, 404, "mix"),
        ("/v1/experts", {"path": ["x"]}, 400, "path"),
    ],
)
def test_other_routes(server, path, body, status, param):
    assert error_of(server, path, body, status)["param"] == param


def test_unknown_routes_are_named(server):
    for method, path, status in (("POST", "/v1/chat", 404), ("GET", CHAT, 405)):
        got, found, _ = server.call(method, path)
        assert got == status
        assert f"{method} {path}" in found["error"]["message"]
