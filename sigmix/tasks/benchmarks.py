"""Published data sets as tasks: GSM8K, SVAMP, MATH, ARC, OpenBookQA, BoolQ; local files or the Hugging Face hub.

A sample that is in two splits stays in the one that is measured on (test before validation before train), and `notes`
counts what was dropped. Content means the prompt as shown: near duplicates (SVAMP's variations of one story) are not
found.
"""

from __future__ import annotations

import functools
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

from sigmix.errors import ConfigError, DataError
from sigmix.tasks.base import Sample, Score, Split, Task, check_request, content_id, hash_split, shuffled
from sigmix.tasks.data import Row, hub_rows, read_rows
from sigmix.tasks.graders import (
    math_equal,
    relabel,
    score_choice,
    score_final,
    score_yes_no,
    strict_number,
    wrong_candidates,
)
from sigmix.tasks.number_parsing import boxed, number_text, parse_number
from sigmix.tasks.registry import register

PRIORITY = ("test", "validation", "train")
SAME_NAMES = {"train": "train", "validation": "validation", "test": "test"}
# Qwen's own instruction; chosen on validation items, see reproduction/tables/prompts.md
REASON = r"Please reason step by step, and put your final answer within \boxed{}."
ONLY = "Answer with the number only."


class BenchmarkTask(Task):
    """A published data set. Subclasses set the class attributes and implement `sample`.

    Attributes:
        files: split to path below the data folder. A missing split is made from "train" by content hash.
        hub: id of the data set on the hub.
        hub_configs: its configurations, concatenated.
        hub_splits: split to the hub's name for it.
        image_column: name of the image column, if any; see `hub_rows`.
        only_test: there is no training data.

    `notes` is complete after the first call of `samples`.
    """

    files: ClassVar[Mapping[str, str]] = {}
    hub: ClassVar[str] = ""
    hub_configs: ClassVar[Sequence[str | None]] = (None,)
    hub_splits: ClassVar[Mapping[str, str]] = {"train": "train", "test": "test"}
    image_column: ClassVar[str | None] = None
    only_test: ClassVar[bool] = False

    def __init__(self, data_dir: Path | None = None) -> None:
        super().__init__()
        self.data_dir = data_dir

    @abstractmethod
    def sample(self, row: Row) -> Sample | None:
        """Convert a row to a sample; None leaves it out (give the reason in the class's docstring)."""

    def splits(self) -> tuple[Split, ...]:
        return ("test",) if self.only_test else super().splits()

    def samples(self, split: Split, n: int | None = None, seed: int = 0) -> list[Sample]:
        check_request(self, split, n)
        return shuffled(self.tables[split], self.name, split, seed)[:n]

    @functools.cached_property
    def tables(self) -> dict[str, list[Sample]]:
        """Split to samples in the file's order, checked and without shared content."""
        rows = self._rows()
        tables = self.divide({split: [s for row in part if (s := self._checked(row))] for split, part in rows.items()})
        seen: dict[str, str] = {}
        for split in (name for name in PRIORITY if name in tables):
            kept = []
            repeats: Counter[str] = Counter()
            for sample in tables[split]:
                if sample.id in seen:
                    repeats[seen[sample.id]] += 1
                if sample.id not in seen or split == "test":  # a test set stays as published, with its repeats
                    kept.append(sample)
                seen.setdefault(sample.id, split)
            tables[split] = kept
            for other, count in repeats.items():
                again = "repeats within it" if other == split else f"also in {other}"
                done = "kept in" if split == "test" else "dropped from"
                self.notes.append(f"{count} samples {done} {split}: {again}")
            if not kept:
                raise DataError(f"task {self.name}: split {split!r} is empty")
        return tables

    def _checked(self, row: Row) -> Sample | None:
        sample = self.sample(row)
        if sample is not None and not self.costly:
            for reply in dict.fromkeys((sample.gold, sample.target)):
                row.check_gold(reply, functools.partial(self.score, sample), self.gold_value(sample))
        return sample

    def divide(self, tables: dict[str, list[Sample]]) -> dict[str, list[Sample]]:
        """Create the splits that the source lacks, by content hash; override for a benchmark's own rule."""
        if self.only_test:
            return tables
        if set(tables) == {"all"}:
            note = "the source has one split only: 60 % train, 20 % validation, 20 % test by content hash"
            return self._by_hash(tables["all"], (0.6, 0.2, 0.2), note)
        if "validation" not in tables:
            # only train is divided, so samples shared with test are still seen, and dropped, afterwards
            note = "no official validation split: 10 % of train by content hash"
            tables = {**self._by_hash(tables["train"], (0.9, 0.1, 0.0), note), "test": tables["test"]}
        return tables

    def _by_hash(self, samples: list[Sample], shares: tuple[float, float, float], note: str) -> dict[str, list[Sample]]:
        self.notes.append(note)
        tables: dict[str, list[Sample]] = {"train": [], "validation": [], "test": []}
        for sample in samples:
            # "key" hashes the question without its instruction: another style must not move it to another split
            tables[hash_split(sample.meta.get("key", sample.id), shares)].append(sample)
        return tables

    def _rows(self) -> dict[str, list[Row]]:
        paths = ", ".join(dict.fromkeys(self.files.values()))
        remedy = f"put {paths} into a folder (one JSON object a line) and give it with --data-dir"
        if self.data_dir is None:
            if not self.hub:
                raise DataError(f"task {self.name} is not on the hub", remedy=remedy)
            return {
                split: hub_rows(self.hub, self.hub_configs, theirs, remedy, self.image_column)
                for split, theirs in self.hub_splits.items()
            }
        files = self.local_files(self.data_dir)
        missing = [str(path) for path in files.values() if not path.is_file()]
        if missing:
            there = sorted(path.name for path in self.data_dir.iterdir())[:20] if self.data_dir.is_dir() else []
            raise DataError(
                f"{self.name or self.hub}: {', '.join(missing)} not found; {self.data_dir} has "
                f"{', '.join(there) or 'nothing'}",
                remedy=f"{remedy}, or leave it out to use {self.hub}" if self.hub else remedy,
            )
        return {split: list(read_rows(path)) for split, path in files.items()}

    def local_files(self, folder: Path) -> dict[str, Path]:
        """Return the file of each split; override if the layout depends on what is there."""
        return {split: folder / name for split, name in self.files.items()}


