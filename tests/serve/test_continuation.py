"""Continuation of the last message of a conversation, and variables of the chat template."""

from __future__ import annotations

import pytest
from helpers_serve import CHAT

TURNS = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three "}]
BODY = {"model": "math", "messages": TURNS, "max_tokens": 8}


def reply(server, **fields):
    status, found, _ = server.call("POST", CHAT, {**BODY, **fields})
    assert status == 200, found
    return found["choices"][0]["message"]["content"], found["usage"]["prompt_tokens"]


def test_the_last_message_is_continued(server, alone):
    ids = alone.tokenizer("[user]one two<eos>[assistant]three ")["input_ids"]
    assert alone.encode(TURNS, continue_final_message=True) == ids
    (expected,) = alone.generate([ids], "math", max_new_tokens=8)
    for fields in ({}, {"add_generation_prompt": False}):
        assert reply(server, continue_final_message=True, **fields) == (expected.text, len(ids))
    events = server.stream({**BODY, "continue_final_message": True})
    text = "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])
    assert text == expected.text


def test_without_the_option_a_new_turn_begins(server, alone):
    whole = alone.encode(TURNS)
    assert reply(server)[1] == reply(server, add_generation_prompt=True)[1] == len(whole)
    assert reply(server, add_generation_prompt=False)[1] == len(alone.encode(TURNS, add_generation_prompt=False))


def test_a_system_message_alone_needs_a_model(server):
    assert reply(server, messages=[{"role": "system", "content": "one"}])[1] > 0
    status, found, _ = server.call("POST", CHAT, {**BODY, "model": "auto", "messages": TURNS[1:]})
    assert (status, found["error"]["param"]) == (400, "messages")


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs.tokenize"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs"),
    ],
)
def test_invalid_options(server, fields, param):
    status, found, _ = server.call("POST", CHAT, {**BODY, **fields})
    assert (status, found["error"]["param"]) == (400, param)


def test_tool_calls_cannot_be_continued(server, monkeypatch):
    template = "{% for m in messages %}{{ m['content'] }}{{ m['tool_calls'] }}{% endfor %}"
    monkeypatch.setattr(server.service._tokenizer, "chat_template", template)
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    status, found, _ = server.call("POST", CHAT, {**BODY, "messages": turns, "continue_final_message": True})
    assert (status, found["error"]["param"]) == (400, "messages")
    assert "tool_calls" in found["error"]["message"]


def test_a_template_that_cannot_continue(server, monkeypatch):
    tokenizer = server.service._tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0]['content'] }}")
    status, found, _ = server.call("POST", CHAT, {**BODY, "continue_final_message": True})
    assert (status, found["error"]["param"]) == (400, "messages")
    assert "continue_final_message" in found["error"]["message"]


def test_variables_of_the_template(server, monkeypatch):
    template = "{{ messages[0]['content'] }}{{ '!' if enable_thinking }}{{ date_string }}"
    monkeypatch.setattr(server.service._tokenizer, "chat_template", template)
    assert reply(server)[1] == 7
    assert reply(server, chat_template_kwargs={"enable_thinking": True, "date_string": "today"})[1] == 13
