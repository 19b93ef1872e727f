"""Small tokenizers of the kinds that models have."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["▁The", "▁capital", "▁is", "▁Paris", "▁now", "▁a", "b", "é", "▁", "▁▁", "\N{REPLACEMENT CHARACTER}", "\n"]
SPECIAL = ["<unk>", "<s>", "</s>"]
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]


def byte_level() -> PreTrainedTokenizerFast:
    """One token per byte, as byte-level BPE (GPT-2, Llama 3, Qwen) has for rare characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: id for id, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _fast(backend, eos_token="<|endoftext|>")


def sentencepiece(template: str | None = None) -> PreTrainedTokenizerFast:
    """Words and byte fallback, with a space before the first word (Llama 2, Mistral)."""
    vocab = [*SPECIAL, *WORDS, *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.Unigram([(token, -1.0 / len(token)) for token in vocab], 0, True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _fast(backend, bos_token="<s>", eos_token="</s>", chat_template=template)


def gemma() -> PreTrainedTokenizerFast:
    """As `sentencepiece`, without the space before the first word."""
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def metaspace() -> PreTrainedTokenizerFast:
    """Unigram without byte fallback, as T5."""
    vocab = [*SPECIAL, *WORDS]
    backend = Tokenizer(models.Unigram([(token, -1.0 / len(token)) for token in vocab], 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return _fast(backend, eos_token="</s>", clean_up_tokenization_spaces=True)


def wordpiece() -> PreTrainedTokenizerFast:
    """Words and their continuations, as BERT."""
    vocab = ["[UNK]", "the", "capital", "is", "paris", "##ian", "##s", ".", "é", "don", "'", "t"]
    backend = Tokenizer(models.WordPiece({token: id for id, token in enumerate(vocab)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return _fast(backend, eos_token="[SEP]")


def _fast(backend: Tokenizer, **options) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    tokenizer.add_special_tokens({"additional_special_tokens": CHAT_TOKENS})
    return tokenizer


KINDS = {kind.__name__: kind for kind in (byte_level, sentencepiece, gemma, metaspace, wordpiece)}
