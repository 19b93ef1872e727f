"""Tool calls of chat completions, whole and streamed, under chat templates of known models."""

from __future__ import annotations

import json

import pytest
from helpers_scripted import real_template, scripted
from helpers_serve import CHAT, Client

from sigmix.serve.service import Service
from sigmix.serve.settings import load_settings

pytestmark = pytest.mark.usefixtures("cache")

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SHORT = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
            "additionalProperties": False,
        },
    },
}  # fmt: skip
USER = {"role": "user", "content": "Paris?"}
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
LLAMA = '{"name": "weather", "parameters": {"city": "Paris"}}'


@pytest.fixture
def answering(tmp_path):
    """Factory of servers on a model that answers with a given reply, closed at the end."""
    services = []

    def build(reply: str, template: str | None = "qwen2_5", special=()) -> Client:
        model, tokenizer = scripted(reply, template and real_template(template), special)
        settings = load_settings(None, state=tmp_path / f"state{len(services)}", max_new_tokens=256)
        services.append(Service(model, tokenizer, {}, settings, {}))
        services[-1].start()
        return Client(services[-1])

    yield build
    for service in services:
        service.close()


def ask(server, **fields):
    body = {"model": "base", "messages": [USER], "tools": [WEATHER], **fields}
    status, found, _ = server.call("POST", CHAT, body)
    assert status == 200, found
    return found["choices"][0]


def streamed(server, **fields):
    """Message and finish reason of a stream, put together as clients do."""
    events = server.stream({"model": "base", "messages": [USER], "tools": [WEATHER], **fields})
    content, calls, reasons = "", {}, []
    for event in events:
        for choice in event["choices"]:
            delta = choice["delta"]
            content += delta.get("content") or ""
            for part in delta.get("tool_calls", []):
                call = calls.setdefault(part["index"], {"id": part.get("id"), "type": part.get("type"), "function": {}})
                for key, value in part["function"].items():
                    call["function"][key] = call["function"].get(key, "") + value
            reasons.append(choice["finish_reason"])
    assert [reason for reason in reasons if reason] == reasons[-1:]
    return content or None, [calls[index] for index in sorted(calls)], reasons[-1]


CALLS = [
    ("qwen2_5", (), HERMES, None, 1),
    ("qwen2_5", (), f"I look.\n{HERMES}\n{HERMES.replace('Paris', 'Rome')}", "I look.", 2),
    ("qwen3", ("<tool_call>", "</tool_call>"), HERMES, None, 1),
    ("llama3_1", ("<|python_tag|>",), f"<|python_tag|>{LLAMA}", None, 1),
    ("llama3_2", ("<|python_tag|>",), f"{LLAMA}; {LLAMA.replace('Paris', 'Rome')}", None, 2),
    ("qwen3_6", (), "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>",
     None, 1),
]  # fmt: skip


@pytest.mark.parametrize("template, special, reply, content, count", CALLS)
def test_tool_calls(answering, template, special, reply, content, count):
    server = answering(reply, template, special)
    choice = ask(server)
    message = choice["message"]
    assert (choice["finish_reason"], message["content"]) == ("tool_calls", content)
    functions = [call["function"] for call in message["tool_calls"]]
    assert [function["name"] for function in functions] == ["weather"] * count
    cities = [json.loads(function["arguments"])["city"] for function in functions]
    assert cities == ["Paris", "Rome"][:count]
    assert {call["type"] for call in message["tool_calls"]} == {"function"}
    assert len({call["id"] for call in message["tool_calls"]}) == count
    text, calls, reason = streamed(server)
    assert (text, reason) == (content, "tool_calls")
    assert [call["function"] for call in calls] == functions
    assert all(call["id"] and call["type"] == "function" for call in calls)


