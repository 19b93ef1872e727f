"""The server as clients see it: OpenAI's formats, streams, errors, models, experts, mixes, feedback, adaptation."""

from __future__ import annotations

import http.client
import json

import pytest
from helpers_serve import NAMES
from helpers_tiny import build_tokenizer

from sigmix.experts.mix import Mix

ASK = {"messages": [{"role": "user", "content": "one two three"}], "max_tokens": 8}


def events(server, body, path="/v1/chat/completions") -> list:
    """The JSON of a stream's events, in order; it must end with [DONE]."""
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    link.request("POST", path, json.dumps({**body, "stream": True}), {"content-type": "application/json"})
    answer = link.getresponse()
    assert answer.status == 200, answer.read()
    assert answer.getheader("content-type").startswith("text/event-stream")
    lines = [part for part in answer.read().decode().split("\n\n") if part]
    link.close()
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1] if line.startswith("data: ")]


# ------------------------------------------------------------------ answers


@pytest.mark.parametrize("model", ["base", "math", "math:.7+code:.3", "code:-0.5"])
def test_chat_is_the_engine(server, alone, model):
    status, found, headers = server.call("POST", "/v1/chat/completions", {**ASK, "model": model})
    assert status == 200
    assert headers["x-request-id"].startswith("req-")
    (whole,) = alone.generate(["one two three"], model, max_new_tokens=8)
    choice = found["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": whole.text, "refusal": None}
    assert choice["finish_reason"] == whole.finish
    assert found["usage"] == {
        "prompt_tokens": whole.prompt_tokens, "completion_tokens": len(whole.ids),
        "total_tokens": whole.prompt_tokens + len(whole.ids),
    }  # fmt: skip
    assert (found["object"], found["model"]) == ("chat.completion", model)
    assert found["sigmix"]["mix"] == Mix.parse(model).id
    assert found["sigmix"]["weights"] == Mix.parse(model).to_json()["weights"]


def test_auto_decides_and_says_why(server, alone):
    status, found = server.chat("one two three", model="auto")
    assert status == 200
    told = found["sigmix"]
    assert told["mix"] in {*NAMES, "base"}
    assert told["reason"]
    assert told["pass1_tokens"] > 0
    assert told["scores"].keys() >= {told["label"]}
    (whole,) = alone.generate(["one two three"], told["mix"], max_new_tokens=6)
    assert found["choices"][0]["message"]["content"] == whole.text


@pytest.mark.parametrize(
    "path, body", [("/v1/chat/completions", ASK), ("/v1/completions", {"prompt": "one two", "max_tokens": 8})]
)
def test_a_stream_is_the_whole_answer(server, path, body):
    asked = {**body, "model": "math", "n": 2, "temperature": 1.0, "seed": 5}
    _, whole, _ = server.call("POST", path, asked)
    found = events(server, {**asked, "stream_options": {"include_usage": True}}, path)
    assert found[0]["sigmix"]["mix"] == "math"
    assert len({event["id"] for event in found}) == 1
    assert found[-1]["choices"] == []
    assert found[-1]["usage"] == whole["usage"]
    for index, choice in enumerate(whole["choices"]):
        own = [c for event in found for c in event["choices"] if c["index"] == index]
        text = "".join(c.get("text", "") or c.get("delta", {}).get("content", "") for c in own)
        assert text == (choice["text"] if "text" in choice else choice["message"]["content"])
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == [choice["finish_reason"]]
    if "chat" in path:
        assert [c["delta"].get("role") for c in found[0]["choices"]] == ["assistant", "assistant"]


def test_logprobs(server, alone):
    status, found = server.chat("one two three", model="math", logprobs=True, top_logprobs=3)
    assert status == 200
    (whole,) = alone.generate(["one two three"], "math", max_new_tokens=6)
    told = found["choices"][0]["logprobs"]["content"]
    assert [one["logprob"] for one in told] == pytest.approx(whole.logprobs, abs=1e-3)
    for one in told:
        assert len(one["top_logprobs"]) == 3
        assert one["top_logprobs"][0]["token"] == one["token"]
        assert bytes(one["bytes"]).decode() == one["token"]
    asked = {"prompt": "one", "max_tokens": 4, "model": "math", "logprobs": 2}
    _, plain, _ = server.call("POST", "/v1/completions", asked)
    old = plain["choices"][0]["logprobs"]
    assert len(old["tokens"]) == len(old["token_logprobs"]) == len(old["top_logprobs"]) == len(old["text_offset"]) == 4
    assert old["text_offset"][:2] == [0, len(old["tokens"][0])]
    streamed = events(server, asked, "/v1/completions")
    parts = [c["logprobs"] for event in streamed for c in event["choices"] if c["logprobs"]]
    assert [token for part in parts for token in part["tokens"]] == old["tokens"]
    assert [place for part in parts for place in part["text_offset"]] == old["text_offset"]


