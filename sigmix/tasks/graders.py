"""Verifiers for words, lines and JSON: the whole reply has to be the answer.

A verifier that looks for the answer inside the reply is won by replies that list every candidate or that say
something false about the right word, so nothing here searches.
"""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from sigmix.errors import ConfigError
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


# --- Verifiers for multiple choice and for yes/no: the whole reply must be one label, however it is dressed.


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


# --- Verifiers for numbers: `strict_number` for short answers, `final_number` for a reasoned reply's last word.


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


# --- VQA accuracy: how a reply to a question about an image is compared with what ten people answered.


NUMBERS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}


NUMBERS["none"] = "0"


ARTICLES = ("a", "an", "the")


PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


_FULL_STOP = re.compile(r"\.(?!\d)")


_THOUSANDS = re.compile(r"\d,\d")


_NOT = "are ca could did does do had has have is might must need ought should was were wo would ai sha".split()


_WITH = {
    "d": "he how it she that there they what where who you".split(),
    "ll": "how it that there they what who why you".split(),
    "re": "there they what why you".split(),
    "s": "he how she that there what when where who why somebody someone".split(),
    "ve": "could might must not should they what where who would you".split(),
}


_WORDS = {"shed", "shes"}  # the published table leaves these alone


CONTRACTIONS = {f"{stem}nt": f"{stem}n't" for stem in _NOT}


CONTRACTIONS |= {f"{stem}{end}": f"{stem}'{end}" for end, stems in _WITH.items() for stem in stems}


CONTRACTIONS |= {"weve": "we've", "oclock": "o'clock", "maam": "ma'am", "yall": "y'all", "twas": "'twas"}


CONTRACTIONS = {plain: full for plain, full in CONTRACTIONS.items() if plain not in _WORDS}


def normalised(answer: str) -> str:
    """An answer as VQA accuracy compares it; "" where nothing is left."""
    text = " ".join(answer.replace("’", "'").split()).lower()
    spaced = {mark for mark in PUNCTUATION if f"{mark} " in text or f" {mark}" in text}
    numbers = bool(_THOUSANDS.search(text))
    for mark in PUNCTUATION:
        # a mark parts words ("black-and-white"), unless one like it stands beside a blank, or digits have commas
        text = text.replace(mark, "" if numbers or mark in spaced else " ")
    text = _FULL_STOP.sub("", text)
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(reply: str, answers: Sequence[str]) -> float:
    """Accuracy of a reply in [0, 1] against people's answers (ten of them, as published; one at least)."""
    found = normalised(reply)
    same = sum(normalised(answer) == found for answer in answers)
    if not found or not same:
        return 0.0
    if len(answers) == 1:
        return 1.0
    # leaving out one of those who said it, or one of the others
    without, with_all = min((same - 1) / 3, 1.0), min(same / 3, 1.0)
    return round((same * without + (len(answers) - same) * with_all) / len(answers), 12)


def most_agreed(answers: Sequence[str]) -> str:
    """The answer, as written, that most people gave; the first of those that equally many gave."""
    counts = Counter(normalised(answer) for answer in answers)
    most = max((count for key, count in counts.items() if key), default=0)
    return next((answer for answer in answers if counts[normalised(answer)] == most and normalised(answer)), "")
