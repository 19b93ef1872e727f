"""Graders: functions from a reply and its gold answer to a `Score`.

    exact, one_of, exact_lines    text: the whole reply is the answer
    json_only, json_fields        a JSON value; the share of a JSON object's fields
    text_similarity               free text, by edit distance
    score_choice, score_yes_no    multiple choice
    strict_number, score_final    a number alone, or the number that a reasoned reply ends in
    math_equal                    LaTeX, compared by math-verify
    vqa_accuracy                  agreement with ten people's answers

`infer_grader` chooses one for a data set's answers. Except for `score_final`, graders do not search for the answer
inside the reply: a search accepts replies that list every candidate, or that state something false about the right
word.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from fractions import Fraction
from typing import Any

from sigmix.errors import ConfigError, UnknownNameError
from sigmix.tasks.base import Score
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


_TAG = r"[<\[◁](/?)(?:seed:)?(?:think(?:ing)?|thought|reasoning)[>\]▷]"
_QUOTED = rf"(?<=[\"'`])(?<!```){_TAG.replace('(/?)', '/?')}[\"'`](?!``)"
_DRAFT = re.compile(rf"(?!{_QUOTED}){_TAG}", re.IGNORECASE)


def final_part(reply: str) -> str:
    """Return the reply without its draft: the text after the last ``</think>``, "" after an open ``<think>``.

    ``<thinking>``, ``<thought>``, ``<reasoning>`` and ``[THINK]`` are drafts too; a tag in quotes is not one.
    """
    tags = list(_DRAFT.finditer(reply))
    if not tags:
        return reply
    return reply[tags[-1].end() :] if tags[-1][1] else ""


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


_SIGNS = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"), "-")
_THIN = "\u00a0\u2009\u202f"  # no-break and thin spaces
_GROUPS = r"\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)"  # 1,234,567, in India 12,34,567
_SPACED = r"\d{1,3}(?:[ '’]\d{3})+(?![\d'’])"  # 1 234 567 and 1'234'567
_POWER = r"[eE][-+]?\d{1,3}|\s?[×x*]\s?10\s?\^\s?\{?[-+]?\d{1,3}\}?"
_SCALES = {"hundred": 2, "thousand": 3, "k": 3, "million": 6, "billion": 9, "trillion": 12}
_MONEY_SCALES = {"K": " thousand", "M": " million", "B": " billion"}  # "$5K", while "5 K" is a temperature
_SCALE = rf"\s?({'|'.join(_SCALES)})(?![^\W_])"
_MONEY = r"(?:(?:[A-Z]{0,2}[$€£¥₹]|[A-Z]{3}|Rs\.?)\s?)"
_PLAIN = re.compile(
    rf"(?P<sign>[-+]?)\s?(?:(?P<whole>\d+)\s(?=\d+\s?/))?(?P<digits>(?:{_GROUPS}|\d+)(?:\.\d+)?|\.\d+)"
    rf"(?P<power>{_POWER})?(?:\s?/\s?(?P<over>\d+))?",
    re.ASCII,
)
# A sign belongs to the number unless something stands right before it: "5-3" holds 5 and 3, "5 -3" holds 5 and -3.
# The whole run of digits, points and commas is taken, so a malformed "1,2,3" is no number rather than the number 1.
_IN_TEXT = re.compile(
    rf"(?<![\w.,/])(?:(?<![\w)\]-])-)?{_MONEY}?(?:(?<=[$€£¥₹])-)?"
    rf"(?:{_SPACED}(?:\.\d+)?|\d+\s\d+\s?/\s?\d+|(?:\d|\.\d)(?:[\d,.]*\d)?)"
    rf"(?:{_POWER})?(?:\s?/\s?\d+)*(?:{_SCALE})?",
    re.ASCII,
)
_LETTER = "[mgshdtlLKNJWVACFTHB]"  # a single letter that is a unit: "5 m", while "5x" is an expression
_WORD = (
    rf"(?!(?:or|and|not|but|to|plus|minus|times|over)\b)"
    rf"(?:[^\W\d_]{{2,}}\.?|{_LETTER}(?![^\W\d_]))(?:\^?\{{?[23²³]\}}?)?"
)
_UNIT = rf"\s?(?:[%‰$€£¥₹¢]|°\s?[CFK]?|(?:[%$€£¥₹°]\s?)?{_WORD}(?:[ /·-]{{1,2}}{_WORD}){{0,2}})"
_HASHES = re.compile(r"(?<!#)####(?!#)\s*([^\n]*)")
_ANSWER = re.compile(r"\b(final\s+)?answer[*_]*(?:\s+is\b|\s*:|\s*=)[\s*_:]*", re.IGNORECASE)
_TITLE = re.compile(r"^[A-Za-z ]*:\s*")  # "#### Total: 5"; a title with a number is a heading
_REMARK = re.compile(r"\s\((?=[^()]*[^()\d\s.,/$%])(?![^()]*\bor\b)[^()]*\)$")  # "5 (2 + 3)"; "5 (or 6)" is ambiguous
_RESULT = re.compile(r"^(?:[\d\s+*/().,$×÷-]*|\s*[A-Za-z]\w*\s*)=(.*)")  # "5 + 3 = 8" and "x = 8" state 8
_MINUS = re.compile(r"(?<![\d)])(?<![\d)]\s)\b(?:minus|negative)\s+(?=[$€£¥₹]?\d)", re.IGNORECASE)
_BEFORE = r"(?:\s+be)?\s+[*$\\({]*$"
_NEGATED = re.compile(rf"(?:\b(?:not|cannot|never|except)|n['’]t){_BEFORE}", re.IGNORECASE)
_BOUND = re.compile(
    rf"(?:\b(?:(?:more|less|fewer|greater|larger|smaller) than|at (?:least|most))|(?<!\S)[<>≤≥≠]){_BEFORE}",
    re.IGNORECASE,
)
# between the first two numbers of an answer: a range, a list, a formula, or a quantity in two units
_COMPOUND = (
    r"(?:(?:hour|hr|minute|min|day|week|month|year|dollar|euro|pound|lb|mile|yard|gallon)s?|feet|foot|ft|kg|k?m|h)"
)
_MORE = re.compile(
    rf"\s*(?:[-+*×÷,;&]|and|to|plus|minus|times|over|divided by|{_COMPOUND},?(?:\s+and)?)\s*", re.IGNORECASE
)
_UNKNOWN = re.compile(r"\s?[a-zA-Z](?![^\W_])")

# on these sympy may not terminate: huge exponents, towers, factorials, sums, products and binomials
_HUGE = re.compile(
    r"\^\s*\d{4,}|\^\s*\{(?:[^{}\d]*\d){4,}|\^\s*\{?[^{}]*\^|[\d)}]\s*!|\*\*|\\(?:sum|prod|int|lim)(?![a-z])"
    r"|binom\D{0,3}\d{4,}"
)
MAX_DIGITS = 400  # Python refuses to print integers of more than 4,300 digits; no answer here is near that


def plain(text: str) -> str:
    r"""Return text with numbers of LaTeX and Unicode in ASCII: "1{,}234", "1\,234", "\frac12", "−5", "1½", "\$5"."""
    text = re.sub(r"\\!|\\left|\\right|\\displaystyle|\\[()\[\]]", "", text.translate(_SIGNS))
    text = re.sub(rf"(?<=\d)(?:\{{,\}}|\\[,;: ]|~|[{_THIN}])(?=\d{{3}}(?!\d))", ",", text)
    text = re.sub(r"\\(?:text|mathrm|mathbf|mbox|textbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dt]?frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))", _fraction, text)
    text = re.sub("[¼-¾⅐-⅞]", lambda match: _after_digit(match, unicodedata.normalize("NFKC", match[0])), text)
    text = re.sub(r"\\(?:times|cdot)(?![A-Za-z])", "×", text.replace("\u2044", "/"))
    text = re.sub(r"([$€£¥₹]\s?[\d.,]*\d)([KMB])(?![^\W_])", lambda match: match[1] + _MONEY_SCALES[match[2]], text)
    text = re.sub(r"\^\s*\{\s*\\circ\s*\}|\^?\\(?:circ|degree)(?![A-Za-z])", "°", text)
    return re.sub(rf"\\[,;: ]|[~{_THIN}]", " ", re.sub(r"\\([$%])", r"\1", text))


def _fraction(match: re.Match[str]) -> str:
    return _after_digit(match, f"{match[1] or match[2]}/{match[3] or match[4]}")


def _after_digit(match: re.Match[str], text: str) -> str:
    """Return text, after a blank if a digit stands before the match: "1½" is "1 1/2"."""
    return f" {text}" if match.string[: match.start()][-1:].isdigit() else text


def parse_number(text: str, *, unit: bool = False) -> Fraction | None:
    """Return the number that the whole text is, or None.

    Args:
        text: an optional sign, digits with well-formed thousands commas, decimals, an exponent, a fraction or a mixed
            number, in ASCII, Unicode or LaTeX.
        unit: also allow a currency in front, "thousand", "million" or a unit (up to three words, a percent sign)
            behind, and thousands grouped by blanks. A percentage is the number before the sign.
    """
    if len(text) > MAX_DIGITS:
        return None
    text = " ".join(plain(text).split())
    scale = 0
    if unit:
        text = re.sub(rf"^([-+]?)\s?{_MONEY}([-+]?)(?=[\d.])", r"\1\2", text)
        text = re.sub(rf"^[-+]?{_SPACED}", lambda match: re.sub("[ '’]", ",", match[0]), text)
        if match := re.fullmatch(rf"(.*[\d.]){_SCALE}((?:{_UNIT})?)", text):
            text, scale = match[1] + match[3], _SCALES[match[2]]
        text = re.sub(rf"(?<=[\d.}}]){_UNIT}$", "", text) if not re.fullmatch(r"\S*\d[eE][-+]?\d+", text) else text
    match = _PLAIN.fullmatch(text)
    if match is None:
        return None
    over = int(match["over"]) if match["over"] else 1
    power = int(re.sub(r"^[eE]|^.*\^|[{}\s]", "", match["power"])) if match["power"] else 0
    number = Fraction(match["digits"].replace(",", ""))
    if not over or (match["whole"] and not number < over):  # "3 5/4" is no mixed number
        return None
    number = number * Fraction(10) ** (power + scale) / over + int(match["whole"] or 0)
    return -number if match["sign"] == "-" else number


def number_text(number: Fraction) -> str:
    """Return a number as people write it: "5", "2.5", and "1/3" where decimals do not end."""
    if number.denominator == 1:
        return str(number.numerator)
    decimal = str(float(number))
    return decimal if Fraction(decimal) == number else str(number)


def strict_number(reply: str, gold: str) -> Score:
    """Return 1 if the whole reply (stripped, less one final full stop) is a number equal to gold."""
    text = final_part(reply).strip()
    number = parse_number(text[:-1] if text.endswith(".") else text)
    if number is None:
        return Score(0.0, None, "the reply is not just a number")
    return Score.of(number == parse_number(gold), str(number), f"expected {gold}")


def numbers_in(text: str) -> list[tuple[Fraction | None, int, int]]:
    """Return every number in a `plain` text with its start and end, left to right.

    The number is None where it cannot be read by itself: malformed ("1,2,3"), or a part of a date, a time, a ratio, a
    power or a root.
    """
    numbers: list[tuple[Fraction | None, int, int]] = []
    for match in _IN_TEXT.finditer(text):
        before, after = text[: match.start()][-2:], text[match.end() :][:2]
        part = re.search(r"[\^{]$|\d:$", before) or re.match(r":\d|[/^]|\\|½", after)
        numbers.append((None if part else parse_number(match[0], unit=True), match.start(), match.end()))
    return numbers


def final_number(reply: str) -> Fraction | None:
    r"""Return the number that a reasoned reply ends in, or None.

    The first of these that occurs decides: "#### 42" and "\boxed{42}", the last "the answer is 42" (or "answer: 42"),
    the last number. The last is lax: it reads "29 is larger than 895" as 895, so use `strict_number` for short
    answers. A "####" before text that is no number is a heading. Refused: different values after "####", in boxes or
    after "final answer", "41 or 42", a number after "not", and a reply that ends in a "####" without a number.
    """
    reply = _MINUS.sub("-", plain(final_part(reply)).strip())
    marked = [value for text in _HASHES.findall(reply) if (value := _whole(text)) is not None]
    marked += [_whole(text) for text in boxed(reply)]  # type: ignore[misc]
    if marked:
        return marked[0] if len(set(marked)) == 1 else None
    if answers := list(_ANSWER.finditer(reply)):
        values = [_first(reply[match.end() : match.end() + MAX_DIGITS].split("\n")[0]) for match in answers]
        final = {value for value, match in zip(values, answers, strict=True) if match[1]}
        return values[-1] if len(final) < 2 else None
    headings = list(_HASHES.finditer(reply))
    return None if headings and headings[-1].end() == len(reply) else _last(reply)


def score_final(reply: str, gold: str) -> Score:
    """Compare `final_number` with gold, a number or a text with "####" before it."""
    number = final_number(reply)
    if number is None:
        return Score(0.0, None, "no single final number")
    expected = gold.rpartition("####")[2].strip()
    return Score.of(number == parse_number(expected, unit=True), str(number), f"expected {expected}")


def boxed(text: str) -> list[str]:
    r"""Return the contents of every innermost \boxed{...}, braces matched; unclosed ones are left out."""
    contents: list[str] = []
    opened: list[int | None] = []  # start of the content for each open brace that is an innermost box's
    for match in re.finditer(r"\\f?boxed\s*(?:\{|([0-9A-Za-z]))|[{}]", text):
        if match[0] == "{":
            opened.append(None)
        elif match[0] != "}":
            opened = [None] * len(opened)
            contents += [match[1]] if match[1] else []
            opened += [] if match[1] else [match.end()]
        elif opened and (start := opened.pop()) is not None:
            contents.append(text[start : match.start()])
    return contents


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
    if _HUGE.search(answer):
        return Score(0.0, answer, "an expression too large to evaluate")
    number = parse_number(answer, unit=True)  # reads units and thousands that math-verify does not
    if number is not None and number == parse_number(gold, unit=True):
        return Score(1.0, answer)
    expected, parsed = _parse_latex(gold), _parse_latex(answer)
    if not parsed:
        return Score(0.0, answer, "math-verify reads no expression")
    equal = _math_verify().verify(expected, parsed, timeout_seconds=_time_limit(), raise_on_error=False)
    return Score.of(bool(equal), answer, gold)


def _math_verify() -> Any:
    """Import math-verify, without its warning at every call that time limits are off."""
    math_verify = optional("math_verify", "'sigmix[tasks]'", "comparing LaTeX answers")
    for module in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(module).setLevel(logging.ERROR)
    return math_verify


def _parse_latex(text: str) -> list[Any]:
    return _math_verify().parse(rf"\boxed{{{text}}}", parsing_timeout=_time_limit(), raise_on_error=False)


def _time_limit() -> int | None:
    return 5 if threading.current_thread() is threading.main_thread() else None


def _whole(text: str) -> Fraction | None:
    if len(text) > MAX_DIGITS:
        return None
    text = plain(text).strip().strip("$*_`").removesuffix(".").rstrip("#$*_` ").lstrip("$*_` ")
    text = _TITLE.sub("", _REMARK.sub("", text))
    while match := _RESULT.match(text):
        text = match[1].strip()
    number = parse_number(text, unit=True)
    if number is not None or "\\" not in text or "^" in text or _HUGE.search(text):
        return number
    parsed = _parse_latex(text)
    value: Any = parsed[0] if parsed else None
    return Fraction(int(value.p), int(value.q)) if getattr(value, "is_Rational", False) else None


def _first(text: str) -> Fraction | None:
    while match := _RESULT.match(text):
        text = match[1]
    numbers = numbers_in(text)
    if not numbers or re.match(r"\s*(?:not|isn't|never)\b", text, re.IGNORECASE):
        return None
    if any(pattern.search(text[: numbers[0][1]]) for pattern in (_NEGATED, _BOUND)):
        return None
    if _UNKNOWN.match(text, numbers[0][2]) and not re.match(rf"\s?{_LETTER}", text[numbers[0][2] :]):
        return None
    between = text[numbers[0][2] : numbers[1][1]] if len(numbers) > 1 else ""
    return None if _is_or(between) or _MORE.fullmatch(between) else numbers[0][0]


def _last(text: str) -> Fraction | None:
    numbers = numbers_in(text)
    if not numbers or _NEGATED.search(text[: numbers[-1][1]]):
        return None
    return None if len(numbers) > 1 and _is_or(text[numbers[-2][2] : numbers[-1][1]]) else numbers[-1][0]


def _is_or(between: str) -> bool:
    return re.fullmatch(r"[\s,;(]*(?:\bor\b|/|\|)[\s*$]*(?:maybe|perhaps|possibly)?[\s*$]*", between) is not None


# VQA accuracy, as published: https://visualqa.org/evaluation.html
NUMBERS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}
NUMBERS["none"] = "0"
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"\.(?!\d)")
_THOUSANDS = re.compile(r"\d,\d")
_NOT = "are ca could did does do did had has have is might must need ought should was were wo would ai sha".split()
_SUFFIXES = {
    "d": "he how it she that there they what where who you",
    "ll": "how it that there they what who why you",
    "re": "there they what why you",
    "s": "he how she that there what when where who why somebody someone",
    "ve": "could might must not should they what where who would you",
}
CONTRACTIONS = {f"{stem}nt": f"{stem}n't" for stem in _NOT}
CONTRACTIONS |= {f"{stem}{end}": f"{stem}'{end}" for end, stems in _SUFFIXES.items() for stem in stems.split()}
CONTRACTIONS |= {"weve": "we've", "oclock": "o'clock", "maam": "ma'am", "yall": "y'all", "twas": "'twas"}
for _word in ("shed", "shes"):  # the published table leaves these alone
    CONTRACTIONS.pop(_word, None)


def normalise_vqa(answer: str) -> str:
    """Return an answer as VQA accuracy compares it; "" if nothing is left."""
    text = " ".join(answer.replace("’", "'").split()).lower()
    spaced = {mark for mark in PUNCTUATION if f"{mark} " in text or f" {mark}" in text}
    numbers = bool(_THOUSANDS.search(text))
    for mark in PUNCTUATION:
        # a mark separates words ("black-and-white"), unless one like it stands beside a blank, or digits have commas
        text = text.replace(mark, "" if numbers or mark in spaced else " ")
    text = _FULL_STOP.sub("", text)
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(reply: str, answers: Sequence[str]) -> float:
    """Return the accuracy of a reply in [0, 1] against people's answers (ten as published, at least one)."""
    answer = normalise_vqa(final_part(reply))
    same = sum(normalise_vqa(other) == answer for other in answers)
    if not answer or not same:
        return 0.0
    if len(answers) == 1:
        return 1.0
    # mean over the sets that leave one person out: one of those who agree, or one of the others
    without, with_all = min((same - 1) / 3, 1.0), min(same / 3, 1.0)
    return round((same * without + (len(answers) - same) * with_all) / len(answers), 12)


