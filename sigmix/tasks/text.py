"""Verifiers for words, lines and JSON: the whole reply has to be the answer.

A verifier that looks for the answer inside the reply is won by replies that list every candidate or that say
something false about the right word, so nothing here searches.
"""

from __future__ import annotations

import json
import re
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


def form(text: str) -> str:
    """A text's form: runs of letters become "a", digits "9": "Kate" is "a", "1961-08-03" is "9999-99-99"."""
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d", "9", text))


def exact(reply: str, gold: str, *, accept: Iterable[str] = (), casefold: bool = True) -> Score:
    """1 if the normalised reply is the normalised gold, or one of ``accept``; else 0.

    A reply of another form (a sentence where a word was asked for) counts as no answer (``answer`` is None).
    """
    found = normalise(reply, casefold=casefold)
    wanted = {normalise(text, casefold=casefold) for text in (gold, *accept)}
    if form(found) not in {form(text) for text in wanted}:
        return Score(0.0, None, f"not of the form of {gold!r}")
    return Score.of(found in wanted, found, f"expected {gold!r}")


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
    wanted = gold.strip().splitlines()
    if [form(line) for line in found] != [form(line) for line in wanted]:
        return Score(0.0, None, f"not of the form of {gold!r}")
    return Score.of(found == wanted, "\n".join(found), f"expected {gold!r}")


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
