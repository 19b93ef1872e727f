"""OpenAI's Responses API through the `openai` client, whole and streamed."""

from __future__ import annotations

import json

import pytest
from helpers_scripted import scripted
from helpers_serve import CHAT, Client

from sigmix.serve.service import Service
from sigmix.serve.settings import load_settings

openai = pytest.importorskip("openai")
from openai.types import responses as types  # noqa: E402
from pydantic import TypeAdapter  # noqa: E402

PATH = "/v1/responses"
WEATHER = {
    "type": "function", "name": "weather", "description": "Weather of a city", "strict": True,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}  # fmt: skip
TOOL_TEMPLATE = """{% if tools %}{{ tools | tojson }}<tool_call>{"name": 0, "arguments": 0}</tool_call>{% endif %}
{%- for m in messages %}{{ '[' + m.role + ']' + m.content }}
{%- for call in m.tool_calls or [] %}{{ call.function.name + call.function.arguments | tojson }}{% endfor %}{% endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""
REPLY = 'I look.\n<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'


def client_of(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=server.http)


@pytest.fixture
def client(server):
    return client_of(server)


@pytest.fixture
def caller(tmp_path, cache):
    """Server on a model that calls a tool."""
    model, tokenizer = scripted(REPLY, TOOL_TEMPLATE)
    service = Service(model, tokenizer, {}, load_settings(None, state=tmp_path, max_new_tokens=128), {})
    service.start()
    yield Client(service)
    service.close()


def events_of(server, **body):
    """Events of a stream, checked against OpenAI's types."""
    status, text, headers = server.call("POST", PATH, {"model": "math", **body, "stream": True})
    assert status == 200, text
    assert headers["content-type"].startswith("text/event-stream")
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        TypeAdapter(types.ResponseStreamEvent).validate_python(event)
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_text(client, alone):
    found = client.responses.create(model="math", input="one two", max_output_tokens=8, metadata={"a": "b"}, user="me")
    types.Response.model_validate(found.model_dump())
    (expected,) = alone.generate(["one two"], "math", max_new_tokens=8)
    assert found.output_text == expected.text
    assert (found.usage.input_tokens, found.usage.output_tokens) == (expected.prompt_tokens, len(expected.ids))
    assert (found.metadata, found.user, found.model) == ({"a": "b"}, "me", "math")
    assert found.model_extra["sigmix"]["mix"] == "math"
    cut = expected.finish == "length"
    assert found.status == ("incomplete" if cut else "completed")
    assert (found.incomplete_details is not None) == cut
    assert [item.status for item in found.output] == [found.status]


def test_a_conversation_equals_the_chat_completion(server, client):
    contents = (("user", "one"), ("assistant", "two"), ("user", "x"))
    turns = [{"role": role, "content": content} for role, content in contents]
    first = client.responses.create(model="math", input="one", max_output_tokens=4)
    inputs = [
        turns,
        [turns[0], {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
                    "content": [{"type": "output_text", "text": "two", "annotations": [], "logprobs": []}]},
         {"role": "user", "content": [{"type": "input_text", "text": "x"}]}],
    ]  # fmt: skip
    body = {"model": "math", "messages": [{"role": "system", "content": "four"}, *turns], "max_tokens": 8}
    expected = server.call("POST", CHAT, body)[1]["choices"][0]["message"]["content"]
    for items in inputs:
        found = client.responses.create(model="math", input=items, instructions="four", max_output_tokens=8)
        assert found.output_text == expected
        assert found.instructions == "four"
    developer = [{"role": "developer", "content": "four"}, *turns]
    assert client.responses.create(model="math", input=developer, max_output_tokens=8).output_text == expected
    client.responses.create(model="math", input=[turns[0], *first.output, turns[0]], max_output_tokens=4)


def test_stream_equals_the_whole_response(server, client):
    whole = client.responses.create(model="math", input="one two", max_output_tokens=8)
    events = events_of(server, input="one two", max_output_tokens=8)
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * deltas,
        "output_text.done", "content_part.done", "output_item.done", whole.status,
    ]  # fmt: skip
    assert "".join(event["delta"] for event in events if "delta" in event) == whole.output_text
    assert events[0]["response"]["status"] == "in_progress"
    assert events[-1]["response"]["usage"] == whole.usage.model_dump(exclude_none=True)
    assert events[-1]["response"]["id"] == events[0]["response"]["id"]


def test_stream_helper_of_the_client(caller):
    client = client_of(caller)
    with client.responses.stream(model="base", input="x", max_output_tokens=128) as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert final.status == "completed"
    assert final.output_text == "".join(texts) == REPLY


def test_logprobs(server, client):
    options = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 4}
    found = client.responses.create(model="math", input="one two", **options)
    tokens = found.output[0].content[0].logprobs
    assert len(tokens) == found.usage.output_tokens
    assert all(len(token.top_logprobs) == 2 for token in tokens)
    events = events_of(server, input="one two", **options)
    streamed = [token for event in events if "delta" in event for token in event["logprobs"]]
    assert streamed == [token.model_dump() for token in tokens]


