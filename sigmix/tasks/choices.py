"""Verifiers for multiple choice and for yes/no: the whole reply must be one label, however it is dressed.

Accepted for B: "B", "b", "B.", "B)", "(B)", "**B**", "Answer: B", "The answer is (B).", and "B. Paris" where choice B
reads "Paris". Refused: "A or B", "ABCD", "Not B", and any other text around a label, because a search for a label
finds one in nearly every sentence ("A" is also a word).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from sigmix.tasks.base import Score
from sigmix.tasks.text import normalise

LETTERS = "ABCDEFGH"
_LEAD = r"(?:(?:the\s+)?(?:correct\s+|final\s+)?(?:answer|option|choice)(?:\s+is)?\s*[:=]?\s*)?"


def relabel(labels: Sequence[str]) -> dict[str, str]:
    """The data's labels (letters or digits, in the order shown) to the letters that the prompt shows.

    Raises:
        ValueError: fewer than 2, more than 8, or repeated labels.
    """
    if not 2 <= len(labels) <= len(LETTERS) or len(set(labels)) != len(labels):
        raise ValueError(f"choices need 2 to {len(LETTERS)} distinct labels, not {list(labels)}")
    return dict(zip(labels, LETTERS, strict=False))


def parse_choice(reply: str, labels: Sequence[str], texts: Mapping[str, str] | None = None) -> str | None:
    """The one label that the reply is, or None.

    Args:
        reply: the whole reply.
        labels: as the prompt shows them.
        texts: label to choice text; allows "B. Paris".
    """
    text = re.sub(r"[*_`]", "", reply).strip()
    any_label = "|".join(re.escape(label) for label in labels)
    # "(B" and "B)" both occur when a reply is cut short; the label decides, not the bracket
    match = re.fullmatch(rf"{_LEAD}[(\[]?\s*({any_label})\s*[)\]]?\s*[.:)]?\s*(.*)", text, re.IGNORECASE | re.DOTALL)
    if match is None:
        return None
    label = next(known for known in labels if known.casefold() == match[1].casefold())
    if not match[2].strip():
        return label
    rest = normalise(match[2])
    separated = not text[match.end(1) : match.start(2)].isalnum() and text[match.end(1) : match.start(2)] != ""
    return label if texts is not None and separated and rest == normalise(re.sub(r"[*_`]", "", texts[label])) else None


def score_choice(reply: str, gold: str, texts: Mapping[str, str]) -> Score:
    """`parse_choice` against the gold label; ``texts`` maps every label shown to its choice."""
    found = parse_choice(reply, list(texts), texts)
    return Score.of(found == gold, found, f"expected {gold}" if found else "the reply is not one label")


def wrong_choices(gold: str, labels: Sequence[str]) -> list[str]:
    """Replies that a search for the gold label would accept."""
    others = [label for label in labels if label != gold]
    return [
        *others,
        "".join(labels),
        " ".join(labels),
        ", ".join(labels),
        f"{gold} or {others[0]}",
        f"{others[0]} or {gold}",
        f"{gold}{others[0]}",
        f"Not {gold}",
        f"{others[0]}, not {gold}",
        f"The answer is {others[-1]}, because {gold} is wrong.",
        f"({gold}) ({others[0]})",
        f"Both {gold} and {others[0]}",
    ]


def score_yes_no(reply: str, gold: str) -> Score:
    """Gold is "yes" or "no"; the reply must be that word alone, or behind "Answer:"; "true" is not "yes"."""
    match = re.fullmatch(rf"{_LEAD}(yes|no)\s*[.!]?", re.sub(r"[*_`]", "", reply).strip(), re.IGNORECASE)
    if match is None:
        return Score(0.0, None, "the reply is not just yes or no")
    return Score.of(match[1].lower() == gold, match[1].lower(), f"expected {gold}")
