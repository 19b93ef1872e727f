"""Choice of a grader by the answers of a data set."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sigmix.errors import ConfigError
from sigmix.tasks.base import final_part
from sigmix.tasks.graders import GRADERS, json_value, normalise
from sigmix.tasks.number_parsing import parse_number

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
        near_duplicates: groups of labels that differ only by case, blanks, invisible characters or a final mark.
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
            visible = "".join(one for one in normalise(label) if one.isprintable() and not one.isspace())
            groups.setdefault(visible, []).append(label)
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