def most_agreed(answers: Sequence[str]) -> str:
    """Return the most frequent answer, as written; of equally frequent ones the first."""
    counts = Counter(normalise_vqa(answer) for answer in answers)
    most = max((count for key, count in counts.items() if key), default=0)
    return next((answer for answer in answers if counts[normalise_vqa(answer)] == most and normalise_vqa(answer)), "")


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


MAX_LABELS = 200
MAX_LABEL_LENGTH = 60
ROWS_PER_LABEL = 3
MAX_NUMBER_LABELS = 12
"""Distinct numbers that may be labels, such as ratings from 0 to 10; more are quantities."""
EXACT_WORDS = 5
_BINARY = ({"yes", "no"}, {"true", "false"})
_DATES = (
    "%Y-%m-%d", "%Y/%m/%d", "%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%d-%m-%Y", "%m-%d-%Y", "%d/%m/%y", "%m/%d/%y",
    "%B %d, %Y", "%b %d, %Y", "%d %B %Y", "%d %b %Y", "%d-%b-%Y", "%Y-%m", "%B %Y", "%H:%M", "%H:%M:%S", "%I:%M %p",
    "%Y-%m-%d %H:%M", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%M:%S%z",
)  # fmt: skip
_UNSPACED = r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]"  # Thai, Lao, Japanese, Chinese: two characters a word
_WORDS = re.compile(rf"{_UNSPACED}{{1,2}}|(?:(?!{_UNSPACED})\S)+")


