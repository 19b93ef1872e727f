"""Tiny random model for a smoke test of every stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sigmix.utils.io import atomic_dir

TINY = "tiny"


def tiny_base(folder: Path) -> Path:
    """A folder with a random Llama (hidden 64, 2 layers, seed 0) and a tokenizer of one token a letter, made once."""
    if not (folder / "config.json").exists():
        with atomic_dir(folder) as temporary:
            _model().save_pretrained(temporary)
            letter_tokenizer(2048).save_pretrained(temporary)
    return folder


def _model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=True, initializer_range=0.15,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def letter_tokenizer(length: int = 256) -> Any:
    """One token per letter of printable ASCII, made in memory: ``<pad>`` 0, ``<bos>`` 1, ``<eos>`` 2, ``<unk>`` 3, all
    ids below 256. Text of printable ASCII and newlines comes back exactly. Chat template with the roles as tags."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    letters = ["\n", *(chr(code) for code in range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(special + letters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    template = (
        "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '<eos>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=template,
        padding_side="left",
        model_max_length=length,
        clean_up_tokenization_spaces=False,
    )
