"""Bytes of tokens, and incremental detokenization with stop strings.

The text of a sequence is the UTF-8 decoding of its tokens' bytes, so streamed text, whole text and the offsets of
log-probabilities agree. It equals ``tokenizer.decode(ids, skip_special_tokens=True)`` with three exceptions: spaces
before punctuation are kept (`clean_up_tokenization_spaces`), a text that continues a prompt keeps its first space, and
a run of byte tokens (``<0xE2>``) that is only partly valid UTF-8 keeps the valid characters.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""Decoded form of bytes that are not UTF-8, such as a part of a character."""

DECODER = "_sigmix_decoder"  # attribute of a tokenizer


class TokenDecoder:
    """Bytes and text of single tokens. Use `token_decoder`, which keeps one per tokenizer.

    Args:
        tokenizer: byte-level BPE, SentencePiece with or without byte fallback, WordPiece, or any other with
            `decode` and `convert_ids_to_tokens`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._decode = tokenizer.decode
        self._token = tokenizer.convert_ids_to_tokens
        self._bytes: dict[int, bytes] = {}
        self._first: dict[int, bytes] = {}
        added = tokenizer.added_tokens_decoder.items()
        self.special = frozenset([*tokenizer.all_special_ids, *(id for id, token in added if token.special)]) - {None}
        """Ids of special tokens, which are not part of a text."""

    @cached_property
    def special_texts(self) -> frozenset[str]:
        """Texts of the special tokens."""
        return frozenset(token_text(self.token_bytes(id)) for id in self.special) - {""}

    def token_bytes(self, id: int, first: bool = False) -> bytes:
        """Return the raw bytes of a token, special ones included; b"" for an id that the tokenizer does not have.

        Args:
            first: at the beginning of a text, where SentencePiece tokenizers drop one space.
        """
        cache = self._first if first else self._bytes
        if (data := cache.get(id)) is None:
            data = cache[id] = self._bytes_of(id, first)
        return data

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True, end: Collection[int] = ()) -> str:
        """Return the text of a whole sequence, without its ``end`` tokens."""
        skip = self.special.union(end) if skip_special_tokens else end
        visible = [id for id in ids if id not in skip]
        data = b"".join(self.token_bytes(id, first=not place) for place, id in enumerate(visible))
        return data.decode("utf-8", "replace")

    def _bytes_of(self, id: int, first: bool) -> bytes:
        # a token's text depends on its place only at the beginning of a text, so the second of two is the general form
        once, twice = (self._decode([id] * n, clean_up_tokenization_spaces=False) for n in (1, 2))
        token, text = str(self._token(id)), str(once) if first else str(twice)[len(once) :]
        if token.endswith("</w>"):  # of openai-gpt, which puts spaces after words
            text = str(twice)[: len(twice) - len(once)]
        if REPLACEMENT not in twice:
            return text.encode()
        if match := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token):
            return bytes.fromhex(match[1])
        if all(character in _byte_level() for character in token):
            return bytes(_byte_level()[character] for character in token)
        return text.encode()


def token_decoder(tokenizer: PreTrainedTokenizerBase) -> TokenDecoder:
    """Return the tokenizer's `TokenDecoder`, an attribute of it after the first call."""
    decoder: TokenDecoder | None = getattr(tokenizer, DECODER, None)
    if decoder is None:
        setattr(tokenizer, DECODER, decoder := TokenDecoder(tokenizer))
    return decoder


def token_text(data: bytes) -> str:
    r"""Return a token's bytes as text for log-probabilities; ``bytes:\xe2\x82`` for a part of a character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@cache
def _byte_level() -> dict[str, int]:
    """Byte of each character of a byte-level vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