@pytest.mark.parametrize(
    "template, special, reply",
    [
        ("qwen2_5", (), "Only text, a < b. "),
        ("qwen2_5", (), HERMES.replace("}}", "}")),
        ("qwen3", ("<tool_call>", "</tool_call>"), f"See {HERMES.replace('weather', '')}!"),
        ("llama3_1", ("<|python_tag|>",), '<|python_tag|>weather.call(city="Paris")'),
        ("llama3_1", ("<|python_tag|>",), '{"name": "Alice", "age": 3}'),
    ],
)
def test_replies_without_a_valid_call_are_text(answering, template, special, reply):
    server = answering(reply, template, special)
    choice = ask(server)
    assert choice["message"] == {"role": "assistant", "content": reply, "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert streamed(server) == (reply, [], "stop")


def test_a_reply_that_is_cut_off(answering):
    server = answering(HERMES)
    choice = ask(server, max_tokens=8)
    assert (choice["finish_reason"], choice["message"].get("tool_calls")) == ("length", None)
    assert HERMES.startswith(choice["message"]["content"])


def test_one_call_without_parallel_tool_calls(answering):
    server = answering(f"{HERMES}\n{HERMES.replace('Paris', 'Rome')}")
    (call,) = ask(server, parallel_tool_calls=False)["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    assert len(streamed(server, parallel_tool_calls=False)[1]) == 1


def test_several_choices_and_logprobs(answering):
    body = {"model": "base", "messages": [USER], "tools": [WEATHER], "n": 2, "logprobs": True}
    choices = answering(HERMES).call("POST", CHAT, body)[1]["choices"]
    assert [len(choice["message"]["tool_calls"]) for choice in choices] == [1, 1]
    assert "".join(token["token"] for token in choices[0]["logprobs"]["content"]).startswith(HERMES)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("template", ["qwen2_5", "glm4moe"])
def test_required_calls(answering, template, choice):
    """The grammar permits calls of the function only, whatever the model prefers."""
    server = answering("No call at all.", template)
    fields = {"tool_choice": choice, "max_tokens": 200, "tools": [SHORT]}
    if choice == "required":
        fields["parallel_tool_calls"] = False  # else the number of calls is open
    found = ask(server, **fields)
    assert (found["finish_reason"], found["message"]["content"]) == ("tool_calls", None)
    (call,) = found["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")
    content, (streamed_call,), reason = streamed(server, **fields)
    assert (content, streamed_call["function"], reason) == (None, call["function"], "tool_calls")
    cut = ask(server, **{**fields, "max_tokens": 5})
    assert (cut["finish_reason"], "tool_calls" in cut["message"]) == ("length", False)


def test_required_calls_with_definitions(answering):
    city, definitions = {"$ref": "#/$defs/City"}, {"City": {"enum": ["Oslo"]}}
    parameters = {**SHORT["function"]["parameters"], "properties": {"city": city}, "$defs": definitions}
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    found = ask(answering("No."), tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=200)
    assert json.loads(found["message"]["tool_calls"][0]["function"]["arguments"]) == {"city": "Oslo"}


def test_arguments_of_required_calls_are_an_object(answering):
    tool = {"type": "function", "function": {"name": "now", "parameters": {}}}
    cut = ask(answering("12"), tools=[tool], tool_choice="required", max_tokens=40)
    assert cut["message"]["content"].startswith('[{"name": "now", "parameters": {')


def test_structured_output_excludes_tools(server):
    for fields in ({"response_format": {"type": "json_object"}}, {"guided_regex": "a"}):
        for choice in ("auto", "required"):
            body = {"messages": [USER], "tools": [WEATHER], "tool_choice": choice, **fields}
            status, found, _ = server.call("POST", CHAT, body)
            assert status == 400
            assert {*fields, "tools"} & {found["error"]["param"]}


def test_tool_choice_none_leaves_the_tools_out(answering):
    server = answering(HERMES)
    plain = server.call("POST", CHAT, {"model": "base", "messages": [USER]})[1]
    choice = ask(server, tool_choice="none")
    assert choice == plain["choices"][0]
    assert choice["message"]["content"] == HERMES


def test_a_conversation_with_tool_turns(answering):
    server = answering("Sunny.")
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "function_call": None},
             {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "sunny"}]  # fmt: skip
    for fields in ({"messages": turns}, {"messages": turns, "tools": None}):
        assert ask(server, **fields)["message"]["content"] == "Sunny."
    parts = [*turns[:2], {**turns[2], "content": [{"type": "text", "text": "sunny"}]}]
    assert ask(server, messages=parts)["message"]["content"] == "Sunny."


def test_objects_of_the_openai_client_return_as_history(answering):
    openai = pytest.importorskip("openai")
    server = answering(f"I look.\n{HERMES}")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=server.http)
    function = {**WEATHER["function"], "strict": True}
    options = {"model": "base", "tools": [{"type": "function", "function": function}]}
    with client.chat.completions.stream(messages=[USER], **options) as stream:
        events = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        message = stream.get_final_completion().choices[0].message
    assert [event.parsed_arguments for event in events] == [{"city": "Paris"}]
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    assert client.chat.completions.create(messages=[USER, message, result], **options).choices
    with client.responses.stream(
        model="base", input=[USER], tools=[{"type": "function", **function}], max_output_tokens=128
    ) as stream:
        output = stream.get_final_response().output
    result = {"type": "function_call_output", "call_id": output[1].call_id, "output": "sunny"}
    assert client.responses.create(model="base", input=[USER, *output, result], max_output_tokens=4).output


def test_arguments_in_the_history_are_an_object(answering):
    server = answering("Sunny.")
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": "[1]"}}
    body = {"model": "base", "messages": [USER, {"role": "assistant", "tool_calls": [call]}]}
    status, found, _ = server.call("POST", CHAT, body)
    assert (status, found["error"]["param"]) == (400, "messages")
    assert "weather" in found["error"]["message"]


@pytest.mark.parametrize("template, word", [("gemma3", "tools"), ("glm4moe", "format"), (None, "tools")])
def test_models_without_known_tools(answering, template, word):
    server = answering("Hello", template)
    status, found, _ = server.call("POST", CHAT, {"model": "base", "messages": [USER], "tools": [WEATHER]})
    assert status == 400
    assert word in found["error"]["message"]


CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": "{}"}}


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
         "tools.0.function.parameters"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages.1.content"),
        ({"messages": [USER, {"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages.1.tool_calls"),
        ({"messages": [USER, {"role": "function", "content": "x", "name": "f"}]}, "messages.1.role"),
        ({"messages": [USER, {"role": "assistant", "content": "x", "function_call": {"name": "f", "arguments": ""}}]},
         "messages.1.function_call"),
        ({"tools": None, "messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}, "messages"),
        ({"tools": None, "messages": [USER, {"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": None}]},
         "messages.2.content"),
    ],
)  # fmt: skip
def test_invalid_tools(server, fields, param):
    status, found, _ = server.call("POST", CHAT, {"messages": [USER], "tools": [WEATHER], **fields})
    assert status == 400, found
    assert (found["error"]["param"] or "").startswith(param)
    if param.endswith(("functions", "function_call")):
        assert "use tool" in found["error"]["message"]
