"""Prompt tokenization with the chat template, end tokens and the context length."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from jinja2 import TemplateSyntaxError

from sigmix.errors import ConfigError, ContextError, PromptError
from sigmix.models.multimodal import image_prompt, is_image_token, processor_of
from sigmix.utils.images import Shown, pictures

TEMPLATE_ARGUMENTS = frozenset({
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "images",
    "max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors",
    "sanitize_control_tokens", "tokenize", "tokenizer", "tokenizer_kwargs", "tools", "truncation", "turns",
})  # fmt: skip
"""Arguments of `encode_turns` and of ``apply_chat_template`` that are not variables of a template."""

TEMPLATE_DEFAULTS = {"enable_thinking": False}
"""Variables of a template by default: reasoning models skip their reasoning; other templates ignore it."""


def encode(
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, Any]],
    system: str | None = None,
    chat: bool | None = None,
    images: Shown | Sequence[Shown] | None = None,
    **template_options: Any,
) -> list[int]:
    """Return token ids of a prompt, with the start of the model's turn.

    Args:
        prompt: the user turn, or all messages {"role", "content"}.
        system: the system turn; None leaves it to the template (many add a default one).
        chat: apply the chat template; None: if the tokenizer has one.
        images: placed before the prompt: paths, PIL images or `Picture`s, or one of these.
        template_options: see `encode_turns`.

    Raises:
        ConfigError, PromptError: see `encode_turns`. DataError: an image that cannot be read.
    """
    shown = pictures(images)
    if isinstance(prompt, str) and not (has_template(tokenizer) if chat is None else chat):
        return _bare(tokenizer, bare_text(prompt, system), shown)
    return encode_turns(tokenizer, turns_of(prompt, system), shown, **template_options)


def turns_of(prompt: str | Sequence[Mapping[str, Any]], system: str | None = None) -> list[Mapping[str, Any]]:
    """Return the messages {"role", "content"} of a prompt, which may be messages already."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)]


def bare_text(prompt: str | Sequence[Mapping[str, Any]], system: str | None = None) -> str:
    """Return the text of a prompt, or the lines of messages, for a model without a chat template."""
    if not isinstance(prompt, str):
        return "\n".join(turn["content"] for turn in turns_of(prompt, system))
    return f"{system}\n\n{prompt}" if system else prompt


def has_template(tokenizer: Any) -> bool:
    """Return True if the tokenizer, or the processor of a vision-language model, has a chat template."""
    return getattr(processor_of(tokenizer) or tokenizer, "chat_template", None) is not None


def encode_turns(
    tokenizer: Any,
    turns: Sequence[Mapping[str, Any]],
    images: Sequence[Shown] = (),
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
    **template_options: Any,
) -> list[int]:
    """Return token ids of messages {"role", "content"} under the chat template, or of their lines where there is none.

    Images precede the last message's text.

    Args:
        tools: function tools {"type": "function", "function": {"name", "description", "parameters"}}.
        add_generation_prompt: append the start of the model's turn; default: unless ``continue_final_message``.
        continue_final_message: leave the last message open, to be continued.
        template_options: other variables of the template; see `TEMPLATE_DEFAULTS`.

    Raises:
        ConfigError: images for a text model, options that exclude each other, tools or tool turns that the template
            does not render. PromptError: messages that it rejects.
    """
    if continue_final_message and add_generation_prompt:
        raise ConfigError(
            "continue_final_message and add_generation_prompt exclude each other", remedy="set one of them to false"
        )
    if continue_final_message and turns and turns[-1].get("tool_calls"):
        raise PromptError("the last message has tool_calls, so it cannot be continued", remedy="add their results")
    processor, shown = processor_of(tokenizer), pictures(list(images))
    template = chat_template(tokenizer, tools)
    _check_tool_turns(template, turns, tools)
    if template is None:
        return _bare(tokenizer, bare_text(turns), shown)
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message
    options = {
        "add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message,
        "tools": list(tools) if tools else None, "tokenize": True, "return_dict": True, **template_options,
    }  # fmt: skip
    if processor is None:
        _no_images(shown)
        render = partial(tokenizer.apply_chat_template, **{**TEMPLATE_DEFAULTS, **options})
    else:
        no_marks(processor, *(turn["content"] for turn in turns))
        turns = in_parts(turns)
        turns[-1]["content"] = [*({"type": "image", "image": one.open()} for one in shown), *turns[-1]["content"]]
        render = partial(processor.apply_chat_template, return_tensors="pt", **options)
    check_unicode(*(turn["content"] for turn in turns))
    try:
        inputs = _render(render, turns)
    except PromptError:
        raise
    except Exception as error:  # templates raise arbitrary errors
        raise template_error(error, turns) from error
    return list(inputs["input_ids"]) if processor is None else image_prompt(processor, inputs, shown)


