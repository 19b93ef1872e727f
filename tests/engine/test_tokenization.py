"""Prompts of conversations: the continued last message, tools and tool turns under chat templates of known models."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers_tiny import build_tiny, build_tokenizer

from sigmix.engine import Engine
from sigmix.engine.tokenization import encode_turns
from sigmix.errors import ConfigError, PromptError

TURNS = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two three"}]
TOOLS = [{
    "type": "function",
    "function": {"name": "weather", "description": "Weather of a city", "parameters": {"type": "object"}},
}]  # fmt: skip
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
TOOL_TURNS = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny", "tool_call_id": "abcdefghi"},
]


def templated(name: str | None = None, text: str = ""):
    """Tokenizer with a chat template that TRL carries, or with a given one."""
    tokenizer = build_tokenizer()
    if name is not None:
        if (trl := find_spec("trl")) is None:
            pytest.skip("trl is not installed")
        text = (Path(trl.origin).parent / "chat_templates" / f"{name}.jinja").read_text()
    tokenizer.chat_template = text or tokenizer.chat_template
    return tokenizer


def rendered(tokenizer, turns, **options) -> str:
    return tokenizer.decode(encode_turns(tokenizer, turns, **options))


def test_the_last_message_is_continued():
    tokenizer = templated()
    assert rendered(tokenizer, TURNS).endswith("[assistant]two three<eos>[assistant]")
    assert rendered(tokenizer, TURNS, continue_final_message=True).endswith("[assistant]two three")
    assert rendered(tokenizer, TURNS, add_generation_prompt=False).endswith("[assistant]two three<eos>")


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3", "llama3_1", "gemma3", "phi3"])
def test_the_last_message_is_continued_under_real_templates(name):
    text = rendered(templated(name), TURNS, continue_final_message=True)
    assert text.endswith("two three")
    assert rendered(templated(name), TURNS).startswith(text)


def test_both_options_of_the_last_message():
    with pytest.raises(ConfigError, match="continue_final_message and add_generation_prompt"):
        encode_turns(templated(), TURNS, continue_final_message=True, add_generation_prompt=True)


@pytest.mark.parametrize("template", ["{{ messages[0]['content'] }}", "{{ 'content'[:0] }}{{ messages[-1]['role'] }}"])
def test_a_template_without_the_last_message_cannot_continue_it(template):
    with pytest.raises(PromptError, match="template"):
        encode_turns(templated(text=template), TURNS, continue_final_message=True)


def test_conversations_through_the_engine():
    engine = Engine(build_tiny(), build_tokenizer())
    ids = engine.encode(TURNS, system="four", continue_final_message=True)
    assert engine.tokenizer.decode(ids) == "[system]four<eos>[user]one<eos>[assistant]two three"
    assert engine.generate([TURNS], max_new_tokens=5) == engine.generate([engine.encode(TURNS)], max_new_tokens=5)


def test_options_of_the_template():
    tokenizer = templated(text="{{ messages[0]['content'] }}{{ ' no' if not enable_thinking }}{{ date_string }}")
    assert rendered(tokenizer, TURNS, date_string="!") == "one no!"
    assert rendered(tokenizer, TURNS, enable_thinking=True) == "one"


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_6", "llama3_1", "llama3_2", "glm4moe"])
def test_tools_and_tool_turns(name):
    tokenizer = templated(name)
    assert "Weather of a city" in rendered(tokenizer, TURNS[:1], tools=TOOLS)
    assert "Weather of a city" not in rendered(tokenizer, TURNS[:1])
    text = rendered(tokenizer, TOOL_TURNS)
    assert "weather" in text
    assert "sunny" in text
    assert json.dumps('{"city": "Paris"}') not in text  # arguments are an object for the template


def test_arguments_as_text_for_templates_that_concatenate_them():
    assert '{"city": "Paris"}' in rendered(templated("deepseekv3"), TOOL_TURNS)


@pytest.mark.parametrize("arguments", ["[1]", "{", "text"])
def test_arguments_that_are_no_object(arguments):
    turn = {**TOOL_TURNS[1], "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": arguments}}]}
    with pytest.raises(PromptError, match="weather"):
        encode_turns(templated("qwen2_5"), [TURNS[0], turn])


@pytest.mark.parametrize(
    "turns, tools, word", [(TURNS[:1], TOOLS, "tools"), (TOOL_TURNS[:2], None, "tool_calls"),
                           ([TURNS[0], TOOL_TURNS[2]], None, "role tool")],
)  # fmt: skip
def test_templates_that_drop_tools(turns, tools, word):
    for tokenizer in (templated(), templated("llama3"), templated("gemma3")):
        with pytest.raises(ConfigError, match=word):
            encode_turns(tokenizer, turns, tools=tools)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        encode_turns(tokenizer, turns, tools=tools)
