"""From tokens to text as it grows: no half characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def decoded(tokenizer: Any, ids: Sequence[int], stop: Sequence[str]) -> str:
    """Text of an answer's token ids, up to the first stop string."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    cuts = [place for mark in stop if (place := text.find(mark)) >= 0]
    return text[: min(cuts)] if cuts else text


def held_back(text: str, stop: Sequence[str]) -> str:
    """The end of a growing text that may still change: half a character, or the beginning of a stop string."""
    if text.endswith("�"):
        return text[len(text.rstrip("�")) :]
    longest = max((n for mark in stop for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0)
    return text[len(text) - longest :] if longest else ""


WINDOW = 8
"""Tokens behind which a decoded text no longer changes with what follows."""


class Pieces:
    """One answer's text, token by token.

    Args:
        tokenizer: of the model. stop: strings that end the answer; they are not part of it.

    Attributes:
        text: what can be shown for good. stopped: the stop string that was met, or None.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.text = ""
        self.stopped: str | None = None
        self._place = 0
        self._ids: list[int] = []
        self._settled = ""  # text of the tokens before _from
        self._from = 0

    def add(self, token: int) -> str:
        """The text that this token makes certain; may be empty."""
        self._ids.append(token)
        whole = self._whole()
        for mark in self.stop:
            # a mark that was met before would have ended the answer, so it can only end in what is new
            place = whole.find(mark, max(len(self.text) - len(mark), 0))
            if place >= 0 and (self.stopped is None or place < self._place):
                self.stopped, self._place = mark, place
        if self.stopped is not None:
            return self._show(whole[: self._place])
        held = held_back(whole, self.stop)
        return self._show(whole[: len(whole) - len(held)])

    def end(self) -> str:
        """What was held back, now that nothing follows."""
        return "" if self.stopped is not None else self._show(self._whole())

    def _show(self, text: str) -> str:
        new = text[len(self.text) :]
        self.text += new
        return new

    def _whole(self) -> str:
        recent = self._decode(self._ids[self._from :])
        if len(self._ids) - self._from >= 2 * WINDOW and not recent.endswith("�"):
            middle = len(self._ids) - WINDOW
            tail = self._decode(self._ids[middle:])
            # only where cutting here changes nothing: no half character, no space that a first token loses
            if recent.endswith(tail) and not tail.startswith("�"):
                self._settled += recent[: len(recent) - len(tail)]
                self._from, recent = middle, tail
        return self._settled + recent

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)