def check_unicode(*texts: Any) -> None:
    """Raise `PromptError` for a text with a lone surrogate: bytes that were not UTF-8, or half of a character."""
    for text in texts:
        if isinstance(text, str) and (odd := re.search("[\ud800-\udfff]", text)):
            raise PromptError(
                f"the text is not valid Unicode: {odd[0]!a} at character {odd.start() + 1}", remedy="give UTF-8"
            )


def template_error(error: Exception, turns: Sequence[Mapping[str, Any]]) -> PromptError:
    """Return the error for messages that a chat template does not take, such as Gemma's and a system message."""
    if isinstance(error, TemplateSyntaxError):
        return PromptError(
            f"the chat template of the tokenizer is faulty: {error}", remedy="correct chat_template in its files"
        )
    remedy = "alternate between user and assistant, beginning with user"
    if turns and turns[0]["role"] == "system" and _alternate(turns[1:]):
        remedy = "leave the system message out, or put its text in front of the first user message"
    return PromptError(f"the chat template rejects these messages: {error}", remedy=remedy)


def _alternate(turns: Sequence[Mapping[str, Any]]) -> bool:
    return all(turn["role"] == ("user", "assistant")[number % 2] for number, turn in enumerate(turns))


def _render(render: Callable[[list[Any]], Any], turns: Sequence[Mapping[str, Any]]) -> Any:
    """Apply a template to messages with the arguments of their tool calls as objects, or else as text."""
    parsed = [{**turn, "tool_calls": list(map(_parsed, turn["tool_calls"]))} if turn.get("tool_calls") else turn
              for turn in turns]  # fmt: skip
    try:
        return render(parsed)
    except TypeError:
        if parsed == list(turns):
            raise
        return render(list(turns))  # templates such as DeepSeek-V3's concatenate them with other text


