r"""Verifiers for numbers: `strict_number` for short answers, `final_number` for a reasoned reply's last word.

Plain numbers ("-1,234.5", "3/4", "$18", "12 kg", "40%") are read here, because the question is whether the *whole*
text is a number and math-verify answers another one (which number can be found in it). Anything in LaTeX goes to
math-verify, which also compares answers that are not numbers.

Every value is an exact `Fraction`; a percent sign, a currency sign and a unit are dropped, not converted: "40%" is 40.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from typing import Any

from sigmix.errors import ConfigError
from sigmix.tasks.base import Score

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_PLAIN = re.compile(rf"(?P<sign>[-+]?)\s?(?:{_DIGITS})(?P<exp>[eE][-+]?\d{{1,3}})?(?:\s?/\s?(?P<over>\d+))?", re.ASCII)
# A sign belongs to the number unless something stands right before it: "5-3" holds 5 and 3, "5 -3" holds 5 and -3.
# The whole run of digits, points and commas is taken, so a malformed "1,2,3" is no number rather than the number 1.
_IN_TEXT = re.compile(
    r"(?<![\w.,/])(?:(?<![\w)\]-])-)?[$€£]?(?:(?<=[$€£])-)?(?:\d|\.\d)(?:[\d,.]*\d)?(?:\s?/\s?\d+)?(?![\d/])", re.ASCII
)
_UNIT = r"(?:\s?%|\s?°\s?[CF]?|\s?[A-Za-z]+(?:[ -][A-Za-z]+){0,2})"
_HASHES = re.compile(r"####\s*([^\n]*)")
_ANSWER = re.compile(r"\banswer(?:\s+is|\s*:|\s*=)\s*:?\s*", re.IGNORECASE)
_RESULT = re.compile(r"^[\d\s+*/().,$×÷-]*=(.*)")  # "5 + 3 = 8" states 8
_NEGATED = re.compile(r"\b(?:not|isn't|never|except)\s+[*$\\({]*$", re.IGNORECASE)
# What sympy would work on for ever: huge exponents, towers, factorials, sums, products and binomials.
_HUGE = re.compile(
    r"\^\s*\{?\s*\d{4,}|\^\s*\{?[^{}]*\^|[\d)}]\s*!|\*\*|\\(?:sum|prod|int|lim)(?![a-z])|binom\D{0,3}\d{4,}"
)
MAX_DIGITS = 400  # Python refuses to print integers of more than 4,300 digits; no answer here is near that


def parse_number(text: str, *, unit: bool = False) -> Fraction | None:
    """The number that the whole text is, or None.

    Args:
        text: an optional sign, digits with well-formed thousands commas, decimals, an exponent, or a fraction.
        unit: also allow a currency sign in front, and a percent sign or up to three words behind.
    """
    text = text.strip().replace("\u2212", "-").replace("\u2013", "-")
    if len(text) > MAX_DIGITS:
        return None
    if unit:
        text = re.sub(r"^([-+]?)\s?[$€£]\s?([-+]?)(?=[\d.])", r"\1\2", text)
        text = re.sub(rf"(?<=[\d.]){_UNIT}$", "", text) if not re.fullmatch(r"\S*\d[eE][-+]?\d+", text) else text
    match = _PLAIN.fullmatch(text)
    if match is None:
        return None
    head = text.split("/")[0].replace(",", "").replace(" ", "")
    over = int(match["over"]) if match["over"] else 1
    return Fraction(head) / over if over else None


def strict_number(reply: str, gold: str) -> Score:
    """1 if the whole reply (stripped, less one final full stop) is a number equal to gold; else 0."""
    text = reply.strip()
    found = parse_number(text[:-1] if text.endswith(".") else text)
    if found is None:
        return Score(0.0, None, "the reply is not just a number")
    return Score.of(found == parse_number(gold), str(found), f"expected {gold}")


def numbers_in(text: str) -> list[tuple[Fraction, int, int]]:
    """Every number in a text with its start and end, left to right."""
    found = []
    for match in _IN_TEXT.finditer(text.replace("\u2212", "-")):
        value = parse_number(match[0], unit=True)
        if value is not None:
            found.append((value, match.start(), match.end()))
    return found


def final_number(reply: str) -> Fraction | None:
    r"""The number that a reasoned reply ends in, or None.

    The first of these that is there decides: "#### 42", "\boxed{42}", the last "the answer is 42" (or "answer: 42"),
    else the last number. The last is lax: it reads "29 is larger than 895" as 895, so short-answer tasks use
    `strict_number`. Refused: two different "####" or boxed values, "41 or 42", and a number that "not" stands before.
    """
    for candidates in (_HASHES.findall(reply), boxed(reply)):
        if candidates:
            values = {_whole(text) for text in candidates}
            return values.pop() if len(values) == 1 else None
    if answers := list(_ANSWER.finditer(reply)):
        return _first(reply[answers[-1].end() :].split("\n")[0])
    return _last(reply)


def boxed(text: str) -> list[str]:
    r"""The contents of every \boxed{...}, braces matched; an unclosed one is left out."""
    found = []
    for match in re.finditer(r"\\f?boxed\s*\{", text):
        depth, at = 1, match.end()
        while at < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        if not depth:
            found.append(text[match.end() : at - 1])
    return found


def score_final(reply: str, gold: str) -> Score:
    """`final_number` against gold."""
    found = final_number(reply)
    if found is None:
        return Score(0.0, None, "no single final number")
    return Score.of(found == parse_number(gold, unit=True), str(found), f"expected {gold}")


def math_equal(reply: str, gold: str) -> Score:
    r"""1 if the reply's one \boxed{} answer (or, without any, the whole reply) equals gold by math-verify; else 0.

    Source: huggingface/Math-Verify. Several different boxed answers are refused. math-verify's own time limit needs
    the main thread, so it is off, and answers longer than 400 characters or with huge exponents are refused instead.
    """
    contents = list(dict.fromkeys(boxed(reply))) or [reply.strip().rstrip(".")]
    if len(contents) != 1:
        return Score(0.0, None, f"{len(contents)} different boxed answers")
    answer = contents[0].strip()
    if not answer or len(answer) > MAX_DIGITS or "boxed" in answer:  # a box that never closes
        return Score(0.0, None, "no answer of a sensible length")
    words = re.sub(r"\\[A-Za-z]+", " ", answer)
    if re.search(r"\bnot\b", words) or (not boxed(reply) and re.search(r"[A-Za-z]{2}", words)):
        # math-verify picks the expression out of any sentence, also out of one that denies it
        return Score(0.0, None, "a sentence, not an answer")
    if answer == gold.strip():  # also covers answers that no parser reads, such as "\text{east}"
        return Score(1.0, answer)
    if _HUGE.search(answer):
        return Score(0.0, answer, "an expression too large to evaluate")
    math_verify = _math_verify()
    wanted, found = (
        math_verify.parse(rf"\boxed{{{text}}}", parsing_timeout=None, raise_on_error=False) for text in (gold, answer)
    )
    if not found:
        return Score(0.0, answer, "math-verify reads no expression")
    return Score.of(bool(math_verify.verify(wanted, found, timeout_seconds=None, raise_on_error=False)), answer, gold)


def _whole(text: str) -> Fraction | None:
    text = text.strip().strip("$*").removesuffix(".").strip().removesuffix(r"\%").removesuffix("\\")
    value = parse_number(re.sub(r"\\(?:text|mathrm)\{[^{}]*\}$|\\[,;! $]", "", text).strip(), unit=True)
    return _latex(text) if value is None and "\\" in text else value


def _latex(text: str) -> Fraction | None:
    if len(text) > MAX_DIGITS or "^" in text or _HUGE.search(text):
        return None
    parsed = _math_verify().parse(rf"\boxed{{{text}}}", parsing_timeout=None, raise_on_error=False)
    value: Any = parsed[0] if parsed else None
    return Fraction(int(value.p), int(value.q)) if getattr(value, "is_Rational", False) else None


def _math_verify() -> Any:
    """math-verify, without its warning at every call that time limits are off."""
    try:
        import math_verify
    except ImportError as error:
        raise ConfigError(
            "LaTeX answers need math-verify, which is not installed", remedy="pip install 'sigmix[tasks]'"
        ) from error
    for module in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(module).setLevel(logging.ERROR)
    return math_verify


def _first(text: str) -> Fraction | None:
    while match := _RESULT.match(text):
        text = match[1]
    found = numbers_in(text)
    if not found or re.match(r"\s*(?:not|isn't|never)\b", text, re.IGNORECASE):
        return None
    return None if len(found) > 1 and _joined(text[found[0][2] : found[1][1]]) else found[0][0]


def _last(text: str) -> Fraction | None:
    found = numbers_in(text)
    if not found or _NEGATED.search(text[: found[-1][1]]):
        return None
    return None if len(found) > 1 and _joined(text[found[-2][2] : found[-1][1]]) else found[-1][0]


def _joined(between: str) -> bool:
    return re.fullmatch(r"[\s,;]*(?:\bor\b|/|\|)[\s*$]*(?:maybe|perhaps|possibly)?[\s*$]*", between) is not None
