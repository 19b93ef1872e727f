"""Questions about images: TextVQA and OK-VQA (section 4 of the paper), and easy-VQA.

Images are in the hub's rows, or in files: field ``image`` of a JSONL row is a path relative to the JSONL's folder. All
questions about an image are in the same split.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from sigmix.tasks.base import Sample, Score, final_part
from sigmix.tasks.benchmarks import BenchmarkTask
from sigmix.tasks.data import Row
from sigmix.tasks.graders import one_of, wrong_candidates
from sigmix.tasks.registry import register
from sigmix.utils.images import Picture, picture

ASK = "Answer the question using a single word or phrase."
FORM_WORDS = 5  # a reply with more words than this and than the longest accepted answer has no answer


class ImageQuestionTask(BenchmarkTask):
    """A question about one image."""

    domain = "vision"
    max_new_tokens = 10
    image_column: ClassVar[str | None] = "image"

    def __init__(self, data_dir: Path | None = None) -> None:
        super().__init__(data_dir)
        self._read: dict[Path, Picture] = {}

    def _make(self, row: Row, question: str, gold: str, **meta: Any) -> Sample:
        shown = self._picture(row)
        # "key" decides the split
        return Sample.make(f"{question.strip()}\n{ASK}", gold, images=[shown], key=shown.digest, **meta)

    def _picture(self, row: Row) -> Picture:
        value = row.get("image", kind=(str, Picture))
        if isinstance(value, Picture):
            return value
        path = Path(row.file).parent / value
        if path not in self._read:
            if not path.is_file():
                raise row.bad(f"there is no image {path}")
            self._read[path] = picture(path)
        return self._read[path]


@register("easy_vqa")
class EasyVQA(ImageQuestionTask):
    """https://github.com/vzhou842/easy-VQA: one coloured shape; thirteen answers. It is not on the hub."""

    description = "Questions about one coloured shape (easy-VQA)."
    license = "MIT"
    files: ClassVar = {"train": "easy_vqa/train.jsonl", "test": "easy_vqa/test.jsonl"}
    answers: ClassVar[tuple[str, ...]] = (
        "circle", "rectangle", "triangle", "black", "blue", "brown", "gray", "green", "red", "teal", "yellow",
        "yes", "no",
    )  # fmt: skip

    def sample(self, row: Row) -> Sample:
        gold = row.get("answer", kind=str).strip().lower()
        if gold not in self.answers:
            raise row.bad(f"the answer {gold!r} is none of {', '.join(self.answers)}")
        return self._make(row, row.get("question", kind=str), gold)

    def score(self, sample: Sample, reply: str) -> Score:
        return one_of(reply, sample.gold, self.answers)

    def wrong_replies(self, sample: Sample) -> list[str]:
        gold = sample.gold
        traps = wrong_candidates(self.answers, gold, f"{gold} {gold}", f"The shape is not {gold}, it is round.")
        return [*super().wrong_replies(sample), *traps]


class AgreementTask(ImageQuestionTask):
    """Questions that ten people answered; `Score.value` is VQA accuracy, so a reply may be partly right.

    If fewer than four agreed, no reply gets full marks, and the gold reply gets the most possible.
    """

    def sample(self, row: Row) -> Sample | None:
        answers = [answer for answer in row.get("answers", kind=list) if isinstance(answer, str)]
        gold = most_agreed(answers)
        if not gold:
            raise row.bad("none of its answers has a word in it")
        return self._make(row, row.get("question", kind=str), gold, answers=answers)

    def score(self, sample: Sample, reply: str) -> Score:
        answers, answer = sample.meta["answers"], normalise_vqa(reply)
        longest = max(FORM_WORDS, *(len(normalise_vqa(one).split()) for one in answers))
        if not answer or len(answer.split()) > longest:
            return Score(0.0, None, "the reply is not a word or a phrase")
        value = vqa_accuracy(reply, answers)
        return Score(value, answer, f"{value:.2g} by {len(answers)} people's answers, most often {sample.gold!r}")

    def gold_value(self, sample: Sample) -> float:
        return vqa_accuracy(sample.gold, sample.meta["answers"])

    def wrong_replies(self, sample: Sample) -> list[str]:
        return [*super().wrong_replies(sample), f"{sample.gold} or something else that is in the image, who knows"]


@register("textvqa")
class TextVQA(AgreementTask):
    """Singh et al. 2019, arXiv:1904.08920. Test is the published validation split: the test split has no answers."""

    description = "Questions that need the text in an image read (TextVQA)."
    license = "CC BY 4.0"
    files: ClassVar = {"train": "textvqa/train.jsonl", "test": "textvqa/validation.jsonl"}
    hub = "lmms-lab/textvqa"
    hub_splits: ClassVar = {"train": "train", "test": "validation"}


@register("okvqa")
class OKVQA(AgreementTask):
    """Marino et al. 2019, arXiv:1906.00067. Only the published validation split (val2014), for measuring."""

    description = "Questions about an image that need outside knowledge (OK-VQA)."
    license = "not verified; the images are COCO's"
    only_test = True
    files: ClassVar = {"test": "okvqa/val2014.jsonl"}
    hub = "lmms-lab/OK-VQA"
    hub_splits: ClassVar = {"test": "val2014"}


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