@dataclass(frozen=True)
class Inferred:
    """Grader for a list of answers.

    Attributes:
        grader: a name for `grader_of`.
        reason: one sentence.
        labels: of a closed set, sorted, as written.
        near_duplicates: groups of labels that differ only by case, blanks or a final mark, and are graded as equal.
    """

    grader: str
    reason: str
    labels: tuple[str, ...] = ()
    near_duplicates: tuple[tuple[str, ...], ...] = ()


def infer_grader(answers: Sequence[str]) -> Inferred:
    """Choose the grader for a data set's answers; blank ones and drafts (see `final_part`) are left out.

    In this order: JSON objects "fields", other JSON arrays and objects "json"; texts that end in "#### 72" "final";
    dates or times in one form "exact"; a closed set of short labels "label"; numbers "number"; texts of up to five
    words "exact"; others "text". Every answer must fit, so that it is a right reply to itself.

    Raises:
        ConfigError: no answers.
    """
    texts = [text for answer in answers if (text := final_part(answer).strip())]
    if not texts:
        raise ConfigError("there are no answers to choose a grader from", remedy="name the column of answers: --answer")
    counts = Counter(texts)
    misfits: list[str] = []  # kinds that nearly all answers have, and an answer that has not

    def all_are(kind: str, fits: Callable[[str], bool]) -> bool:
        others, rows = "", 0
        for text, count in counts.items():
            if not fits(text):
                others, rows = others or text, rows + count
                if rows > len(texts) // 10:
                    return False
        if others:
            misfits.append(f"{rows} of {len(texts)} are not {kind}, e.g. {_shortened(others)}")
        return not others

    def inferred(grader: str, reason: str, **closed: tuple[Any, ...]) -> Inferred:
        return Inferred(grader, "; ".join([reason, *misfits]), **closed)

    types: set[type] = set()

    def is_json(text: str) -> bool:
        types.add(kind := type(_json_or_none(text)))
        return kind in (dict, list)

    if all_are("JSON arrays or objects", is_json):
        if types == {dict}:
            return inferred("fields", "all answers are JSON objects")
        return inferred("json", "all answers are JSON arrays or objects")
    if all_are('texts that end in "####" and a number', lambda text: "####" in text and _grades_itself("final", text)):
        return inferred("final", 'all answers end in "####" and a number')
    for pattern in _DATES:
        if all(_is_date(text, pattern) for text in counts):
            return inferred("exact", f"all answers are dates or times of the form {pattern}")
    short = all(len(text) <= MAX_LABEL_LENGTH and len(text.splitlines()) == 1 for text in counts)
    few = len(counts) <= MAX_LABELS
    if few and len(counts) > MAX_NUMBER_LABELS:
        few = any(parse_number(text, unit=True) is None for text in counts)
    binary = any({text.casefold() for text in counts} == pair for pair in _BINARY)
    if short and few and (binary or len(texts) >= ROWS_PER_LABEL * len(counts)):
        groups: dict[str, list[str]] = {}
        for label in sorted(counts):
            groups.setdefault("".join(normalise(label).split()), []).append(label)
        same = tuple(tuple(group) for group in groups.values() if len(group) > 1)
        reason = f"a closed set of labels: {len(counts)} distinct in {len(texts)} answers"
        return inferred("label", reason, labels=tuple(sorted(counts)), near_duplicates=same)
    if all_are("numbers", _is_quantity):
        return inferred("number", "all answers are numbers")
    if all(len(_WORDS.findall(text)) <= EXACT_WORDS and len(text) <= MAX_LABEL_LENGTH for text in counts):
        return inferred("exact", f"short answers: up to {EXACT_WORDS} words")
    return inferred("text", f"free text: not all answers are short (up to {EXACT_WORDS} words)")


def _is_quantity(text: str) -> bool:
    if re.fullmatch(r"-?(?:0|[1-9]\d{,17})", text, re.ASCII):
        return True
    # 02139 is a code: as a number it would equal 2139
    return not re.match(r"0\d", text) and _grades_itself("number", text)


def _grades_itself(name: str, text: str) -> bool:
    return GRADERS[name](text, text).value == 1.0


def _json_or_none(text: str) -> Any:
    try:
        return json_value(text)
    except ValueError:
        return None


def _is_date(text: str, pattern: str) -> bool:
    try:
        datetime.strptime(text, pattern)
    except ValueError:
        return False
    return True


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}…")
