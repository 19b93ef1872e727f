"""Graders: functions from a reply and its gold answer to a `Score`.

    exact, one_of, exact_lines    text: the whole reply is the answer
    json_only, json_fields        a JSON value; the share of a JSON object's fields
    text_similarity               free text, by edit distance
    score_choice, score_yes_no    multiple choice
    strict_number, score_final    a number alone, or the number that a reasoned reply ends in
    math_equal                    LaTeX, compared by math-verify

`sigmix.tasks.infer` chooses one by a data set's answers. Except for `score_final`, graders do not search for the
answer inside the reply: a search accepts replies that list every candidate, or that state something false about the
right word.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sigmix.errors import UnknownNameError
from sigmix.tasks.base import Score, final_part
from sigmix.tasks.number_parsing import (
    HUGE,
    MAX_DIGITS,
    boxed,
    final_number,
    math_verify,
    parse_latex,
    parse_number,
    time_limit,
)
from sigmix.utils.optional import optional

FINAL_PUNCTUATION = ".!?"
MAX_NFC = 10_000
"""Characters of a text that is brought to NFC, which takes quadratic time in a run of combining marks."""


def wrong_candidates(candidates: Sequence[str], gold: str, *more: str) -> list[str]:
    """Return replies that a search for gold would accept: the other candidates, texts that name several, ``more``."""
    others = [candidate for candidate in candidates if candidate != gold]
    return [
        *others, " ".join(candidates), ", ".join(candidates), " or ".join(candidates), f"{gold} or {others[0]}",
        f"{others[0]} or {gold}", f"{others[0]} and {gold}", f"{others[0]}, not {gold}", f"not {gold} but {others[0]}",
        f"not {others[0]} but {gold}", *more,
    ]  # fmt: skip


def normalise(text: str, *, casefold: bool = True) -> str:
    """Return ``text`` in NFC, stripped, white space collapsed, casefolded, without one final ".", "!" or "?".

    A text of one such mark keeps it; texts of more than `MAX_NFC` characters are not brought to NFC.
    """
    text = " ".join((unicodedata.normalize("NFC", text) if len(text) <= MAX_NFC else text).split())
    if len(text) > 1 and text[-1] in FINAL_PUNCTUATION:
        text = text[:-1].rstrip()
    return text.casefold() if casefold else text


def form(text: str) -> str:
    """Return ``text`` with runs of letters as "a" and digits as "9": "Kate" -> "a", "1961-08-03" -> "9999-99-99"."""
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d", "9", text))


def exact(reply: str, gold: str, *, accept: Iterable[str] = (), casefold: bool = True) -> Score:
    """Return 1 if the normalised reply equals the normalised gold or one of ``accept``.

    A reply of another form (a sentence in place of a word) has no answer (``answer`` is None).
    """
    answer = normalise(final_part(reply), casefold=casefold)
    accepted = {normalise(text, casefold=casefold) for text in (gold, *accept)}
    if form(answer) not in {form(text) for text in accepted}:
        return Score(0.0, None, f"not of the form of {gold!r}")
    return Score.of(answer in accepted, answer, f"expected {gold!r}")


def one_of(reply: str, gold: str, allowed: Iterable[str]) -> Score:
    """Grade like `exact`; a reply outside ``allowed`` has no answer (``answer`` is None)."""
    answer = normalise(final_part(reply))
    labels = {normalise(text) for text in allowed} | {normalise(gold)}
    if answer not in labels:
        return Score(0.0, None, f"the reply is none of {', '.join(sorted(labels))}")
    return Score.of(answer == normalise(gold), answer, f"expected {gold!r}")


def exact_lines(reply: str, gold: str) -> Score:
    """Return 1 if the reply has the lines of gold; case counts, blanks at the ends of lines do not."""
    lines = [line.rstrip() for line in final_part(reply).strip().splitlines()]
    expected = gold.strip().splitlines()
    if [form(line) for line in lines] != [form(line) for line in expected]:
        return Score(0.0, None, f"not of the form of {gold!r}")
    return Score.of(lines == expected, "\n".join(lines), f"expected {gold!r}")


MAX_NESTING = 100
"""Levels of a JSON value; Python's recursion limit allows more than this wherever a value is written again."""


def json_value(text: str) -> Any:
    """Parse a text that is one JSON value and nothing else.

    Raises:
        ValueError: not JSON, text around it (a code fence too), NaN or infinity, a repeated key, or more than
            `MAX_NESTING` levels.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in items}) != len(items):
            raise ValueError("a key is given twice")
        return dict(items)

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(text.strip(), object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    level = [value]
    for _ in range(MAX_NESTING):
        level = [child for node in level for child in _children(node)]
    if level:
        raise ValueError("nested too deeply")
    return value


def _children(node: Any) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


def _json_text(value: Any) -> str:
    """Return JSON with sorted keys that encodes as UTF-8: a lone surrogate stays an escape."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def json_only(reply: str, gold: str) -> Score:
    """Return 1 if the reply is a JSON value equal to gold's; key order is free, 31, "31", 31.0 and true differ."""
    try:
        value, right = json_value(final_part(reply)), json_value(gold)
    except ValueError as error:
        return Score(0.0, None, f"not a JSON value alone: {error}")
    canonical, expected = _json_text(value), _json_text(right)
    return Score.of(canonical == expected, canonical, f"expected {expected}")