class WordProblemTask(BenchmarkTask):
    """Word problems with a number for an answer.

    Args:
        data_dir: local data, or None for the hub.
        style: "final" lets the model reason and grades the final number; "strict" requires the number alone.
    """

    domain = "arithmetic"

    def __init__(self, data_dir: Path | None = None, style: str = "final") -> None:
        super().__init__(data_dir)
        if style not in ("final", "strict"):
            raise ConfigError(f"option style must be final or strict, not {style!r}")
        self.strict = style == "strict"
        self.max_new_tokens = 12 if self.strict else 400

    def _make(self, row: Row, question: str, answer: str, **meta: Any) -> Sample:
        value = parse_number(answer, unit=True)
        if value is None:
            raise row.bad(f"the answer {answer!r} is not a number")
        return Sample.make(
            f"{question.strip()}\n{ONLY if self.strict else REASON}", number_text(value), key=content_id(question),
            **meta,
        )  # fmt: skip

    def score(self, sample: Sample, reply: str) -> Score:
        return strict_number(reply, sample.gold) if self.strict else score_final(reply, sample.gold)

    def wrong_replies(self, sample: Sample) -> list[str]:
        value = Fraction(sample.gold)
        gold, other = sample.gold, number_text(value + 1)
        return [
            *super().wrong_replies(sample), other, f"{gold}\n#### {other}", f"#### {gold}\n#### {other}",
            f"The answer is {other}, not {gold}.", f"{other} or {gold}", f"{gold} or {other}",
            f"The answer is {other} or {gold}.", f"The answer is not {gold}.", f"It cannot be {gold}; it is {other}.",
            rf"\boxed{{{other}}} and then \boxed{{{gold}}}", f"{gold}7", number_text(-abs(value) - 1),
        ]  # fmt: skip