def test_function_tools(caller):
    client = client_of(caller)
    options = {"model": "base", "tools": [WEATHER], "max_output_tokens": 128}
    question = {"role": "user", "content": "Paris?"}
    found = client.responses.create(input=[question], **options)
    types.Response.model_validate(found.model_dump())
    message, call = found.output
    assert (message.type, found.output_text) == ("message", "I look.")
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"city": "Paris"})
    events = events_of(caller, input=[question], **options)
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[-6:] == [
        "output_item.done", "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.done", "completed",
    ]  # fmt: skip
    assert [item["type"] for item in events[-1]["response"]["output"]] == ["message", "function_call"]
    assert events[-2]["item"]["arguments"] == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    again = client.responses.create(input=[question, *found.output, result], **options)
    expected = '[user]Paris?[assistant]I look.weather{"city": "Paris"}[tool]sunny[assistant]'
    rendered = caller.service.encode_text(expected)
    plain = client.responses.create(input=[question, *found.output, result], model="base", max_output_tokens=4)
    assert plain.usage.input_tokens == len(rendered)
    assert again.usage.input_tokens > len(rendered)


@pytest.mark.parametrize("limit", [6, 40, 128])
def test_items_in_the_order_of_the_reply(tmp_path, cache, limit):
    model, tokenizer = scripted(f"{REPLY} Then <rest>.", TOOL_TEMPLATE)
    service = Service(model, tokenizer, {}, load_settings(None, state=tmp_path, max_new_tokens=128), {})
    service.start()
    caller = Client(service)
    for more in ({}, {"include": ["message.output_text.logprobs"]}):
        body = {"model": "base", "input": "Paris?", "tools": [WEATHER], "max_output_tokens": limit, **more}
        whole, last = caller.call("POST", PATH, body)[1], events_of(caller, **body)[-1]["response"]
        keys = ("type", "status", "arguments", "content")
        items, streamed = ([{key: one.get(key) for key in keys} for one in found["output"]] for found in (whole, last))
        assert items == streamed
        assert whole["usage"] == last["usage"]
        if limit == 128 and not more:
            assert [item["type"] for item in items] == ["message", "function_call", "message"]
    service.close()


def test_json(server, client):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    text = {"format": {"type": "json_schema", "name": "answer", "schema": schema, "strict": True}}
    found = client.responses.create(model="math", input="one", text=text, max_output_tokens=60)
    assert json.loads(found.output_text)["a"] in (1, 2)
    assert found.text.format.type == "json_schema"
    pydantic = pytest.importorskip("pydantic")

    class Answer(pydantic.BaseModel):
        a: bool

    assert client.responses.parse(model="math", input="one", text_format=Answer, max_output_tokens=60).output_parsed


def test_errors_in_a_stream(server, monkeypatch):
    engine = server.service.engine
    monkeypatch.setattr(type(engine), "read", lambda *_, **__: 1 / 0)
    events = events_of(server, input="one two")
    assert [event["type"] for event in events] == ["response.created", "response.in_progress", "response.failed"]
    assert events[-1]["response"]["error"]["code"] == "server_error"


@pytest.mark.parametrize(
    "fields, status, param",
    [
        ({"input": None}, 400, "input"),
        ({"input": ""}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": [{"role": "wizard", "content": "x"}]}, 400, "input.0.role"),
        ({"input": [{"role": "user"}]}, 400, "input.0.content"),
        ({"input": [{"type": "reasoning", "id": "x", "summary": []}]}, 400, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "input.0.content.0"),
        ({"input": [{"role": "assistant", "content": "x"}]}, 400, "input"),
        ({"input": "x " * 400}, 400, "input"),
        ({"model": "maths"}, 404, "model"),
        ({"temperature": 3}, 400, "temperature"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"previous_response_id": "resp_1"}, 400, "previous_response_id"),
        ({"conversation": "conv_1"}, 400, "conversation"),
        ({"background": True}, 400, "background"),
        ({"truncation": "auto"}, 400, "truncation"),
        ({"reasoning": {"effort": "low"}}, 400, "reasoning.effort"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, 400, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "x"}}}}, 400, "text.format"),
        ({"text": {"format": {"type": "json_object"}}, "tools": [WEATHER]}, 400, "text.format"),
        ({"model": "auto", "input": [{"role": "system", "content": "x"}]}, 400, "input"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools.0"),
        ({"tools": [WEATHER]}, 400, "tools"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"top_logprobs": 2}, 400, "top_logprobs"),
        ({"include": ["file_search_call.results"]}, 400, "include.0"),
        ({"unknown": 1}, 400, "unknown"),
    ],
)  # fmt: skip
def test_invalid_requests(server, fields, status, param):
    got, found, _ = server.call("POST", PATH, {"input": "x", **fields})
    assert (got, found["error"]["param"]) == (status, param)
    assert "response_format" not in found["error"]["message"]


def test_fields_without_effect(server):
    fields = {"store": True, "background": False, "truncation": "disabled", "service_tier": "auto", "text": {},
              "reasoning": {"effort": None}, "include": ["reasoning.encrypted_content"],
              "prompt_cache_key": "x"}  # fmt: skip
    status, found, _ = server.call("POST", PATH, {"input": "x", "model": "math", **fields})
    assert (status, found["store"]) == (200, False)
    assert server.call("GET", f"{PATH}/{found['id']}")[0] == 404
