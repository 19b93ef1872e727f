"""Completions as clients see them: OpenAI's formats, streams, log-probabilities, seeds, invalid requests."""

from __future__ import annotations

import json
import re
import threading

import helpers_serve
import pytest
from helpers_serve import BODY, CHAT, NAMES, NEVER_ENDS, bank, serving, wait_until
from helpers_tiny import build_tiny, build_tokenizer

from sigmix.adapt import FewShotSearch, PromptDispatch
from sigmix.engine import Engine
from sigmix.errors import PromptError
from sigmix.experts.mix import Mix

LAST = "<|x199|>"
"""Text of the last token of `extended_tokenizer`, which the tiny model has no embedding for."""


def extended_tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|x{number}|>" for number in range(200)]})
    return tokenizer


def text_of(response, index: int = 0) -> str:
    return response["choices"][index]["message"]["content"]


@pytest.mark.parametrize("model", ["base", "math", "math:.7+code:.3", "code:-0.5"])
def test_chat_equals_the_engine(server, alone, model):
    status, found, headers = server.call("POST", CHAT, {**BODY, "model": model})
    assert status == 200
    assert headers["x-request-id"].startswith("req-")
    (expected,) = alone.generate(["one two three"], model, max_new_tokens=8)
    choice = found["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == expected.finish
    assert found["usage"] == {
        "prompt_tokens": expected.prompt_tokens, "completion_tokens": len(expected.ids),
        "total_tokens": expected.prompt_tokens + len(expected.ids),
    }  # fmt: skip
    assert (found["object"], found["model"]) == ("chat.completion", model)
    assert found["sigmix"]["mix"] == Mix.parse(model).id
    assert found["sigmix"]["weights"] == Mix.parse(model).to_json()["weights"]


def test_auto_reports_its_decision(server, alone):
    status, found = server.chat("one two three", model="auto")
    assert status == 200
    decision = found["sigmix"]
    assert decision["mix"] in {*NAMES, "base"}
    assert decision["reason"]
    assert decision["pass1_tokens"] > 0
    assert decision["scores"].keys() >= {decision["label"]}
    (expected,) = alone.generate(["one two three"], decision["mix"], max_new_tokens=6)
    assert text_of(found) == expected.text


@pytest.mark.parametrize("path, body", [(CHAT, BODY), ("/v1/completions", {"prompt": "one two", "max_tokens": 8})])
def test_stream_equals_the_whole_response(server, path, body):
    options = {**body, "model": "math", "n": 2, "temperature": 1.0, "seed": 5}
    _, whole, _ = server.call("POST", path, options)
    events = server.stream({**options, "stream_options": {"include_usage": True}}, path)
    assert events[0]["sigmix"]["mix"] == "math"
    assert len({event["id"] for event in events}) == 1
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    for index, choice in enumerate(whole["choices"]):
        own = [c for event in events for c in event["choices"] if c["index"] == index]
        text = "".join(c.get("text", "") or c.get("delta", {}).get("content", "") for c in own)
        assert text == (choice["text"] if "text" in choice else choice["message"]["content"])
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == [choice["finish_reason"]]
    if path == CHAT:
        assert [c["delta"].get("role") for c in events[0]["choices"]] == ["assistant", "assistant"]


def test_logprobs(server, alone):
    status, found = server.chat("one two three", model="math", logprobs=True, top_logprobs=3)
    assert status == 200
    (expected,) = alone.generate(["one two three"], "math", max_new_tokens=6)
    content = found["choices"][0]["logprobs"]["content"]
    assert [token["logprob"] for token in content] == pytest.approx(expected.logprobs, abs=1e-3)
    for token in content:
        assert len(token["top_logprobs"]) == 3
        assert token["top_logprobs"][0]["token"] == token["token"]
        assert bytes(token["bytes"]).decode() == token["token"]
    options = {"prompt": "one", "max_tokens": 4, "model": "math", "logprobs": 2}
    _, plain, _ = server.call("POST", "/v1/completions", options)
    old = plain["choices"][0]["logprobs"]
    assert len(old["tokens"]) == len(old["token_logprobs"]) == len(old["top_logprobs"]) == len(old["text_offset"]) == 4
    assert old["text_offset"][:2] == [0, len(old["tokens"][0])]
    parts = [c["logprobs"] for event in server.stream(options, "/v1/completions") for c in event["choices"]]
    assert [token for part in parts if part for token in part["tokens"]] == old["tokens"]
    assert [offset for part in parts if part for offset in part["text_offset"]] == old["text_offset"]


def test_several_prompts(server, alone):
    options = {"max_tokens": 5, "model": "code"}
    _, found, _ = server.call("POST", "/v1/completions", {**options, "prompt": ["one", "two three"], "n": 2})
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    for number, prompt in enumerate(["one", "two three"]):
        (expected,) = alone.generate([prompt], "code", max_new_tokens=5, chat=False)
        assert found["choices"][2 * number]["text"] == found["choices"][2 * number + 1]["text"] == expected.text
    ids = build_tokenizer()("one")["input_ids"]
    _, same, _ = server.call("POST", "/v1/completions", {**options, "prompt": ids})
    assert same["choices"][0]["text"] == found["choices"][0]["text"]


def test_seed_and_stop(server):
    sampled = {"temperature": 1.5, "max_tokens": 12, "model": "math"}
    texts = [text_of(server.chat(**sampled, seed=seed)[1]) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    mark = texts[0][3:5]
    _, found = server.chat(**sampled, seed=1, stop=[mark])
    assert text_of(found) == texts[0].split(mark)[0]
    assert found["choices"][0]["finish_reason"] == "stop"


def test_neighbouring_seeds_share_no_choice(server, alone):
    sampled = {"temperature": 1.5, "max_tokens": 12, "model": "math"}
    first, second = (server.chat(**sampled, seed=seed, n=3)[1] for seed in (1, 2))
    texts = [text_of(response, index) for response in (first, second) for index in range(3)]
    assert len(set(texts)) == 6
    (expected,) = alone.generate(
        ["one two"], "math", max_new_tokens=12, do_sample=True, temperature=1.5, seeds=[1], form="factored"
    )
    assert texts[0] == expected.text == text_of(server.chat(**sampled, seed=1)[1])


def test_text_parts_and_system_message(server, alone):
    parts = [{"type": "text", "text": "one two"}, {"type": "text", "text": " three"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 8, "model": "math"}
    (expected,) = alone.generate(["one two three"], "math", max_new_tokens=8)
    assert text_of(server.call("POST", CHAT, body)[1]) == expected.text
    ids = alone.encode("one", system="two")
    messages = [{"role": "developer", "content": "two"}, {"role": "user", "content": "one"}]
    _, found, _ = server.call("POST", CHAT, {**body, "messages": messages})
    assert found["usage"]["prompt_tokens"] == len(ids)
    assert text_of(found) == alone.generate([ids], "math", max_new_tokens=8)[0].text


def test_full_queue(server):
    scheduler = server.service.scheduler
    limits, scheduler.queue.max_size = scheduler.queue.max_size, 2
    try:
        with server.queued_chats(2) as statuses:
            for stream in (False, True):
                status, found, headers = server.call("POST", CHAT, {**BODY, "stream": stream})
                assert (status, found["error"]["code"]) == (429, "rate_limit_exceeded")
                assert int(headers["retry-after"]) >= 1
        assert statuses == [200, 200]
    finally:
        scheduler.queue.max_size = limits


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_max_tokens_is_a_ceiling(server, path):
    body = {**BODY, "model": "code"} if path == CHAT else {"prompt": "one two", "model": "code"}
    limit = server.service.settings.max_new_tokens
    _, longest, _ = server.call("POST", path, {**body, "max_tokens": limit})
    for requested in (limit + 1, 10**6):
        status, found, _ = server.call("POST", path, {**body, "max_tokens": requested})
        assert (status, found["choices"], found["usage"]) == (200, longest["choices"], longest["usage"])


def test_an_answer_ends_with_the_context(server):
    full = server.service.engine.context_length
    for length, status in ((full - 2, 200), (full, 400)):
        body = {"prompt": [5] * length, "model": "math", "max_tokens": 50, "logit_bias": {}}
        got, found, _ = server.call("POST", "/v1/completions", body)
        assert got == status
        if status == 400:
            assert found["error"]["code"] == "context_length_exceeded"
            assert str(full) in found["error"]["message"]
        else:
            assert found["choices"][0]["finish_reason"] == "length"
            assert found["usage"]["total_tokens"] <= full


def test_both_limits_of_chat_completions_are_ceilings(server):
    for one, other in ((3, 5), (5, 3)):
        status, found = server.chat(max_tokens=one, max_completion_tokens=other, model="math")
        assert (status, found["usage"]["completion_tokens"]) == (200, 3)


@pytest.fixture
def extended(tmp_path, monkeypatch):
    """Server on a tokenizer with more tokens than the model has embeddings."""
    monkeypatch.setenv("SIGMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(helpers_serve, "build_tokenizer", extended_tokenizer)
    with serving(tmp_path, strategy="A") as client:
        yield client


def test_a_token_without_an_embedding_fails_its_request_alone(extended, alone):
    bad = f"one {LAST}"
    planned = {"model": "math", "max_tokens": 120, "seed": 1, "temperature": 0.5, **NEVER_ENDS}
    statuses, replies = [], []
    thread = threading.Thread(target=lambda: replies.append(extended.chat("one two three", **planned)))
    with extended.hold():
        thread.start()
        wait_until(lambda: len(extended.service.scheduler.queue) == 1)
        statuses.append(extended.chat(bad, model="code")[0])
    while thread.is_alive():
        statuses.append(extended.chat(bad, model="code")[0])
    thread.join()
    assert set(statuses) == {400}
    (expected,) = alone.generate(
        ["one two three"], "math", max_new_tokens=120, do_sample=True, temperature=0.5, seeds=[1], form="factored",
        logit_bias={2: -100.0},
    )  # fmt: skip
    assert (replies[0][0], text_of(replies[0][1])) == (200, expected.text)


@pytest.mark.parametrize(
    "path, body, param",
    [
        (CHAT, {"messages": [{"role": "user", "content": "{}"}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "{}"}], "model": "auto", "stream": True}, "messages"),
        ("/v1/completions", {"prompt": "one {}"}, "prompt"),
        ("/v1/completions", {"prompt": ["one", "two {}"]}, "prompt.1"),
        ("/v1/completions", {"prompt": ["one", "two {}"], "echo": True, "max_tokens": 0}, "prompt.1"),
        ("/v1/adapt", {"examples": [{"prompt": "a", "answer": "b"}, {"prompt": "{}", "answer": "b"}]}, "examples.1"),
        ("/v1/adapt", {"examples": [{"prompt": "a", "answer": "b {}"}]}, "examples.0"),
    ],
)
def test_tokens_without_an_embedding_are_named(extended, path, body, param):
    filled = json.loads(json.dumps(body).replace("{}", LAST))
    status, found, _ = extended.call("POST", path, filled)
    assert (status, found["error"]["param"], found["error"]["code"]) == (400, param, None)
    assert LAST in found["error"]["message"]


def test_ids_without_an_embedding_are_named(extended):
    for prompt, param in (([5, 290], "prompt"), ([[5], [5, 290]], "prompt.1")):
        status, found, _ = extended.call("POST", "/v1/completions", {"prompt": prompt})
        assert (status, found["error"]["param"]) == (400, param)
        assert "290" in found["error"]["message"]


def test_engine_and_strategies_name_tokens_without_an_embedding():
    engine = Engine(build_tiny(), extended_tokenizer(), bank())
    prompts = ["one two", f"one {LAST}", "three"]
    with pytest.raises(PromptError, match=re.escape(LAST)):
        engine.generate(prompts, max_new_tokens=3)
    good = engine.generate([prompts[0], prompts[2]], max_new_tokens=3)
    kept = engine.generate(prompts, max_new_tokens=3, keep_errors=True)
    assert [kept[0].text, kept[2].text] == [one.text for one in good]
    assert isinstance(kept[1].error, PromptError)
    decisions = PromptDispatch(engine).decide(prompts)
    assert [LAST in one.reason for one in decisions] == [False, True, False]
    assert decisions[1].mix == Mix.base()
    with pytest.raises(PromptError, match="example 1"):
        FewShotSearch(engine, [("one", "two"), ("three", LAST)], lambda *_: 0.0)
    with pytest.raises(PromptError):
        engine.score(["one"], [[5, 290]])
