"""Fields of request bodies: each takes effect, does not change an answer, or is refused by name."""

from __future__ import annotations

import pytest
from helpers_serve import BODY, CHAT

TEXT = "/v1/completions"
PROMPT = {"prompt": "one two", "max_tokens": 8}


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "a", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "x"},
        {"prompt_cache_key": "x", "prompt_cache_retention": "24h", "parallel_tool_calls": False},
        {"prediction": {"type": "content", "content": "x"}, "modalities": ["text"], "reasoning_effort": "none"},
        {"stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "verbosity": "medium"},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "repetition_penalty": 1.0, "top_k": -1},
        {"temperature": None, "top_p": None, "n": None, "stop": None, "seed": None, "stream": None, "tools": None},
        {"stop": [], "anything": None},
    ],
)
def test_fields_that_do_not_change_the_answer(server, fields):
    status, plain, _ = server.call("POST", CHAT, BODY)
    for path, body in ((CHAT, BODY), (TEXT, PROMPT)):
        status, found, _ = server.call("POST", path, {**body, **fields})
        assert status == 200, found
        if path == CHAT:
            assert found["choices"] == plain["choices"]


@pytest.mark.parametrize(
    "fields",
    [
        {"unknown": 1}, {"max_token": 5}, {"reasoning_effort": "high"}, {"modalities": ["text", "audio"]},
        {"web_search_options": {}}, {"functions": [{"name": "f"}]}, {"verbosity": "low"}, {"ignore_eos": True},
        {"min_tokens": 4}, {"length_penalty": 2}, {"use_beam_search": True}, {"skip_special_tokens": False},
        {"prompt_logprobs": 1}, {"moderation": {"model": "m"}}, {"keep_alive": 5},
    ],
)  # fmt: skip
@pytest.mark.parametrize("path, body", [(CHAT, BODY), (TEXT, PROMPT)])
def test_other_fields_are_refused_by_name(server, path, body, fields):
    status, found, _ = server.call("POST", path, {**body, **fields})
    (name,) = fields
    assert (status, found["error"]["param"]) == (400, name)
    assert name in found["error"]["message"]


def test_a_misspelt_field_names_the_right_one(server):
    _, found, _ = server.call("POST", CHAT, {**BODY, "max_token": 5})
    assert "max_tokens" in found["error"]["message"]


@pytest.mark.parametrize(
    "path, body, param",
    [
        (CHAT, {**BODY, "sigmix": {"stategy": "A"}}, "sigmix.stategy"),
        (CHAT, {**BODY, "stream_options": {"usage": True}}, "stream_options.usage"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "cache": 1}]}, "messages.0.cache"),
        ("/v1/adapt", {"examples": [{"prompt": "a", "answer": "b", "system": "c"}]}, "examples.0.system"),
        ("/v1/adapt", {"examples": [{"prompt": "a", "answer": "b"}], "rounds": 3}, "rounds"),
        ("/v1/feedback", {"id": "x", "reward": 1, "comment": "y"}, "comment"),
        ("/v1/mixes", {"name": "x", "mix": "math", "weights": {}}, "weights"),
        ("/v1/experts", {"path": "x", "name": "y"}, "name"),
    ],
)
def test_unknown_fields_of_other_objects_and_routes(server, path, body, param):
    status, found, _ = server.call("POST", path, body)
    assert (status, found["error"]["param"]) == (400, param)


def test_messages_of_stock_clients(server):
    reply = {"role": "assistant", "content": "two", "refusal": None, "annotations": [], "audio": None,
             "function_call": None, "tool_calls": None}  # fmt: skip
    messages = [{"role": "user", "content": "one", "type": "text"}, reply, {"role": "user", "content": "three"}]
    status, found, _ = server.call("POST", CHAT, {**BODY, "messages": messages})
    assert status == 200, found
