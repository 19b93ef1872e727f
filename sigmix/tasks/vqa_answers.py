"""VQA accuracy: how a reply to a question about an image is compared with what ten people answered.

The normalisation is that of the VQA evaluation (https://visualqa.org/evaluation.html) as TextVQA's and OK-VQA's
evaluators apply it, to replies and to people's answers alike: lower case, punctuation, number words up to ten,
articles, contractions (made by rule here, where the evaluation has a table). The accuracy of a reply is the mean, over
the sets of people that leave one out, of min(those of the set who said it / 3, 1). A reply that 1, 2, 3 of ten people
gave gets 0.3, 0.6, 0.9; from 4 on it gets 1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

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