def json_fields(reply: str, gold: str) -> Score:
    """Return the share of right fields among the fields of reply and gold, two JSON objects; 1 if they are equal.

    A field is a path to a value that is no object: ``{"a": {"b": 1}}`` has one, a.b. Lists count as one value. Values
    are compared like those of `json_only`. A reply that is not a JSON object alone scores 0 and has no answer.
    """
    try:
        value, right = json_value(final_part(reply)), json_value(gold)
    except ValueError as error:
        return Score(0.0, None, f"not a JSON value alone: {error}")
    if not isinstance(value, dict) or not isinstance(right, dict):
        return Score(0.0, None, f"{'the reply' if isinstance(right, dict) else 'gold'} is not a JSON object")
    given, expected = _fields(value), _fields(right)
    paths = [*expected, *(path for path in given if path not in expected)]
    wrong = [path for path in paths if given.get(path) != expected.get(path)]
    names = ", ".join(".".join(path) or "{}" for path in wrong[:20])[:300]
    return Score((len(paths) - len(wrong)) / len(paths), _json_text(value), f"wrong fields: {names}" if wrong else "")


def _fields(value: dict[str, Any]) -> dict[tuple[str, ...], str]:
    """Return path and JSON of every field; an empty object is a field itself."""
    fields: dict[tuple[str, ...], str] = {}
    nodes: list[tuple[tuple[str, ...], Any]] = [((), value)]
    for path, node in nodes:
        if isinstance(node, dict) and node:
            nodes += [((*path, key), child) for key, child in node.items()]
        else:
            fields[path] = _json_text(node)
    return fields


SIMILAR = 0.6
"""Least similarity that scores: that of two unrelated sentences is 0.36 on average, 0.52 in one pair of 1,000."""
MAX_PRODUCT = 10**10
"""Product of the lengths of two texts that are compared; 0.3 seconds."""


def similarity(text: str, other: str) -> float:
    """Return 1 minus the insertions and deletions between two texts over their total length; 1 only if they are equal.

    Source: ``rapidfuzz.fuzz.ratio``.

    Raises:
        ValueError: texts too long to compare (`MAX_PRODUCT`).
    """
    if text == other:
        return 1.0
    if len(text) * len(other) > MAX_PRODUCT:
        raise ValueError(f"texts of {len(text):,} and {len(other):,} characters are too long to compare")
    return optional("rapidfuzz.fuzz", "'sigmix[tasks]'", "comparing texts").ratio(text, other) / 100


def text_similarity(reply: str, gold: str) -> Score:
    """Return the `similarity` of the normalised reply to the normalised gold; 0 below `SIMILAR`."""
    answer = normalise(final_part(reply))
    try:
        value = similarity(answer, normalise(gold))
    except ValueError as error:
        return Score(None, None, str(error))
    return Score(value if value >= SIMILAR else 0.0, answer or None, f"{value:.2f} similar to {gold!r}")


LETTERS = "ABCDEFGH"
_LEAD = r"(?:(?:the\s+)?(?:correct\s+|best\s+|final\s+)?(?:answer|option|choice)(?:\s+is)?\s*[:=]?\s*)?"


def relabel(labels: Sequence[str]) -> dict[str, str]:
    """Map the data's labels (letters or digits, in the order shown) to the letters that the prompt shows.

    Raises:
        ValueError: fewer than 2, more than 8, or repeated labels.
    """
    if not 2 <= len(labels) <= len(LETTERS) or len(set(labels)) != len(labels):
        raise ValueError(f"choices need 2 to {len(LETTERS)} distinct labels, not {list(labels)}")
    return dict(zip(labels, LETTERS, strict=False))


def _bare(reply: str) -> str:
    r"""Return a reply without its draft, Markdown's marks, quotes, "####", <answer> and \boxed{\text{...}}."""
    marks = r"[*_`{}$\"]|^\s*#+|^\s*<answer>|</answer>\s*$|\\(?:boxed|text(?:bf)?|mathrm|mathbf)(?![A-Za-z])"
    return re.sub(marks, "", final_part(reply)).strip()