def _parsed(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments as an object."""
    function = call["function"]
    arguments = function["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        raise PromptError(
            f"the arguments of the tool call {function['name']!r} are {function['arguments']!r}, not a JSON object"
        )
    return {**call, "function": {**function, "arguments": arguments}}


def chat_template(tokenizer: Any, tools: Sequence[Mapping[str, Any]] | None = None) -> str | None:
    """Return the text of the chat template, of several the one for tools or the default one; None if there is none."""
    if not has_template(tokenizer):
        return None
    processor = processor_of(tokenizer)
    return str(processor.chat_template if processor is not None else tokenizer.get_chat_template(tools=tools or None))


def _check_tool_turns(
    template: str | None, turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> None:
    """Raise `ConfigError` for tools or tool turns that a template would drop."""
    needed = {
        "tools": (bool(tools), r"\btools\b"),
        "tool_calls": (any(turn.get("tool_calls") for turn in turns), r"\btool_calls\b"),
        "messages of role tool": (any(turn["role"] == "tool" for turn in turns), r"""["']tool["']|\btool_calls\b"""),
    }
    for name, (given, pattern) in needed.items():
        if given and not re.search(pattern, template or ""):
            model = "the model has no chat template" if template is None else "the model's chat template does not"
            raise ConfigError(
                f"{model} {'to ' if template is None else ''}render {name}",
                remedy=f"leave out {name}, or use a base model trained with tools, such as Qwen/Qwen2.5-0.5B-Instruct",
            )


def _bare(tokenizer: Any, text: str, shown: Sequence[Any]) -> list[int]:
    check_unicode(text)
    processor = processor_of(tokenizer)
    if processor is not None:
        no_marks(processor, text)
    if processor is None or not shown:
        _no_images(shown)
        return list(tokenizer(text)["input_ids"])
    text = f"{processor.image_token}\n" * len(shown) + text
    inputs = processor(text=[text], images=[one.open() for one in shown], return_tensors="pt")
    return image_prompt(processor, inputs, shown)


def in_parts(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with their texts as lists of parts, as templates of vision-language models expect them."""
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


def no_marks(processor: Any, *texts: str) -> None:
    """Raise `ConfigError` if a text contains the processor's image token."""
    if any(processor.image_token in text for text in texts):
        raise ConfigError(
            f"the text contains {processor.image_token}, the placeholder of an image",
            remedy=f"remove {processor.image_token}: images are placed before the text",
        )


def _no_images(shown: Sequence[Any]) -> None:
    if shown:
        raise ConfigError(
            "images given to a text-only model",
            remedy="use a vision-language base, such as llava-hf/llava-1.5-7b-hf",
        )


def eos_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids of all end tokens; the first is the one that ends a reply.

    It is the token that the chat template writes after an assistant turn, without a template the tokenizer's end
    token. The others are those of the tokenizer, the generation config and the model config.
    """
    ends: list[int] = []
    for source in (tokenizer, getattr(model, "generation_config", None), getattr(model, "config", None)):
        value = getattr(source, "eos_token_id", None)
        ends += [int(token) for token in ([value] if isinstance(value, int) else value or [])]
    first = _end_of_turn(tokenizer, ends) if has_template(tokenizer) else None
    return list(dict.fromkeys(ends if first is None else [first, *ends]))


def _end_of_turn(tokenizer: Any, ends: Sequence[int]) -> int | None:
    """Return the id of the token that the chat template writes after an assistant turn; None if it writes none."""
    reply = "sigmixreply"
    turns = [{"role": "user", "content": "sigmixprompt"}, {"role": "assistant", "content": reply}]
    # some templates end all turns but the last; before a further turn, only an end token is none of its beginning
    for following in ([], turns[:1]):
        text = _text_of(tokenizer, [*turns, *following])
        if text is None or reply not in text:
            continue
        tail = text[text.rindex(reply) + len(reply) :]
        added = tokenizer.added_tokens_decoder.items()
        marks = {id for id, token in added if token.special or token.content == tail.strip()}.union(ends)
        runs = groupby(tokenizer(tail, add_special_tokens=False)["input_ids"], marks.__contains__)
        first = next((list(run) for marked, run in runs if marked), [])  # <|END_RESPONSE|><|END_OF_TURN_TOKEN|>
        if candidates := [id for id in first if id in ends] or ([] if following else first):
            return int(candidates[0])
    return None


def _text_of(tokenizer: Any, turns: Sequence[Mapping[str, Any]]) -> str | None:
    """Return a conversation under the chat template, after a system turn if it needs one; None if it is rejected."""
    processor = processor_of(tokenizer)
    for first in ([], [{"role": "system", "content": "sigmixsystem"}]):
        rendered = [*first, *turns]
        try:
            return str((processor or tokenizer).apply_chat_template(
                in_parts(rendered) if processor else rendered, tokenize=False, add_generation_prompt=False
            ))  # fmt: skip
        except Exception:  # templates raise arbitrary errors
            continue
    return None


def reply_ids(tokenizer: Any, text: str, ends: Sequence[int]) -> list[int]:
    """Return token ids of a reply with its end token, the first of `eos_token_ids`."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], *ends[:1]]


def context_length(model: Any) -> int | None:
    """Return the model's context length in tokens; None if its config has none."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        if isinstance(value := getattr(config, key, None), int) and value > 0:
            return value
    return None


def check_context(
    model: Any,
    ids: Sequence[int],
    max_new_tokens: int,
    what: str = "the prompt",
    tokenizer: Any = None,
    option: str = "--max-new-tokens",
    limit: int | None = None,
) -> None:
    """Check that a model can read a prompt and answer it.

    Args:
        tokenizer: see `check_tokens`.
        option: name of the option that sets ``max_new_tokens``.
        limit: context length in tokens; None: the model's.

    Raises:
        PromptError: an empty prompt, or see `check_tokens`.
        ContextError: a prompt that exceeds the context together with its answer.
    """
    if not ids:
        raise PromptError(f"{what} is empty", remedy="give some text")
    check_tokens(model, ids, what, tokenizer)
    limit = context_length(model) if limit is None else limit
    if limit is not None and len(ids) + max_new_tokens > limit:
        room, has = max(limit - max_new_tokens, 0), f"{what} has {len(ids)} tokens"
        if max_new_tokens <= 1:
            excess = "which leave no room for an answer in" if max_new_tokens else "more than"
            message = f"{has}, {excess} the model's context of {limit}"
            raise ContextError(message, remedy=f"shorten it to {room} tokens")
        raise ContextError(
            f"{has} and {max_new_tokens} new ones, more than the model's context of {limit}",
            remedy=f"shorten it to {room} tokens or lower {option}" if room else f"lower {option}",
        )


def check_tokens(model: Any, ids: Sequence[int], what: str = "the prompt", tokenizer: Any = None) -> None:
    """Check that every token has a row in the model's embedding matrix.

    Args:
        tokenizer: for the text of a token in an error.

    Raises:
        PromptError: a token without one: the tokenizer has tokens that the model was not resized for.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    unreadable = (token for token in ids if token >= rows or (token < 0 and not is_image_token(token)))
    if (token := next(unreadable, None)) is not None:
        text = tokenizer.convert_ids_to_tokens(token) if tokenizer is not None and 0 <= token < len(tokenizer) else None
        raise PromptError(
            f"{what} has the token {token if text is None else f'{token} ({text})'}, but the model has embeddings of "
            f"the tokens 0 to {rows - 1} only",
            remedy="remove it from the text",
        )
