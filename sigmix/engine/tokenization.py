"""Prompt tokenization with the chat template, end tokens and the context length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sigmix.errors import ConfigError, ContextError, PromptError
from sigmix.models.multimodal import image_prompt, processor_of
from sigmix.utils.images import Shown, pictures


def encode(
    tokenizer: Any,
    prompt: str,
    system: str | None = None,
    chat: bool | None = None,
    images: Shown | Sequence[Shown] | None = None,
) -> list[int]:
    """Return token ids of a prompt, with the start of the model's turn.

    Args:
        prompt: the user turn.
        system: the system turn; None leaves it to the template (many add a default one).
        chat: apply the chat template; None: if the tokenizer has one.
        images: placed before the prompt: paths, PIL images or `Picture`s, or one of these.

    Raises:
        ConfigError: images for a text model. DataError: an image that cannot be read.
    """
    shown = pictures(images)
    if chat is None:
        chat = has_template(tokenizer)
    if not chat:
        return _bare(tokenizer, bare_text(prompt, system), shown)
    return encode_turns(tokenizer, turns_of(prompt, system), shown)


def turns_of(prompt: str, system: str | None = None) -> list[dict[str, str]]:
    """Return the messages {"role", "content"} of a prompt."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": prompt}]


def bare_text(prompt: str, system: str | None = None) -> str:
    """Return the text of a prompt for a model without a chat template."""
    return f"{system}\n\n{prompt}" if system else prompt


def has_template(tokenizer: Any) -> bool:
    """Return True if the tokenizer, or the processor of a vision-language model, has a chat template."""
    return getattr(processor_of(tokenizer) or tokenizer, "chat_template", None) is not None


def encode_turns(tokenizer: Any, turns: Sequence[Mapping[str, str]], images: Sequence[Shown] = ()) -> list[int]:
    """Return token ids of messages {"role", "content"} under the chat template; images precede the last message's text.

    Raises:
        ConfigError: images for a text model. Other errors are the template's.
    """
    processor, shown = processor_of(tokenizer), pictures(list(images))
    if processor is None:
        _no_images(shown)
        # reasoning models skip their reasoning; other templates ignore the option
        ids = tokenizer.apply_chat_template(
            list(turns), add_generation_prompt=True, tokenize=True, enable_thinking=False
        )
        return list(ids["input_ids"] if hasattr(ids, "keys") else ids)
    no_marks(processor, *(turn["content"] for turn in turns))
    parts = in_parts(turns)
    parts[-1]["content"] = [*({"type": "image", "image": one.open()} for one in shown), *parts[-1]["content"]]
    inputs = processor.apply_chat_template(
        parts, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return image_prompt(processor, inputs, shown)


def _bare(tokenizer: Any, text: str, shown: Sequence[Any]) -> list[int]:
    processor = processor_of(tokenizer)
    if processor is not None:
        no_marks(processor, text)
    if processor is None or not shown:
        _no_images(shown)
        return list(tokenizer(text)["input_ids"])
    text = f"{processor.image_token}\n" * len(shown) + text
    inputs = processor(text=[text], images=[one.open() for one in shown], return_tensors="pt")
    return image_prompt(processor, inputs, shown)


def in_parts(turns: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Return messages with their texts as lists of parts, as templates of vision-language models expect them."""
    return [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


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
    """Return all end token ids of the generation config, the model config and the tokenizer."""
    found: list[int] = []
    for source in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        value = getattr(source, "eos_token_id", None)
        for token in [value] if isinstance(value, int) else (value or []):
            if token not in found:
                found.append(int(token))
    return found


def reply_ids(tokenizer: Any, text: str, ends: Sequence[int]) -> list[int]:
    """Return token ids of a reply, followed by the first end token."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], *ends[:1]]


def context_length(model: Any) -> int | None:
    """Return the model's context length in tokens; None if its config has none."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        if isinstance(value := getattr(config, key, None), int) and value > 0:
            return value
    return None


def check_context(
    model: Any, ids: Sequence[int], max_new_tokens: int, what: str = "the prompt", tokenizer: Any = None
) -> None:
    """Check that a model can read a prompt and answer it.

    Args:
        tokenizer: for the text of a token in an error.

    Raises:
        PromptError: an empty prompt, or a token without a row in the embedding matrix.
        ContextError: a prompt that exceeds the context together with its answer.
    """
    if not ids:
        raise PromptError(f"{what} is empty", remedy="give some text")
    rows = model.get_input_embeddings().weight.shape[0]
    if (token := next((token for token in ids if not 0 <= token < rows), None)) is not None:
        text = tokenizer.convert_ids_to_tokens(token) if tokenizer is not None and 0 <= token < len(tokenizer) else None
        raise PromptError(
            f"{what} has token {token}{'' if text is None else f' ({text})'}, but the model's embedding has tokens "
            f"0 to {rows - 1} only",
            remedy="remove it from the text",
        )
    limit = context_length(model)
    if limit is not None and len(ids) + max_new_tokens > limit:
        raise ContextError(
            f"{what} has {len(ids)} tokens and {max_new_tokens} new ones, more than the model's context of {limit}",
            remedy=f"shorten it to {max(limit - max_new_tokens, 0)} tokens or lower --max-new-tokens",
        )
