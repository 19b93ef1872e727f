"""Tool calls in replies: known formats, streamed character by character, malformed markup, recognition of templates."""

from __future__ import annotations

import json

import pytest
from helpers_scripted import real_template

from sigmix.errors import ConfigError
from sigmix.serve.tool_parser import (
    HermesParser,
    JsonParser,
    LlamaParser,
    MistralParser,
    QwenCoderParser,
    tool_call_parser,
)

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("weather", "now")]
PARIS = {"city": "Paris"}
W = '{"name": "weather", "arguments": {"city": "Paris"}}'
L = '{"name": "weather", "parameters": {"city": "Paris"}}'
N = '{"name": "now", "parameters": {}}'


def hermes(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


def coder(*parameters: tuple[str, str]) -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function=weather>\n{inner}</function>\n</tool_call>"


# parser, reply, text outside of calls, [(name, arguments)]
REPLIES = [
    (HermesParser, hermes(W), "", [("weather", PARIS)]),
    (HermesParser, f"Let me look.\n\n{hermes(W, W)}\n", "Let me look.", [("weather", PARIS)] * 2),
    (HermesParser, f"{hermes(W)}\nDone.", "\nDone.", [("weather", PARIS)]),
    (HermesParser, f"<tool_call>{W}</tool_call><tool_call>{W}</tool_call>", "", [("weather", PARIS)] * 2),
    (HermesParser, f"<tool_call>\n{W}", "", [("weather", PARIS)]),
    (HermesParser, hermes('{"name": "now"}'), "", [("now", {})]),
    (HermesParser, hermes('{"name": "now", "arguments": "{\\"a\\": 1}"}'), "", [("now", {"a": 1})]),
    (HermesParser, hermes('{"arguments": {"x": "</tool_call> é \n"}, "name": "f"}'), "",
     [("f", {"x": "</tool_call> é \n"})]),
    (HermesParser, hermes('{"name": "f", "arguments": {"x": [1.5e3, false, null, "\\u00e9"]}}'), "",
     [("f", {"x": [1500.0, False, None, "é"]})]),
    (HermesParser, "a < b, <tool> and {} \n", "a < b, <tool> and {} \n", []),
    (QwenCoderParser, coder(("city", "Paris"), ("days", "3")), "", [("weather", {"city": "Paris", "days": 3})]),
    (QwenCoderParser, coder(("city", "7"), ("other", "[1]")), "", [("weather", {"city": "7", "other": "[1]"})]),
    (QwenCoderParser, f"I look.\n{coder()}" + coder(("city", "a\n\nb")), "I look.",
     [("weather", {}), ("weather", {"city": "a\n\nb"})]),
    (LlamaParser, L, "", [("weather", PARIS)]),
    (LlamaParser, f"<|python_tag|>{L}", "", [("weather", PARIS)]),
    (LlamaParser, f"{L}; {N};{L}", "", [("weather", PARIS), ("now", {}), ("weather", PARIS)]),
    (LlamaParser, f"<|python_tag|>{L}; {N}", "", [("weather", PARIS), ("now", {})]),
    (LlamaParser, f'{{"type": "function", "function": {L}}}', "", [("weather", PARIS)]),
    (LlamaParser, '{"type": "function", "name": "weather", "parameters": {"city": "Paris"}}', "",
     [("weather", PARIS)]),
    (LlamaParser, f"Sure:\n{L}\nMore?", "Sure:\nMore?", [("weather", PARIS)]),
    (LlamaParser, '{"name": "Alice", "parameters": {}}', '{"name": "Alice", "parameters": {}}', []),
    (LlamaParser, 'json: {"name": "Alice", "age": 7} {x} {', 'json: {"name": "Alice", "age": 7} {x} {', []),
    (LlamaParser, "def f(x): return {x: {1}}", "def f(x): return {x: {1}}", []),
    (MistralParser, f"[TOOL_CALLS] [{W}, {N}]", "", [("weather", PARIS), ("now", {})]),
    (MistralParser, 'Hm.[TOOL_CALLS]weather[ARGS]{"city": "Paris"}[TOOL_CALLS]now{}', "Hm.",
     [("weather", PARIS), ("now", {})]),
    (MistralParser, 'a [b] [TOOL', 'a [b] [TOOL', []),
    (JsonParser, f"[{L}, {N}]", "", [("weather", PARIS), ("now", {})]),
]  # fmt: skip

MALFORMED = [
    (HermesParser, hermes('{"name": "weather", "arguments": {"city": "Paris"}')),
    (HermesParser, hermes(W[:-1] + "}}")),
    (HermesParser, f"Look: {hermes('weather')} end"),
    (HermesParser, hermes('{"name": 3, "arguments": {}}')),
    (HermesParser, hermes('{"name": "f", "arguments": [1]}')),
    (HermesParser, hermes('{"name": "f", "arguments": {"x": NaN}}')),
    (HermesParser, hermes("[1]")),
    (HermesParser, f"<tool_call>{W} trailing</tool_call>"),
    (HermesParser, "<tool_call>\n" + W[:30]),
    (HermesParser, "<tool_call>\n"),
    (HermesParser, "x <tool_ca"),
    (HermesParser, "<tool_call>" + "[" * 100_000),
    (QwenCoderParser, coder().replace("</function>", "")),
    (QwenCoderParser, coder(("city", "Paris")).replace("</parameter>", "")),
    (QwenCoderParser, coder()[:-5]),
    (LlamaParser, '<|python_tag|>weather.call(city="Paris")'),
    (LlamaParser, L[:-2]),
    (LlamaParser, '{"name": "weather", "parameters": 3}'),
    (LlamaParser, "<|python_tag|>"),
    (MistralParser, "[TOOL_CALLS] [1]"),
    (MistralParser, "[TOOL_CALLS] nothing at all"),
    (MistralParser, f"[TOOL_CALLS] [{W[:-3]}"),
    (JsonParser, f"[{L}, "),
]  # fmt: skip


def parse(parser, reply: str, step: int) -> tuple[list[str], list]:
    """Deltas of the text and the calls of a reply that arrives ``step`` characters at a time."""
    one = parser(TOOLS)
    deltas = [one.feed(reply[place : place + step]) for place in range(0, len(reply), step)]
    deltas.append(one.feed("", final=True))
    return deltas, [(call.name, json.loads(call.arguments)) for call in one.calls]


@pytest.mark.parametrize("parser, reply, text, calls", REPLIES)
@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_calls_and_the_text_beside_them(parser, reply, text, calls, step):
    deltas, found = parse(parser, reply, step)
    assert ("".join(deltas), found) == (text, calls)


@pytest.mark.parametrize("parser, reply", MALFORMED)
@pytest.mark.parametrize("step", [1, 1000])
def test_malformed_calls_are_text(parser, reply, step):
    if len(reply) > 1000:
        step = 1000
    deltas, found = parse(parser, reply, step)
    assert ("".join(deltas), found) == (reply, [])


def test_text_before_a_call_is_not_held_back():
    deltas, _ = parse(HermesParser, f"one two {hermes(W)}", 1)
    assert deltas[:7] == ["o", "n", "e", "", " t", "w", "o"]
    parser = LlamaParser(TOOLS)
    assert parser.feed('see { "x": 1 } and {"nam') == 'see { "x": 1 } and'


def test_a_call_is_complete_with_its_closing_tag():
    parser = HermesParser(TOOLS)
    parser.feed(hermes(W))
    assert len(parser.calls) == 1


def test_ids_of_calls():
    parser = HermesParser(TOOLS)
    parser.feed(hermes(W, W), final=True)
    ids = {call.id for call in parser.calls}
    assert len(ids) == 2
    assert all(len(id) == 9 and id.isalnum() for id in ids)


@pytest.mark.parametrize(
    "names, parser",
    [
        (("qwen2_5", "qwen3", "qwen3_vl", "qwen3_instruct_2507"), HermesParser),
        (("qwen3_5_think", "qwen3_6", "nemotron_3_nano"), QwenCoderParser),
        (("llama3_1", "llama3_2"), LlamaParser),
        (("llama3", "glm4moe", "gptoss", "gemma3", "gemma4", "lfm2", "deepseekv3", "phi3"), None),
    ],
)
def test_templates_of_known_formats(names, parser):
    for name in names:
        template = real_template(name)
        if parser is not None:
            assert tool_call_parser(template) is parser, name
        else:
            with pytest.raises(ConfigError, match="tool"):
                tool_call_parser(template)


@pytest.mark.parametrize(
    "template, parser",
    [
        ('{{ "<tool_call>\\n{\\"name\\": " }}', HermesParser),
        ("<tool_call>\n{{'{\"arguments\": <args-dict>, \"name\": <function-name>}'}}\n</tool_call>", None),
        ('<tool_call>\n{"arguments": <args-dict>, "name": <function-name>}\n</tool_call>', HermesParser),
        ("{{ '[TOOL_CALLS] [' }}", MistralParser),
        (None, None),
    ],
)
def test_texts_of_templates(template, parser):
    if parser is not None:
        assert tool_call_parser(template) is parser
    else:
        with pytest.raises(ConfigError):
            tool_call_parser(template)
