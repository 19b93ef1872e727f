"""What `Engine.generate` returns, and the checks on what it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sigmix.errors import ConfigError, ContextError
from sigmix.experts.mix import Mix

ROWS_PER_MIX = 24
"""Rows from which a mix is worth merged weights and a batch of its own. Measured on two cores, 64 rows, kept weights:
two mixes take 0.77 of the factored form's time, three 0.94, six 1.23."""


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: decoded, special tokens left out. ids: the generated token ids, the end token included.
        logprobs: natural log-probability of each id under the adapted model. mix: what answered.
        prompt_tokens: length of the prompt. finish: "stop", "length", or "error" for a prompt that does not fit.
        error: with finish "error", what is wrong with the prompt; the text is empty then.
    """

    text: str
    ids: list[int]
    logprobs: list[float]
    mix: Mix
    prompt_tokens: int
    finish: str
    error: ContextError | None = None


def check_options(max_new_tokens: int, temperature: float, top_p: float, stop: Sequence[str]) -> None:
    """Raise `ConfigError` for options of generation that cannot work."""
    if max_new_tokens < 1 or not 0 <= temperature < float("inf") or not 0 < top_p <= 1:
        raise ConfigError("max_new_tokens must be at least 1, temperature at least 0 and top_p in (0, 1]")
    if isinstance(stop, str) or not all(stop):
        raise ConfigError(f"stop must be a list of strings that are not empty, not {stop!r}", remedy="stop=['END']")


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


def batches(rows: Sequence[int], mixes: Sequence[Mix], batch_size: int, form: str | None) -> Iterator[list[int]]:
    """Numbers of the rows that share a batch: mixes with many rows get one of their own, unless a form is asked for.

    Args:
        rows: numbers. mixes: of all rows, by number.
    """
    for start in range(0, len(rows), batch_size):
        part = list(rows[start : start + batch_size])
        distinct = dict.fromkeys(mixes[number] for number in part)
        if form is None and len(distinct) > 1 and len(part) >= ROWS_PER_MIX * len(distinct):
            for mix in distinct:
                yield [number for number in part if mixes[number] == mix]
        else:
            yield part
