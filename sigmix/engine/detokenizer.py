"""Incremental detokenization with stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 8
"""Tokens after which a decoded text no longer depends on what follows."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""Decoded form of an incomplete multi-byte character."""


class StreamingDetokenizer:
    """Text of one sequence, token by token, up to the first stop string.

    Incomplete multi-byte characters and possible beginnings of a stop string are held back until they are resolved.

    Attributes:
        text: text that later tokens cannot change. stopped: the stop string that ended it, or None.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop_strings = tokenizer, tuple(stop_strings)
        self.text = ""
        self.stopped: str | None = None
        self._ids: list[int] = []
        self._offset = 0  # tokens before it are decoded for good, as _prefix
        self._prefix = ""

    def add(self, token: int) -> str:
        """Append a token; return the text that became final, possibly empty."""
        if self.stopped is not None:
            return ""
        self._ids.append(token)
        text = self._decode_all()
        # only the new part is searched: an earlier match would have ended the sequence
        found = [(text.find(stop, max(len(self.text) - len(stop), 0)), stop) for stop in self.stop_strings]
        if matches := [match for match in found if match[0] >= 0]:
            end, self.stopped = min(matches, key=lambda match: match[0])
            return self._emit(text[:end])
        return self._emit(text[: len(text) - self._held_back(text)])

    def flush(self) -> str:
        """Return what was held back, at the end of the sequence."""
        return "" if self.stopped is not None else self._emit(self._decode_all())

    def _emit(self, text: str) -> str:
        new = text[len(self.text) :]
        self.text += new
        return new

    def _held_back(self, text: str) -> int:
        """Characters at the end of the text that may still change."""
        complete = text.rstrip(REPLACEMENT)
        starts = (n for stop in self.stop_strings for n in range(1, len(stop)) if complete.endswith(stop[:n]))
        return len(text) - len(complete) + max(starts, default=0)

    def _decode_all(self) -> str:
        recent = self._decode(self._ids[self._offset :])
        if len(self._ids) - self._offset >= 2 * WINDOW and not recent.endswith(REPLACEMENT):
            middle = len(self._ids) - WINDOW
            tail = self._decode(self._ids[middle:])
            # split only where it is lossless: no cut character, no space that the tokenizer strips from a first token
            if recent.endswith(tail) and not tail.startswith(REPLACEMENT):
                self._prefix += recent[: len(recent) - len(tail)]
                self._offset, recent = middle, tail
        return self._prefix + recent

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
