"""Labelled rows of a user's files as a task: columns, duplicates, splits and the grader."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from sigmix.errors import ConfigError, DataError
from sigmix.tasks.base import (
    SPLITS,
    Encode,
    Sample,
    Score,
    Split,
    Task,
    check_request,
    content_id,
    hash_split,
    shuffled,
)
from sigmix.tasks.columns import Columns, Labelled
from sigmix.tasks.data import FORMATS, Row, hub_tables, read_rows
from sigmix.tasks.graders import grader_of, normalise
from sigmix.tasks.infer import Inferred, infer_grader
from sigmix.tasks.openai_graders import Grader, make_grader
from sigmix.utils.io import read_json, sha256_file

HUB = "hub:"
MAX_ROWS = 200_000  # distinct prompts that are kept, those with the smallest content hashes
MIN_ROWS = 20
GRADED_ROWS = 3  # on which a grader of the user's own is tried
FREE_TOKENS = 64  # minimum budget of an answer that such a grader scores: it need not look like the gold one
TEMPLATE_TOKENS = 256  # room for a chat template and its system turn
SHARES = (0.7, 0.15, 0.15)
SURROGATE = re.compile("[\ud800-\udfff]")
LAX = ("text", "final")  # graders that accept more than the answer alone: similar texts, a text before the number
FILES: Mapping[str, Split] = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "eval": "validation", "test": "test",
}  # fmt: skip


@dataclass
class Entry:
    """A distinct prompt: its first row, the splits that have it, and its answers with their frequencies."""

    id: str
    row: Labelled
    splits: set[Split | None] = field(default_factory=set)
    answers: Counter[str] = field(default_factory=Counter)

    @property
    def key(self) -> str:
        """Key of `hash_split`: the same for prompts that differ in case or blanks alone."""
        turns = [*(turn["content"] for turn in self.row.history), self.row.prompt]
        return "\x1f".join(" ".join(text.casefold().split()) for text in turns)


@dataclass
class ReadCounts:
    """Counts of rows that were read.

    Attributes:
        rows, invalid, excluded, repeats, capped: rows read, skipped as invalid, of weight 0, equal to an earlier one,
            and beyond `MAX_ROWS`.
        first_invalid: reason of the first one. leaks: number of prompts in two splits; they stay in the first one.
    """

    rows: int = 0
    invalid: int = 0
    excluded: int = 0
    repeats: int = 0
    capped: int = 0
    leaks: Counter[str] = field(default_factory=Counter)
    first_invalid: str = ""


def _option(help: str, default: Any = None, option: str | None = None) -> Any:
    """Return a dataclass field with the help text and the flag of its command-line option."""
    return field(default=default, metadata={"help": help, **({"option": option} if option else {})})


@dataclass(frozen=True)
class DataConfig:
    """Data of a user and how to read them. The options of the command line are generated from the fields."""

    data: str | None = _option(
        "Your data: a JSONL, JSON, CSV, TSV or Parquet file, a folder with train.*, validation.* and test.*, or "
        "hub:USER/SET."
    )
    prompt_column: str | None = _option("Column of the prompt. Default: by its name.", option="--prompt")
    answer_column: str | None = _option("Column of the answer. Default: by its name.", option="--answer")
    template: str | None = _option("Text of the prompt with {COLUMN}s, in place of --prompt.")
    label_names: str | None = _option("Names of numeric labels, from 0 on, separated by commas.")
    system: str | None = _option("System turn of rows that have none of their own.")
    grader: str | None = _option(
        "Grader of the replies: a name (label, exact, number, fields, text, …), or a JSON file with an OpenAI grader. "
        "Default: by the answers."
    )
    skip_invalid: bool = _option("Leave out rows that cannot be read.", False)
    description: str | None = _option("One sentence about the task, for people and for strategy A.")

    def task(self, allow_code: bool = False) -> DataTask:
        """Return the task."""
        assert self.data is not None
        return DataTask(self.data, allow_code=allow_code, **self.task_options())

    def task_options(self) -> dict[str, Any]:
        """Return the arguments of `DataTask` that differ from their defaults."""
        options = {
            one.name: getattr(self, one.name)
            for one in fields(self)
            if one.name != "data" and getattr(self, one.name) != one.default
        }
        if self.label_names is not None:
            options["label_names"] = [name.strip() for name in self.label_names.split(",")]
        if self.grader is not None and self.grader.endswith(".json"):
            options["grader"] = read_json(Path(self.grader), ConfigError, "give a JSON object such as OpenAI's")
        return options


class DataTask(Task):
    """A user's file, folder of files (``train.*``, ``validation.*``, ``test.*``) or ``hub:user/set`` as a task.

    Equal prompts are one item, and any of their answers is right. Splits that the source lacks are made by content
    hash, so that prompts that differ in case or blanks alone stay in one split.

    Args:
        source: path, or "hub:" and an id.
        prompt_column, answer_column, template, label_names: see `Columns.detect`.
        system: system turn of rows that have none of their own.
        grader: a name of `GRADERS`, "label", or an OpenAI grader object; default: inferred from the answers.
        skip_invalid: leave out invalid rows, and count them, in place of an error.
        description: of the task, for people and for strategy A.
        allow_code: allow python graders to run.

    Raises:
        DataError: see `read_rows` and `Columns.read`; too few rows, or one answer only. ConfigError: an invalid option.
    """

    domain = "data"

    def __init__(
        self,
        source: str,
        prompt_column: str | None = None,
        answer_column: str | None = None,
        template: str | None = None,
        label_names: Sequence[str] = (),
        system: str | None = None,
        grader: str | Mapping[str, Any] | None = None,
        skip_invalid: bool = False,
        description: str | None = None,
        allow_code: bool = False,
    ) -> None:
        super().__init__()
        self.source, self.system, self.skip_invalid = source, system, skip_invalid
        self._given: dict[str, Any] = {
            "prompt": prompt_column, "answer": answer_column, "template": template, "label_names": label_names
        }  # fmt: skip
        self.description = description or f"Requests as in {Path(source).name}."
        self.grader: Grader | None = None
        self._grader_name: str | None = None
        if isinstance(grader, Mapping):
            self.grader, self._grader_name = make_grader(grader, allow_code=allow_code), str(grader["type"])
            self.costly = "python" in json.dumps(grader)  # a program runs for each batch of replies
        elif grader is not None:
            grader_of(grader)
            self._grader_name = grader
        self.counts = ReadCounts()
        self.columns: Columns | None = None

    @property
    def reference(self) -> str:
        """Name without the folder, for cards that others read."""
        return f"data:{self.source if self.source.startswith(HUB) else Path(self.source).name}"

    # ------------------------------------------------------------------ reading

    def conversations(self, answers: bool = True) -> Iterator[tuple[Split | None, Labelled]]:
        """Yield (split, row) in the order of the files; None: of a file without a split.

        Args:
            answers: every row needs an answer.
        """
        for split, rows in self._sources():
            columns: Columns | None = None
            for row in rows:
                if columns is None:
                    columns = Columns.detect(row, **self._given, needs_answer=answers)
                    self.columns = self.columns or columns
                self.counts.rows += 1
                try:
                    labelled = columns.read(row)
                    if answers and labelled is not None and not labelled.answer:
                        raise row.bad(f"the conversation in {columns.prompt!r} does not end with the assistant")
                    if labelled is not None and (odd := SURROGATE.search(labelled.text)):
                        raise row.bad(f"{odd[0]!a} is half of a character, not valid Unicode")
                except DataError as error:
                    if not self.skip_invalid:
                        raise
                    self.counts.invalid += 1
                    self.counts.first_invalid = self.counts.first_invalid or str(error)
                    continue
                if labelled is None:
                    self.counts.excluded += 1
                else:
                    yield split, replace(labelled, system=labelled.system or self.system)

    def _sources(self) -> Iterator[tuple[Split | None, Iterable[Row]]]:
        if self.source.startswith(HUB):
            for split, rows in hub_tables(self.source.removeprefix(HUB)):
                if split in FILES:
                    yield FILES[split], rows
            return
        path = Path(self.source).expanduser()
        if not path.is_dir():
            yield None, read_rows(path)
            return
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in FORMATS)
        splits: dict[Split, Path] = {}
        for file in files:
            split = FILES.get(file.stem.casefold())
            if split in splits:
                raise DataError(f"{path}: {splits[split].name} and {file.name} are both {split}", remedy="remove one")
            if split is not None:
                splits[split] = file
        if "train" not in splits:
            there = ", ".join(file.name for file in files) or "no data files"
            raise DataError(
                f"{path} has no train file ({there})", remedy="name it train.csv, train.jsonl or train.parquet"
            )
        for split in SPLITS:
            if split in splits:
                yield split, read_rows(splits[split])

    @functools.cached_property
    def entries(self) -> list[Entry]:
        """Distinct prompts with their answers, in the order of their content hashes."""
        entries: dict[str, Entry] = {}
        largest: str | None = None  # hash of the last prompt that is kept
        for split, row in self.conversations(self.grader is None):
            name = content_id(row.prompt, row.system, history=row.history)
            if largest is not None and name > largest:
                self.counts.capped += 1
                continue
            entry = entries.setdefault(name, Entry(name, row))
            self.counts.repeats += split in entry.splits and row.answer in entry.answers
            entry.splits.add(split)
            entry.answers[row.answer] += 1
            if len(entries) > MAX_ROWS + MAX_ROWS // 8:
                largest = self._cap(entries)
        self._cap(entries)
        return [entries[name] for name in sorted(entries)]

    def _cap(self, entries: dict[str, Entry]) -> str:
        """Keep the prompts with the smallest hashes, a sample that does not depend on the order of the rows."""
        names = sorted(entries)
        for name in names[MAX_ROWS:]:
            self.counts.capped += entries.pop(name).answers.total()
        return max(entries, default="")

    @functools.cached_property
    def tables(self) -> dict[Split, list[Sample]]:
        """Split to samples, in the order of their content hashes.

        Raises:
            DataError: too few rows, an empty split, or a single answer.
        """
        tables = self._divided
        empty = [split for split in SPLITS if not tables[split]]
        if len(self.entries) < MIN_ROWS or empty:
            lacks = f"none for {' or '.join(empty)}" if len(self.entries) >= MIN_ROWS else f"training needs {MIN_ROWS}"
            raise DataError(
                f"{self.source} has {len(self.entries)} distinct prompts; {lacks}",
                remedy="add rows; with a few examples only, search a mixture: sigmix adapt --data FILE",
            )
        answers = {answer for entry in self.entries for answer in entry.answers}
        if self.grader is None and len(answers) == 1:
            raise DataError(
                f"{self.source}: all answers are {min(answers)[:60]!r}, so there is nothing to learn",
                remedy="add rows with other answers",
            )
        if self.grader is not None:
            self._check_grader(self.grader)
        return dict(tables)

    def _check_grader(self, grader: Grader) -> None:
        """Raise `DataError` if a grader fails on the gold replies (empty ones without answers) of all first rows."""
        entries = self.entries[:GRADED_ROWS]
        items = [entry.row.item for entry in entries]
        grades = grader.grade_all([next(iter(entry.answers)) for entry in entries], items)
        if all(grade.value is None for grade in grades):
            raise DataError(
                f"{entries[0].row.where}: the grader gives no score: {grades[0].explanation}",
                remedy="fix the grader, or the fields of the rows that it uses",
            )

    @functools.cached_property
    def _divided(self) -> dict[Split, list[Sample]]:
        given = {split for entry in self.entries for split in entry.splits if split}
        tables: dict[Split, list[Sample]] = {split: [] for split in SPLITS}
        for entry in self.entries:
            tables[self._split(entry, given)].append(self.sample(entry))
        return tables

    def _split(self, entry: Entry, given: set[Split]) -> Split:
        if not given:
            return hash_split(entry.key, SHARES)
        split = next(one for one in reversed(SPLITS) if one in entry.splits)  # what is measured on stays whole
        for other in entry.splits - {split}:
            self.counts.leaks[f"{split} and {other}"] += 1
        if split != "train":
            return split
        shares = [0.0 if one in given else share for one, share in zip(SPLITS, SHARES, strict=True)]
        return hash_split(entry.key, (1 - sum(shares), shares[1], shares[2]))

    def sample(self, entry: Entry) -> Sample:
        """Return an entry as a sample; the most frequent of its answers is gold."""
        row, answers = entry.row, [answer for answer, _ in entry.answers.most_common()]
        meta = {"answers": tuple(answers), "where": row.where, **({"item": dict(row.item)} if self.grader else {})}
        return Sample(entry.id, row.prompt, answers[0], row.system, meta, history=row.history)

    def few_shot(self, shots: int, seed: int = 0) -> DataTask:
        """Return the task with ``shots`` rows for training and for validation, and the test rows or else all others.

        Raises:
            DataError: no row is left to measure on.
        """
        rows = shuffled([self.sample(entry) for entry in self.entries if "test" not in entry.splits], "few", seed)
        test = [self.sample(entry) for entry in self.entries if "test" in entry.splits] or rows[shots:]
        if not test or not rows:
            raise DataError(
                f"{self.source} has {len(self.entries)} distinct prompts, so none is left beside {shots} to measure on",
                remedy="add rows, or give fewer --shots",
            )
        task = copy.copy(self)
        task.tables = {"train": rows[:shots], "validation": rows[:shots], "test": test}
        return task

    # ------------------------------------------------------------------ the task

    def samples(self, split: Split, n: int | None = None, seed: int = 0) -> list[Sample]:
        check_request(self, split, n)
        return shuffled(self.tables[split], split, seed)[:n]

    @functools.cached_property
    def inferred(self) -> Inferred:
        """Grader that all answers suggest, or the one that was given.

        Raises:
            DataError: an answer that the given grader cannot read.
        """
        if self.grader is not None:
            return Inferred(str(self._grader_name), "given", ())
        answers = list(itertools.chain.from_iterable(entry.answers.elements() for entry in self.entries))
        inferred = infer_grader(answers)
        if self._grader_name is None or self._grader_name == inferred.grader:
            return inferred
        labels = tuple(sorted(set(answers))) if self._grader_name == "label" else ()
        grade = grader_of(self._grader_name, labels)

        def check(answer: str, where: str) -> None:
            Row({}, where).check_gold(answer, lambda reply: grade(reply, answer))

        for entry in self.entries:
            for answer in entry.answers:
                check(answer, entry.row.where)
        return Inferred(self._grader_name, "given", labels)

    def score_all(self, samples: Sequence[Sample], replies: Sequence[str]) -> list[Score]:
        if self.grader is None:
            return super().score_all(samples, replies)
        return list(self.grader.grade_all(replies, [sample.meta["item"] for sample in samples]))

    def score(self, sample: Sample, reply: str) -> Score:
        if self.grader is not None:
            return self.grader.grade(reply, sample.meta["item"])
        grade = grader_of(self.inferred.grader, self.inferred.labels)
        scores = [grade(reply, answer) for answer in sample.meta["answers"]]
        return max(scores, key=lambda score: -1.0 if score.value is None else score.value)

    def gold_value(self, sample: Sample) -> float:
        """Return the score of the gold answer, which a grader of the user's own decides."""
        return 1.0 if self.grader is None else self.score(sample, sample.gold).value or 0.0

    def wrong_replies(self, sample: Sample) -> list[str]:
        if self.grader is not None or self.inferred.grader in LAX:
            return []
        right = {normalise(answer) for answer in sample.meta["answers"]}
        others = [label for label in self.inferred.labels if normalise(label) not in right][:3]
        lists = [f"{sample.gold} or {other}" for other in others] + [", ".join([sample.gold, *others])] * bool(others)
        return [*super().wrong_replies(sample), *others, *lists]

    def prepare(self, tokenizer: Any, encode: Encode, context: int | None) -> None:
        """Set the budget of an answer to the longest one, and leave out prompts that do not fit into the context."""
        least = FREE_TOKENS if self.grader is not None else 1
        self.max_new_tokens, over = measure(self.entries, tokenizer, encode, context, least)
        for split, samples in self.tables.items():
            self.tables[split] = [one for one in samples if one.id not in over]
            if count := len(samples) - len(self.tables[split]):
                self.notes.append(f"{count} rows of {split} are longer than the context of {context} tokens")

    def check_budget(self, tokenizer: Any, max_new_tokens: int) -> None:
        """Raise `DataError` for an answer that is longer than a budget of tokens."""
        for entry in self.entries:
            for answer in entry.answers:
                if (tokens := len(tokenizer(answer)["input_ids"]) + 1) > max_new_tokens:
                    raise DataError(
                        f"{entry.row.where}: the answer takes {tokens} tokens, more than the {max_new_tokens} allowed",
                        remedy=f"leave --max-new-tokens out, or give at least {tokens}",
                    )

    def summary(
        self, tokenizer: Any = None, encode: Encode | None = None, context: int | None = None
    ) -> dict[str, Any]:
        """Return what was read as JSON values: columns, counts, splits, lengths, labels and problems.

        Args:
            tokenizer, encode, context: of a base model, for lengths in tokens; see `Task.prepare`.
        """
        tables, counts, inferred = self._divided, self.counts, self.inferred
        conflicts = [entry for entry in self.entries if len(entry.answers) > 1]
        figures: dict[str, Any] = {
            "source": self.source, "columns": self.columns.describe() if self.columns else "", "rows": counts.rows,
            "prompts": len(self.entries), "splits": {split: len(samples) for split, samples in tables.items()},
            "given_splits": sorted({split for entry in self.entries for split in entry.splits if split}),
            "answer_column": self.columns.answer if self.columns else None,
            "grader": inferred.grader, "reason": inferred.reason,
            "repeats": counts.repeats, "conflicts": len(conflicts), "leaks": dict(counts.leaks),
            "beyond": counts.capped, "skipped": counts.invalid, "first_skipped": counts.first_invalid or None,
            "weight_0": counts.excluded,
            "prompt_characters": spread([len(entry.row.prompt) for entry in self.entries]),
            "answer_characters": spread([len(answer) for entry in self.entries for answer in entry.answers]),
            "conflict_examples": [
                {"where": entry.row.where, "prompt": entry.row.prompt[:200], "answers": list(entry.answers)[:4]}
                for entry in conflicts[:3]
            ],
            "cannot_train": self._problem(),
            "labels": None, "near_duplicate_labels": [list(pair) for pair in inferred.near_duplicates],
            "examples": [
                {"prompt": one.prompt, "answer": one.gold, "system": one.system, "turns": len(one.history) + 1}
                for one in (tables["train"] or tables["test"] or tables["validation"])[:2]
            ],
        }  # fmt: skip
        if inferred.grader == "label":
            labels = Counter(one.gold for samples in tables.values() for one in samples)
            trained = {one.gold for one in tables["train"]}
            figures["labels"] = {
                label: {"n": count, "share": count / len(self.entries)} for label, count in labels.most_common()
            }
            figures["untrained_labels"] = sorted(set(labels) - trained)
        if tokenizer is not None and encode is not None:
            budget, over = measure(self.entries, tokenizer, encode, context)
            figures |= {"answer_tokens": budget, "over_context": len(over), "context": context}
        return figures

    def _problem(self) -> str | None:
        try:
            assert self.tables
        except DataError as error:
            return error.message
        return None

    @property
    def facts(self) -> Mapping[str, Any]:  # type: ignore[override]
        """Source and grader, for the expert's record."""
        path = Path(self.source).expanduser()
        digest = {"sha256": sha256_file(path)} if path.is_file() else {}
        grader = self._grader_name or self.inferred.grader
        return {"data": {"source": self.reference, **digest, "rows": self.counts.rows, "grader": grader}}


def measure(
    entries: Sequence[Entry], tokenizer: Any, encode: Encode, context: int | None, least: int = 1
) -> tuple[int, set[str]]:
    """Return the tokens of the longest answer with its end, and the ids of prompts that leave no room for it.

    Args:
        least: minimum of the tokens.
    """
    answers = list(dict.fromkeys(answer for entry in entries for answer in entry.answers))
    budget = max(least, 1 + max(len(ids) for ids in tokenizer(answers, add_special_tokens=False)["input_ids"]))
    if context is None:
        return budget, set()
    room = context - budget - TEMPLATE_TOKENS  # a token has at least one byte, so that few prompts are encoded here
    rows = {entry.id: entry.row for entry in entries if len(entry.key.encode("utf-8", "surrogatepass")) > room}
    return budget, {name for name, row in rows.items() if len(encode(row.turns, row.system)) + budget > context}


def spread(values: Sequence[int]) -> dict[str, int]:
    """Return the median, the 95th percentile and the maximum."""
    ordered = sorted(values)
    return {
        "median": ordered[len(ordered) // 2], "p95": ordered[min(int(0.95 * len(ordered)), len(ordered) - 1)],
        "max": ordered[-1],
    }  # fmt: skip