@register("gsm8k")
class GSM8K(WordProblemTask):
    """Cobbe et al. 2021, arXiv:2110.14168. Targets are the worked solutions, without the calculator's annotations."""

    description = "Grade-school word problems (GSM8K)."
    license = "MIT"
    files: ClassVar = {"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"}
    hub, hub_configs = "openai/gsm8k", ("main",)

    def sample(self, row: Row) -> Sample:
        solution, mark, answer = row.get("answer", kind=str).rpartition("####")
        if not mark:
            raise row.bad("the answer has no ####")
        made = self._make(row, row.get("question", kind=str), answer.strip())
        if self.strict:
            return made
        target = f"{re.sub('<<.*?>>', '', solution).strip()}\nThe final answer is \\boxed{{{made.gold}}}."
        return replace(made, meta={**made.meta, "target": target})


@register("svamp")
class SVAMP(WordProblemTask):
    """Patel et al. 2021, arXiv:2103.07191. Its local file has no splits; many of its stories vary one another."""

    description = "Short word problems with one operation, made to defeat shallow reading (SVAMP)."
    license = "MIT"
    files: ClassVar = {"all": "svamp/SVAMP.jsonl"}
    hub = "ChilleD/SVAMP"

    def sample(self, row: Row) -> Sample:
        body = row.get("Body", kind=str).strip()
        answer = str(row.get("Answer", kind=(int, float, str))).removesuffix(".0")
        return self._make(row, f"{body}{'' if body[-1] in '.?!,' else '.'} {row.get('Question', kind=str)}", answer)


@register("math")
class Math(BenchmarkTask):
    """Hendrycks et al. 2021, arXiv:2103.03874. Answers are compared by math-verify."""

    domain = "math"
    description = "Competition mathematics (MATH)."
    license = "MIT"
    max_new_tokens = 512
    files: ClassVar = {"train": "math/train.jsonl", "test": "math/test.jsonl"}
    hub = "EleutherAI/hendrycks_math"
    hub_configs = (
        "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
        "precalculus",
    )  # fmt: skip

    def sample(self, row: Row) -> Sample:
        solution = row.get("solution", kind=str)
        answers = boxed(solution)
        if not answers or not answers[-1].strip():
            raise row.bad("the solution has no \\boxed answer")
        prompt = f"{row.get('problem', kind=str).strip()}\nThink step by step. Put the final answer in \\boxed{{}}."
        return Sample.make(prompt, rf"\boxed{{{answers[-1].strip()}}}", answer=answers[-1].strip(), target=solution)

    def score(self, sample: Sample, reply: str) -> Score:
        return math_equal(reply, sample.meta["answer"])

    def wrong_replies(self, sample: Sample) -> list[str]:
        other = r"\boxed{-98765.4321}"
        answer = sample.meta["answer"]
        # no "It is not \boxed{...}" here: a boxed answer counts, whatever stands around it
        return [
            sample.prompt, f"It is not {answer}, or is it?", other, f"{sample.gold} or {other}",
            f"{answer} but {other}", r"\boxed{}", rf"\boxed{{{answer}",
        ]  # fmt: skip


class ChoiceTask(BenchmarkTask):
    """A question with labelled choices; the prompt shows letters, also for data with labels 1 to 4."""

    max_new_tokens = 8
    domain = "knowledge"

    def sample(self, row: Row) -> Sample:
        stem, labels, texts = self._parts(row)
        try:
            shown = relabel(labels)
        except ValueError as error:
            raise row.bad(str(error)) from error
        key = str(row.get("answerKey", kind=(str, int))).strip()
        if key not in shown:
            raise row.bad(f"answerKey {key!r} is none of the labels {', '.join(labels)}")
        choices = {shown[label]: text for label, text in zip(labels, texts, strict=True)}
        lines = "\n".join(f"{label}. {text}" for label, text in choices.items())
        return Sample.make(f"{stem}\n{lines}\nAnswer with the letter only.", shown[key], choices=choices)

    def _parts(self, row: Row) -> tuple[str, list[str], list[str]]:
        question = row.get("question", "question_stem", kind=(dict, str))
        if isinstance(question, dict):  # the publishers' own files
            inner = Row(question, row.where)
            pairs = [Row(choice, row.where) for choice in inner.get("choices", kind=list)]
            labels, texts = ([str(pair.get(field)) for pair in pairs] for field in ("label", "text"))
            return inner.get("stem", kind=str), labels, texts
        choices = Row(row.get("choices", kind=dict), row.where)  # the hub's layout
        labels, texts = choices.get("label", kind=list), choices.get("text", kind=list)
        if len(labels) != len(texts):
            raise row.bad(f"{len(labels)} labels for {len(texts)} choices")
        return row.get("question_stem", "question", kind=str), [str(label) for label in labels], [str(t) for t in texts]

    def score(self, sample: Sample, reply: str) -> Score:
        return score_choice(reply, sample.gold, sample.meta["choices"])

    def wrong_replies(self, sample: Sample) -> list[str]:
        gold, labels = sample.gold, list(sample.meta["choices"])
        other = next(label for label in reversed(labels) if label != gold)
        traps = wrong_candidates(
            labels, gold, "".join(labels), gold + other, f"({gold}) ({other})", f"Both {gold} and {other}",
            f"The answer is {other}, because {gold} is wrong.",
        )  # fmt: skip
        return [*super().wrong_replies(sample), *traps]


