"""Prompts of conversations (the continued last message, tools) and end tokens, under chat templates of known models."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
from helpers_scripted import real_template, scripted_llama
from helpers_tiny import build_tiny, build_tokenizer

from sigmix.engine import Engine
from sigmix.engine.tokenization import encode_turns, eos_token_ids, reply_ids
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
        text = real_template(name)
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


SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("template", "turns", "remedy"),
    [
        ("{{ raise_exception('Conversation roles must alternate') }}", SYSTEM, "leave the system message out"),
        ("{{ raise_exception('Only user and assistant roles') }}", SYSTEM, "leave the system message out"),
        ("{{ raise_exception('roles must alternate') }}", [*SYSTEM, SYSTEM[1]], "alternate"),
        ("{{ raise_exception('roles must alternate') }}", SYSTEM[1:] * 2, "alternate"),
        ("{{ messages | unheard_of }}", SYSTEM, "correct chat_template"),
        ("{% for %}", SYSTEM, "correct chat_template"),
    ],
)  # fmt: skip
def test_the_remedy_depends_on_what_the_template_rejects(template, turns, remedy):
    with pytest.raises(PromptError, match=f" -> {remedy}"):
        encode_turns(templated(text=template), turns)


# ---------------------------------------------------------------- end tokens

SPECIALS = re.compile(r"<[|｜/]?[A-Za-z_▁]+[^<>\s'\"{}]*>")
NEED_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
MISTRAL = (
    "<s>{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}"
    "{% endif %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}"
    "{% endfor %}"
)
OPEN_END = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if not loop.last %}<|im_end|>\n{% endif %}"
    "{% endfor %}"
)


def with_ends(name: str | None = None, text: str = "", eos: str = "<eos>"):
    """Tokenizer of a template with its special tokens."""
    tokenizer = templated(name, text)
    specials = sorted({"<|im_end|>", *SPECIALS.findall(tokenizer.chat_template)})
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tokenizer.add_special_tokens({"eos_token": eos})
    return tokenizer


def model_with(tokenizer, *ends: str):
    ids = tokenizer.convert_tokens_to_ids(list(ends))
    return SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=ids), config=SimpleNamespace(eos_token_id=3))


@pytest.mark.parametrize(
    ("template", "eos", "end"),
    [
        ("llama3", "<eos>", "<|eot_id|>"),
        ("llama3_1", "<|eot_id|>", "<|eot_id|>"),
        ("gemma", "<eos>", "<end_of_turn>"),  # no system turn, roles alternate, text is stripped
        ("gemma3", "<eos>", "<end_of_turn>"),
        ("phi3", "<|endoftext|>", "<|end|>"),
        ("qwen2_5", "<eos>", "<|im_end|>"),
        ("qwen3", "<|im_end|>", "<|im_end|>"),
        ("deepseekv3", "<eos>", "<｜end▁of▁sentence｜>"),
        ("cohere2", "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),  # after <|END_RESPONSE|>
        ("gptoss", "<eos>", "<|return|>"),
        ("glm4moe", "<eos>", "<eos>"),  # writes none
        (CHATML, "<eos>", "<|im_end|>"),
        (NEED_SYSTEM + CHATML, "<eos>", "<|im_end|>"),
        (MISTRAL, "</s>", "</s>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "<eos>", "<eos>"),
        ("{{ raise_exception('never') }}", "<eos>", "<eos>"),
        (OPEN_END, "<|im_end|>", "<|im_end|>"),
    ],
)
def test_a_reply_ends_as_the_chat_template_writes_it(template, eos, end):
    tokenizer = with_ends(template, eos=eos) if template.isidentifier() else with_ends(text=template, eos=eos)
    expected = tokenizer.convert_tokens_to_ids(end)
    # the generation config's first token is another one
    ends = eos_token_ids(model_with(tokenizer, "<pad>", eos), tokenizer)
    assert reply_ids(tokenizer, "42", ends) == [*tokenizer("42")["input_ids"], expected]
    assert set(ends) == {0, 3, tokenizer.convert_tokens_to_ids(eos), expected}  # generation stops at each
    assert len(ends) == len(set(ends))


def test_an_end_token_that_is_not_special():
    tokenizer = templated(text=CHATML)
    tokenizer.add_tokens(["<|im_end|>", "\n\n", "_e", "ne"])
    model = model_with(tokenizer, "<eos>")
    assert eos_token_ids(model, tokenizer)[0] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer = templated(text=CHATML)  # without the token, the template's end is text
    tokenizer.add_tokens(["\n\n", "_e", ">\n"])
    assert eos_token_ids(model, tokenizer)[0] == tokenizer.eos_token_id


def test_an_end_that_only_later_turns_show_is_an_end_token():
    tokenizer = with_ends(text=OPEN_END)
    end, start = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    assert eos_token_ids(model_with(tokenizer, "<eos>", "<|im_end|>"), tokenizer)[0] == end
    no_end = with_ends(text=OPEN_END.replace("<|im_end|>", ""))
    assert start not in eos_token_ids(model_with(no_end, "<eos>"), no_end)


def test_a_reply_without_a_chat_template_ends_with_the_tokenizers_token():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    model = model_with(tokenizer, "<pad>", "<eos>")
    assert eos_token_ids(model, tokenizer) == [2, 0, 3]
    tokenizer.eos_token = None
    assert eos_token_ids(model, tokenizer) == [0, 2, 3]
    assert eos_token_ids(SimpleNamespace(), tokenizer) == []
    assert reply_ids(tokenizer, "42", []) == tokenizer("42")["input_ids"]


def test_generation_stops_at_the_end_of_the_turn():
    tokenizer = with_ends("gemma")
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    prompt, reply = tokenizer("6 x 7?")["input_ids"], [*tokenizer("42")["input_ids"], end]
    engine = Engine(scripted_llama(len(tokenizer), [prompt[-1], *reply, 30]), tokenizer)
    (found,) = engine.generate([prompt], max_new_tokens=8)
    assert (found.ids, found.text, found.finish) == (reply, "42", "stop")