class StreamingDetokenizer:
    """Text of one sequence, token by token, up to the first stop string.

    Incomplete characters and possible beginnings of a stop string are held back until they are resolved. A stop string
    matches the text, or, if it contains a special token such as ``<|im_end|>``, the text with its special tokens. Of
    several, the first to be complete ends the text; of these, the longest.

    Args:
        stop_strings: they end the text and are not part of it.
        prompt_ids: the tokens that the text continues; its first space is kept. (): a text of its own.
        skip_special_tokens: leave special tokens out of the text.
        visible_tokens: texts of special tokens that are part of the text all the same.

    Attributes:
        stop_strings: the argument. text: text that later tokens cannot change.
        stopped: the stop string that ended it, or None.
        offset: index in the text of the character in which the last token begins.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_strings: Sequence[str] = (),
        prompt_ids: Iterable[int] = (),
        skip_special_tokens: bool = True,
        visible_tokens: Collection[str] = (),
    ) -> None:
        self.text = ""
        self.stopped: str | None = None
        self.offset = 0
        self._tokens = token_decoder(tokenizer)
        self._skip = self._tokens.special if skip_special_tokens else frozenset()
        if visible_tokens:
            texts = {id: token_text(self._tokens.token_bytes(id)) for id in self._skip}
            self._skip = frozenset(id for id, text in texts.items() if text not in visible_tokens)
        self._first = all(id in self._tokens.special for id in prompt_ids)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.stop_strings = tuple(stop_strings)
        special = self._tokens.special_texts if stop_strings else ()
        self._special_stops = [stop for stop in stop_strings if any(text in stop for text in special)]
        self._visible = ""  # complete characters
        self._full = ""  # the same with special tokens, if a stop string contains one
        self._special: list[tuple[int, int]] = []  # position and length of special tokens in it

    def add(self, token: int, end: bool = False) -> str:
        """Append a token; return the text that became final, possibly empty.

        Args:
            end: an end token, which is not part of the text even if the tokenizer has it as an ordinary one.
        """
        if self.stopped is not None:
            return ""
        part = self._utf8.getstate()[0]  # of a character
        if end or token in self._skip:
            self.offset = len(self._visible) + bool(part)
            if not self._special_stops:
                return ""
            return self._extend("", self._tokens.token_bytes(token).decode("utf-8", "replace"))
        data = self._tokens.token_bytes(token, self._first)
        self._first = False
        self.offset = len(self._visible)
        if part:  # the token completes, continues or breaks the character
            self.offset += len((part + data[:1]).decode("utf-8", "replace")) - 1
        return self._extend(self._utf8.decode(data))

    def flush(self) -> str:
        """Return what was held back, at the end of the sequence."""
        if self.stopped is not None:
            return ""
        text = self._extend(self._utf8.decode(b"", final=True))
        return text if self.stopped is not None else text + self._emit(len(self._visible))

    def _extend(self, text: str, special: str = "") -> str:
        visible, full = len(self._visible), len(self._full)
        self._visible += text
        if not self.stop_strings:
            return self._emit(len(self._visible))
        if self._special_stops:
            self._full += text + special
            if special:
                self._special.append((full, len(special)))
        # only the new part is searched: an earlier match would have ended the sequence
        matches = [*_matches(self._visible, self.stop_strings, visible)]
        for end, start, stop in _matches(self._full, self._special_stops, full):
            matches.append((self._place(end), self._place(start), stop))
        if matches:
            _, start, self.stopped = min(matches)
            return self._emit(start)
        safe = len(self._visible) - _held_back(self._visible, self.stop_strings)
        if self._special_stops:
            safe = min(safe, self._place(len(self._full) - _held_back(self._full, self._special_stops)))
        return self._emit(safe)

    def _place(self, position: int) -> int:
        """Map a position in the text with special tokens to one in the text without."""
        return position - sum(max(min(length, position - start), 0) for start, length in self._special)

    def _emit(self, end: int) -> str:
        new = self._visible[len(self.text) : end]
        self.text += new
        return new


def text_offsets(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], text: str) -> Iterator[int]:
    """Yield the index in ``text`` of the character in which each of its tokens begins.

    Special tokens that the tokenizer added, such as the first one, are not in the text.
    """
    tokens, detokenizer = token_decoder(tokenizer), StreamingDetokenizer(tokenizer, skip_special_tokens=False)
    for id in ids:
        added = id in tokens.special and not text.startswith(token_text(tokens.token_bytes(id)), len(detokenizer.text))
        detokenizer.add(id, end=added)
        yield min(detokenizer.offset, len(text))


def _matches(text: str, stops: Collection[str], start: int) -> Iterator[tuple[int, int, str]]:
    """Yield (end, start, stop string) of matches that end after ``start``."""
    for stop in stops:
        if (place := text.find(stop, max(start - len(stop) + 1, 0))) >= 0:
            yield place + len(stop), place, stop


def _held_back(text: str, stops: Collection[str]) -> int:
    """Return the number of characters at the end of the text that may begin a stop string."""
    starts = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(starts, default=0)