def parse_choice(reply: str, labels: Sequence[str], texts: Mapping[str, str] | None = None) -> str | None:
    """Return the label that the whole reply is, or None.

    Args:
        labels: as the prompt shows them.
        texts: label to choice text; allows "B. Paris".
    """
    text = _bare(reply)
    any_label = "|".join(re.escape(label) for label in labels)
    # "(B" and "B)" both occur in truncated replies
    match = re.fullmatch(rf"{_LEAD}[(\[]?\s*({any_label})\s*[)\]]?\s*[.:)-]?\s*(.*)", text, re.IGNORECASE | re.DOTALL)
    if match is None:
        return None
    label = next(label for label in labels if label.casefold() == match[1].casefold())
    if not match[2].strip():
        return label
    between = text[match.end(1) : match.start(2)]
    if texts is None or not between or between.isalnum():
        return None
    return label if normalise(match[2]) == normalise(_bare(texts[label])) else None


def score_choice(reply: str, gold: str, texts: Mapping[str, str]) -> Score:
    """Compare `parse_choice` with the gold label; ``texts`` maps every label shown to its choice."""
    label = parse_choice(reply, list(texts), texts)
    return Score.of(label == gold, label, f"expected {gold}" if label else "the reply is not one label")


def score_yes_no(reply: str, gold: str) -> Score:
    """Return 1 if the reply is the gold "yes" or "no", alone or after "Answer:"; "true" is not "yes"."""
    match = re.fullmatch(rf"{_LEAD}(yes|no)\s*[.!]?", _bare(reply), re.IGNORECASE)
    if match is None:
        return Score(0.0, None, "the reply is not just yes or no")
    return Score.of(match[1].lower() == gold, match[1].lower(), f"expected {gold}")


def strict_number(reply: str, gold: str) -> Score:
    """Return 1 if the whole reply (stripped, less one final full stop) is a number equal to gold."""
    text = final_part(reply).strip()
    number = parse_number(text[:-1] if text.endswith(".") else text)
    if number is None:
        return Score(0.0, None, "the reply is not just a number")
    return Score.of(number == parse_number(gold), str(number), f"expected {gold}")


def score_final(reply: str, gold: str) -> Score:
    """Compare `final_number` with gold, a number or a text with "####" before it."""
    number = final_number(reply)
    if number is None:
        return Score(0.0, None, "no single final number")
    expected = gold.rpartition("####")[2].strip()
    return Score.of(number == parse_number(expected, unit=True), str(number), f"expected {expected}")


def math_equal(reply: str, gold: str) -> Score:
    r"""Return 1 if the reply's one \boxed{} answer (or, without any, the whole reply) equals gold by math-verify.

    Source: huggingface/Math-Verify. Several different boxed answers are refused. Answers longer than 400 characters or
    with huge exponents are refused, and so is what takes math-verify more than five seconds. Its limit needs a signal,
    so other threads than the main one have none.
    """
    reply = final_part(reply)
    contents = list(dict.fromkeys(boxed(reply))) or [reply.strip().rstrip(".")]
    if len(contents) != 1:
        return Score(0.0, None, f"{len(contents)} different boxed answers")
    answer = contents[0].strip()
    if answer and answer == gold.strip():  # also answers that no parser reads, such as "\text{east}"
        return Score(1.0, answer)
    if not answer or len(answer) > MAX_DIGITS or "boxed" in answer:  # a box that never closes
        return Score(0.0, None, "no answer of a sensible length")
    words = re.sub(r"\\[A-Za-z]+", " ", answer)
    if re.search(r"\bnot\b", words) or (not boxed(reply) and re.search(r"[A-Za-z]{2}", words)):
        # math-verify picks the expression out of any sentence, also out of one that denies it
        return Score(0.0, None, "a sentence, not an answer")
    if HUGE.search(answer):
        return Score(0.0, answer, "an expression too large to evaluate")
    number = parse_number(answer, unit=True)  # reads units and thousands that math-verify does not
    if number is not None and number == parse_number(gold, unit=True):
        return Score(1.0, answer)
    expected, parsed = parse_latex(gold), parse_latex(answer)
    if not parsed:
        return Score(0.0, answer, "math-verify reads no expression")
    equal = math_verify().verify(expected, parsed, timeout_seconds=time_limit(), raise_on_error=False)
    return Score.of(bool(equal), answer, gold)


GRADERS: Mapping[str, Callable[[str, str], Score]] = {
    "exact": exact, "number": strict_number, "final": score_final, "math": math_equal, "json": json_only,
    "fields": json_fields, "text": text_similarity,
}  # fmt: skip
"""Graders of a user's own labelled examples, by name."""


def grader_of(name: str, labels: Sequence[str] = ()) -> Callable[[str, str], Score]:
    """Return a grader of `GRADERS`, or for "label" `one_of` over ``labels``; a draft in gold does not count either.

    Raises:
        UnknownNameError: no such grader.
    """
    if name not in (*GRADERS, "label"):
        raise UnknownNameError("grader", name, (*GRADERS, "label"))
    if name == "label":
        return lambda reply, gold: one_of(reply, final_part(gold), labels)
    return lambda reply, gold: GRADERS[name](reply, final_part(gold))
