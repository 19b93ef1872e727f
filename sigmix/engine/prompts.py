"""From a user's words to token ids: the tokenizer's own chat template, and the check against the context length."""

from __future__ import annotations

from typing import Any

from sigmix.errors import ContextError


def encode(tokenizer: Any, prompt: str, system: str | None = None, chat: bool | None = None) -> list[int]:
    """Token ids of a prompt, ready for the model to answer.

    Args:
        prompt: the user's turn.
        system: the system turn; None leaves it to the template (many add a default one).
        chat: apply the chat template; None: if the tokenizer has one. Without it the ids are of the bare text.
    """
    if chat is None:
        chat = getattr(tokenizer, "chat_template", None) is not None
    if not chat:
        return list(tokenizer(f"{system}\n\n{prompt}" if system else prompt)["input_ids"])
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    # thinking models are asked for the answer alone; templates without the switch ignore it
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, enable_thinking=False)
    return list(ids["input_ids"] if hasattr(ids, "keys") else ids)


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """All token ids that end an answer: the generation config's, the model config's and the tokenizer's."""
    found: list[int] = []
    for source in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        value = getattr(source, "eos_token_id", None)
        for token in [value] if isinstance(value, int) else (value or []):
            if token not in found:
                found.append(int(token))
    return found


def context_length(model: Any) -> int | None:
    """How many tokens the model can see, or None where its config does not say."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        if isinstance(value := getattr(config, key, None), int) and value > 0:
            return value
    return None


def check_context(model: Any, ids: list[int], max_new_tokens: int, what: str = "the prompt") -> None:
    """Raise if prompt and answer cannot both fit.

    Raises:
        ContextError: the prompt is empty, or prompt + max_new_tokens exceeds the context.
    """
    if not ids:
        raise ContextError(f"{what} is empty", remedy="give some text")
    limit = context_length(model)
    if limit is not None and len(ids) + max_new_tokens > limit:
        raise ContextError(
            f"{what} has {len(ids)} tokens; with {max_new_tokens} to answer it exceeds the model's context of {limit}",
            remedy=f"shorten it to {max(limit - max_new_tokens, 0)} tokens or lower --max-new-tokens",
        )
