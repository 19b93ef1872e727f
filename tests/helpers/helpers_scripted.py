"""Models that answer every prompt with a given reply."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from helpers_tiny import build_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM


def real_template(name: str) -> str:
    """A chat template of a public model, as TRL has it."""
    return (Path(find_spec("trl").origin).parent / "chat_templates" / f"{name}.jinja").read_text()


def scripted(reply: str, template: str | None = None, special: Sequence[str] = ()) -> tuple[Any, Any]:
    """A model and a tokenizer with one token for each of the reply's pieces, which follow one another.

    Args:
        special: special tokens of the tokenizer; the reply may contain each of them once.
    """
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.model_max_length = 4096
    pieces = _pieces(reply, special)
    tokenizer.add_tokens([piece for piece in pieces if piece not in special])
    marks = sorted(set(re.findall(r"<\|\w+\|>", tokenizer.chat_template)) - set(special))
    tokenizer.add_special_tokens({"additional_special_tokens": [*special, *marks]})
    chain = [*tokenizer.convert_tokens_to_ids(pieces), tokenizer.eos_token_id]
    model = scripted_llama(len(tokenizer), chain, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.no_grad():
        model.lm_head.weight[chain[0]] += 0.5  # after a token of the prompt
    return model, tokenizer


def scripted_llama(vocabulary: int, tokens: Sequence[int], **special: int) -> LlamaForCausalLM:
    """Llama that generates the following one of distinct tokens after each; ``special`` tokens go into its config."""
    config = LlamaConfig(**{
        "vocab_size": vocabulary, "hidden_size": vocabulary + vocabulary % 2, "intermediate_size": 8, "head_dim": 8,
        "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 4096,
        "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, **special,
    })  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # hidden states are one-hot vectors of the tokens: attention and MLP add nothing
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(vocabulary, config.hidden_size))
        model.lm_head.weight.zero_()
        for token, following in pairwise(tokens):
            model.lm_head.weight[following, token] = 1.0
    return model


def _pieces(reply: str, special: Sequence[str]) -> list[str]:
    """Split a text into different pieces, of two characters or more where it can be, and its special tokens."""
    pieces: list[str] = []
    pattern = "|".join(map(re.escape, special))
    for part in re.split(f"({pattern})", reply) if pattern else [reply]:
        if part in special:
            pieces.append(part)
            continue
        piece = ""
        for character in part:
            piece += character
            if len(piece) > 1 and piece not in pieces:
                pieces.append(piece)
                piece = ""
        if piece and (piece in pieces or len(piece) == 1):
            piece = pieces.pop() + piece if pieces and pieces[-1] not in special else piece
        if piece:
            pieces.append(piece)
    assert "".join(pieces) == reply
    assert len(set(pieces)) == len(pieces)
    return pieces
