"""Verifiers for words, lines and JSON: the whole reply has to be the answer.

A verifier that looks for the answer inside the reply is won by replies that list every candidate or that say
something false about the right word, so nothing here searches.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable
from typing import Any

from sigmix.tasks.base import Score

FINAL_PUNCTUATION = ".!?"


def normalise(text: str, *, casefold: bool = True) -> str:
    """NFC, stripped, white space runs made one blank, casefolded, and without one final full stop, "!" or "?"."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    if text and text[-1] in FINAL_PUNCTUATION:
        text = text[:-1].rstrip()
    return text.casefold() if casefold else text


def exact(reply: str, gold: str, *, accept: Iterable[str] = (), casefold: bool = True) -> Score:
    """1 if the normalised reply is the normalised gold, or one of ``accept``; else 0."""
    found = normalise(reply, casefold=casefold)
    wanted = {normalise(text, casefold=casefold) for text in (gold, *accept)}
    return Score.of(bool(found) and found in wanted, found or None, f"expected {gold!r}")


def one_of(reply: str, gold: str, allowed: Iterable[str]) -> Score:
    """Like `exact`, but an answer outside ``allowed`` counts as no answer (``answer`` is None)."""
    found = normalise(reply)
    known = {normalise(text) for text in allowed} | {normalise(gold)}
    if found not in known:
        return Score(0.0, None, f"the reply is none of {', '.join(sorted(known))}")
    return Score.of(found == normalise(gold), found, f"expected {gold!r}")


def exact_lines(reply: str, gold: str) -> Score:
    """1 if the reply has exactly the lines of gold: case counts, blanks at a line's end and around all do not."""
    found = [line.rstrip() for line in reply.strip().splitlines()]
    return Score.of(found == gold.strip().splitlines(), "\n".join(found) or None, f"expected {gold!r}")


def json_value(text: str) -> Any:
    """Parse one JSON value that is the whole text.

    Raises:
        ValueError: not JSON, something around it (a code fence too), NaN or infinity, or a key given twice.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in items}) != len(items):
            raise ValueError("a key is given twice")
        return dict(items)

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text.strip(), object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def json_only(reply: str, gold: str) -> Score:
    """1 if the reply is nothing but a JSON value equal to gold's: key order is free; 31, "31", 31.0 and true differ."""
    try:
        found = json_value(reply)
    except ValueError as error:
        return Score(0.0, None, f"not a JSON value alone: {error}")
    canonical = json.dumps(found, sort_keys=True, ensure_ascii=False)
    wanted = json.dumps(json_value(gold), sort_keys=True, ensure_ascii=False)
    return Score.of(canonical == wanted, canonical, f"expected {wanted}")
