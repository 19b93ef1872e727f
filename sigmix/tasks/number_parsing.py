"""Numbers in replies: alone, with units, in LaTeX, or at the end of a reasoned reply.

    parse_number    a text that is one number
    final_number    the number that a reasoned reply ends in
    parse_latex     an expression of sympy, by math-verify
"""

from __future__ import annotations

import logging
import re
import threading
import unicodedata
from fractions import Fraction
from typing import Any

from sigmix.tasks.base import final_part
from sigmix.utils.optional import optional

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
HUGE = re.compile(
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


def _whole(text: str) -> Fraction | None:
    if len(text) > MAX_DIGITS:
        return None
    text = plain(text).strip().strip("$*_`").removesuffix(".").rstrip("#$*_` ").lstrip("$*_` ")
    text = _TITLE.sub("", _REMARK.sub("", text))
    while match := _RESULT.match(text):
        text = match[1].strip()
    number = parse_number(text, unit=True)
    if number is not None or "\\" not in text or "^" in text or HUGE.search(text):
        return number
    parsed = parse_latex(text)
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


def math_verify() -> Any:
    """Import math-verify, without its warning at every call that time limits are off."""
    math_verify = optional("math_verify", "'sigmix[tasks]'", "comparing LaTeX answers")
    for module in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(module).setLevel(logging.ERROR)
    return math_verify


def parse_latex(text: str) -> list[Any]:
    return math_verify().parse(rf"\boxed{{{text}}}", parsing_timeout=time_limit(), raise_on_error=False)


def time_limit() -> int | None:
    return 5 if threading.current_thread() is threading.main_thread() else None