def test_several_prompts(server, alone):
    _, found, _ = server.call(
        "POST", "/v1/completions", {"prompt": ["one", "two three"], "max_tokens": 5, "n": 2, "model": "code"}
    )
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    for number, prompt in enumerate(["one", "two three"]):
        (whole,) = alone.generate([prompt], "code", max_new_tokens=5, chat=False)
        assert found["choices"][2 * number]["text"] == found["choices"][2 * number + 1]["text"] == whole.text
    ids = build_tokenizer()("one")["input_ids"]
    _, same, _ = server.call("POST", "/v1/completions", {"prompt": ids, "max_tokens": 5, "model": "code"})
    assert same["choices"][0]["text"] == found["choices"][0]["text"]


def test_seed_and_stop(server):
    hot = {"temperature": 1.5, "max_tokens": 12, "model": "math"}
    texts = [server.chat(**hot, seed=seed)[1]["choices"][0]["message"]["content"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    mark = texts[0][3:5]
    _, found = server.chat(**hot, seed=1, stop=[mark])
    assert found["choices"][0]["message"]["content"] == texts[0].split(mark)[0]
    assert found["choices"][0]["finish_reason"] == "stop"


def test_parts_of_a_message_and_a_system_turn(server, alone):
    parts = [{"type": "text", "text": "one two"}, {"type": "text", "text": " three"}]
    _, found, _ = server.call(
        "POST",
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": parts}], "max_tokens": 8, "model": "math"},
    )
    assert (
        found["choices"][0]["message"]["content"] == alone.generate(["one two three"], "math", max_new_tokens=8)[0].text
    )
    ids = alone.encode("one", system="two")
    asked = {
        "messages": [{"role": "developer", "content": "two"}, {"role": "user", "content": "one"}],
        "model": "math",
        "max_tokens": 8,
    }
    _, found, _ = server.call("POST", "/v1/chat/completions", asked)
    assert found["usage"]["prompt_tokens"] == len(ids)
    assert found["choices"][0]["message"]["content"] == alone.generate([ids], "math", max_new_tokens=8)[0].text


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "body, status, word, param",
    [
        ({"messages": []}, 400, "at least 1", "messages"),
        ({"messages": "hi"}, 400, "list", "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "role", None),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "user", "messages"),
        ({**ASK, "model": "maths"}, 404, "math", "model"),
        ({**ASK, "model": "math:x"}, 400, "finite number", "model"),
        ({**ASK, "temperature": -1}, 400, "temperature", "temperature"),
        ({**ASK, "top_p": 0}, 400, "top_p", "top_p"),
        ({**ASK, "n": 0}, 400, "n", "n"),
        ({**ASK, "n": 100}, 400, "8", "n"),
        ({**ASK, "max_tokens": 0}, 400, "max_tokens", "max_tokens"),
        ({**ASK, "max_tokens": 100000}, 400, "context", None),
        ({**ASK, "tools": [{"type": "function"}]}, 400, "tools", None),
        ({**ASK, "response_format": {"type": "json_object"}}, 400, "response_format", None),
        ({**ASK, "logit_bias": {"5": 1}}, 400, "logit_bias", None),
        ({**ASK, "stop": [""]}, 400, "stop", None),
        ({**ASK, "sigmix": {"policy": "Z"}}, 404, "policy", None),
        ({"messages": [{"role": "user", "content": "x " * 400}], "max_tokens": 4}, 400, "context", None),
        (b"{", 400, "", None),
        (b"\xff\xfe{}", 400, "", None),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "", None),
        (b"[" * 100_000, 400, "", None),
        (b"null", 400, "", None),
        (b'{"\\ud800": 1}', 400, "", None),
        (b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}', 400, "", None),
        (b'{"temperature": NaN, "messages": [{"role": "user", "content": "x"}]}', 400, "", None),
        (b'{"top_p": Infinity, "messages": [{"role": "user", "content": "x"}]}', 400, "", None),
        (b'{"seed": 1' + b"0" * 5000 + b', "messages": [{"role": "user", "content": "x"}]}', 400, "", None),
        (b'{"max_tokens": 1e400, "messages": [{"role": "user", "content": "x"}]}', 400, "", None),
    ],
)  # fmt: skip
def test_bad_requests(server, body, status, word, param):
    got, found, _ = server.call("POST", "/v1/chat/completions", body)
    assert got == status, found
    error = found["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert word in error["message"] + str(error["param"])
    if param:
        assert error["param"] == param
    stream = body if isinstance(body, bytes) else {**body, "stream": True}
    assert server.call("POST", "/v1/chat/completions", stream)[0] == status


def test_other_bad_requests(server):
    assert server.call("GET", "/v1/nothing")[1]["error"]["code"] == "not_found"
    assert server.call("GET", "/v1/chat/completions")[0] == 405
    assert server.call("POST", "/v1/completions", {"prompt": [10**9]})[0] == 400
    assert server.call("POST", "/v1/completions", {"prompt": []})[0] == 400
    assert server.call("POST", "/v1/completions", {"prompt": ""})[0] == 400
    assert server.call("POST", "/v1/completions", {"prompt": "x", "echo": True})[0] == 400
    assert server.call("GET", "/v1/models/none")[0] == 404
    assert server.call("POST", "/v1/chat/completions", {**ASK, "unknown": 1})[0] == 200