def _arc(level: str) -> type[ChoiceTask]:
    class ARC(ChoiceTask):
        """Clark et al. 2018, arXiv:1803.05457."""

        description = f"Grade-school science questions with choices (ARC-{level})."
        license = "CC BY-SA 4.0"
        files: ClassVar = {
            "train": f"arc/ARC-{level}-Train.jsonl",
            "validation": f"arc/ARC-{level}-Dev.jsonl",
            "test": f"arc/ARC-{level}-Test.jsonl",
        }
        hub, hub_configs = "allenai/ai2_arc", (f"ARC-{level}",)
        hub_splits: ClassVar = SAME_NAMES

    return ARC


register("arc-easy")(_arc("Easy"))
register("arc-challenge")(_arc("Challenge"))


@register("openbookqa")
class OpenBookQA(ChoiceTask):
    """Mihaylov et al. 2018, arXiv:1809.02789, without the book: the question and its choices alone."""

    description = "Elementary science questions that need common knowledge (OpenBookQA)."
    license = "Apache-2.0 as commonly stated"
    files: ClassVar = {
        "train": "openbookqa/train.jsonl",
        "validation": "openbookqa/dev.jsonl",
        "test": "openbookqa/test.jsonl",
    }
    hub, hub_configs = "allenai/openbookqa", ("main",)
    hub_splits: ClassVar = SAME_NAMES


@register("boolq")
class BoolQ(BenchmarkTask):
    """Clark et al. 2019, arXiv:1905.10044. The published validation set is the test split; its own test has no labels.

    A local folder with only boolq/val.jsonl is cut in three by content hash.
    """

    domain = "reading"
    description = "Yes/no questions about a passage (BoolQ)."
    license = "CC BY-SA 3.0"
    max_new_tokens = 4
    files: ClassVar = {"train": "boolq/train.jsonl", "test": "boolq/val.jsonl"}
    hub = "google/boolq"
    hub_splits: ClassVar = {"train": "train", "test": "validation"}

    def local_files(self, folder: Path) -> dict[str, Path]:
        files = super().local_files(folder)
        return files if files["train"].is_file() else {"all": files["test"]}

    def sample(self, row: Row) -> Sample:
        label = row.get("label", "answer", kind=(str, bool, int))
        if str(label).lower() not in ("true", "false", "0", "1"):
            raise row.bad(f"the label {label!r} is not true or false")
        question = row.get("question", kind=str).strip().rstrip("?")
        gold = "yes" if str(label).lower() in ("true", "1") else "no"
        return Sample.make(f"{row.get('passage', kind=str)}\n\nQuestion: {question}?\nAnswer yes or no.", gold)

    def score(self, sample: Sample, reply: str) -> Score:
        return score_yes_no(reply, sample.gold)

    def wrong_replies(self, sample: Sample) -> list[str]:
        gold = sample.gold
        traps = wrong_candidates(("yes", "no"), gold, "yes/no", f"{gold}{gold}", "true", "false")
        return [*super().wrong_replies(sample), *traps]
