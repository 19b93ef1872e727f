"""Dispatch: choose the label of a request. Requests by label, statistics for D, the task of B's expert, and matrices.

The requests of a label are the prompts of the task that its expert was trained on, from the given split. "Other" has
everyday requests and prompts of tasks that the bank has no expert for. Some of those tasks are left out of training and
appear in the test only (`UNSEEN`), since "other" is open-ended.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sigmix.adapt.base import DISPATCH, OTHER, Label, Strategy, labels, skills
from sigmix.adapt.prompt import question
from sigmix.adapt.router import TRAIN_LIMIT, VALIDATION_LIMIT, request_statistics
from sigmix.engine import Engine
from sigmix.errors import ConfigError, DataError, UnknownNameError
from sigmix.evals.accuracy import training_task
from sigmix.evals.plots import figure, save_png
from sigmix.evals.statistics import wilson
from sigmix.experts.bank import Bank
from sigmix.experts.expert import Expert
from sigmix.experts.requests import RequestStatistics
from sigmix.tasks.base import Sample, Score, Split, Task, check_request, shuffled
from sigmix.tasks.benchmarks import BenchmarkTask
from sigmix.tasks.graders import one_of
from sigmix.tasks.registry import get_task
from sigmix.utils.io import read_json

SEEN = ("plural", "opposite", "spell", "odd-one-out", "json-record")
"""Tasks that are "other" in every split, if the bank has no expert for their domain."""

UNSEEN = ("syllogism", "boolean")  # tasks that are "other" in the test only
CODE = "code"  # domain that is in the test only: requests for programs (`code_requests`)


def requests(
    bank: Mapping[str, Expert],
    split: Split,
    n: int,
    *,
    seed: int = 0,
    unseen: Sequence[str] = (),
    data_dir: Path | None = None,
    without: Collection[str] = (),
) -> dict[str, list[str]]:
    """Return {label: n user turns of a split} over the bank's labels; finite tasks may have fewer.

    Args:
        unseen: tasks with an entry of their own, ``other:TASK``, of n prompts each.
        without: experts whose labels are left out.

    Raises:
        ExpertError: an expert without its training task. DataError: a task without its data.
    """

    def drawn(task: Task, count: int) -> list[str]:
        return [sample.prompt for sample in task.samples(split, count, seed=seed)]

    texts_by_label: dict[str, list[str]] = {}
    for label in labels(bank)[:-1]:
        (name,) = label.mix.weights
        if name not in without:
            texts_by_label[label.name] = drawn(training_task(bank[name], data_dir), n)
    others = [task for task in SEEN if not _has(bank, task)]
    pool = everyday(split, n - n // 2 if others else n, seed)
    share = -(-(n - len(pool)) // max(len(others), 1))
    for task in others:
        pool += drawn(get_task(task), share)
    texts_by_label[OTHER] = pool[:n]
    for task in unseen:
        texts = code_requests(n, seed) if task == CODE else drawn(get_task(task, data_dir=data_dir), n)
        texts_by_label[f"{OTHER}:{task}"] = texts
    return texts_by_label


def without_data(bank: Mapping[str, Expert]) -> dict[str, str]:
    """Return {expert: reason} of the experts with tasks that need a local folder of data or the hub, and have neither.

    Raises:
        ExpertError: an expert without its training task.
    """
    reasons = {}
    for name in skills(bank):
        task = training_task(bank[name])
        if isinstance(task, BenchmarkTask):
            try:
                task.samples(task.splits()[0], 1)
            except DataError as error:
                reasons[name] = str(error)
    return reasons


def add_statistics(engine: Engine, bank: Bank, name: str, data_dir: Path | None = None) -> RequestStatistics:
    """Compute the request statistics of an expert from its task, write them to its folder, and return them.

    Raises:
        ExpertError: an expert of another base, without its training task, or damaged. OutputError: the folder cannot
            be written.
    """
    task = training_task(bank[name], data_dir)
    engine.check_expert(bank[name])
    train = [sample.prompt for sample in task.samples("train", TRAIN_LIMIT)]
    validation = [sample.prompt for sample in task.samples("validation", VALIDATION_LIMIT)]
    statistics = request_statistics(engine, train, validation)
    bank.set_requests(name, statistics)
    return statistics


def read_requests(path: Path, names: Collection[str]) -> dict[str, list[str]]:
    """Read {label: user turns} from a JSON file.

    Args:
        names: the bank's labels; ``other:KIND`` is allowed too.

    Raises:
        DataError: not such a file. UnknownNameError: another label.
    """
    remedy = 'for example {"arithmetic": ["17 + 25 = ?"], "other": ["Tell me a joke."]}'
    requests = read_json(path, DataError, remedy)
    for label, texts in requests.items():
        if label not in names and label.partition(":")[0] != OTHER:
            raise UnknownNameError("label", label, names)
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{path}: {label!r} must be a list of texts that is not empty", remedy=remedy)
    if not requests:
        raise DataError(f"{path} has no requests", remedy=remedy)
    return requests


def unseen_tasks(bank: Mapping[str, Expert]) -> list[str]:
    """Return the tasks of `UNSEEN`, and `CODE`, that the bank has no expert for."""
    tasks = [task for task in UNSEEN if not _has(bank, task)]
    return tasks + [CODE] * (CODE not in _domains(bank))


def _domains(bank: Mapping[str, Expert]) -> set[str | None]:
    return {bank[name].meta.get("domain") for name in skills(bank)}


def _has(bank: Mapping[str, Expert], task: str) -> bool:
    """Return whether the bank has an expert for a task or its domain."""
    return get_task(task).domain in _domains(bank) or task in {bank[name].meta.get("task") for name in skills(bank)}


class DispatchTask(Task):
    """Classify requests by the labels of a bank, under strategy A's prompt; the task of strategy B's expert.

    Args:
        per_label: requests drawn per label and split. data_dir: local data of finite benchmarks.
    """

    domain = DISPATCH
    description = "Say which expert a request is for."

    def __init__(self, bank: Mapping[str, Expert], per_label: int = 400, data_dir: Path | None = None) -> None:
        super().__init__()
        self.bank, self.per_label, self.data_dir = bank, per_label, data_dir
        self.kinds: list[Label] = labels(bank)
        if len(self.kinds) < 2:
            raise ConfigError("the bank has no expert to choose", remedy="train one: sigmix train")
        self.names = [label.name for label in self.kinds]
        self.choices = tuple(self.names)  # constrains training to what strategy B scores
        self.facts = {"labels": self.names}
        self.name = "dispatch"
        self.max_new_tokens = 2 + max(len(name) for name in self.names) // 2
        self.notes = ["requests are the experts' own prompts of the same split; 'other' is everyday and foreign tasks"]

    def samples(self, split: Split, n: int | None = None, seed: int = 0) -> list[Sample]:
        check_request(self, split, n)
        each = max(self.per_label, -(-(n or 0) // len(self.names)))
        texts_by_label = requests(self.bank, split, each, seed=seed, data_dir=self.data_dir)
        every = [
            Sample.make(question(self.kinds, request), label, request=request)
            for label, texts in texts_by_label.items()
            for request in texts
        ]
        return shuffled(list({sample.id: sample for sample in every}.values()), self.name, seed)[:n]

    def score(self, sample: Sample, reply: str) -> Score:
        return one_of(reply, sample.gold, self.names)

    def wrong_replies(self, sample: Sample) -> list[str]:
        others = [name for name in self.names if name != sample.gold]
        return [*super().wrong_replies(sample), *others, ", ".join(self.names), f"{sample.gold} or {others[0]}"]


def confusion(strategy: Strategy, requests: Mapping[str, Sequence[str]], names: Sequence[str]) -> dict[str, Any]:
    """Return the confusion matrix of a strategy.

    Args:
        requests: {true label: user turns}; ``other:TASK`` counts as "other" and has a row of its own.
        names: the bank's labels, the columns.

    Returns:
        JSON values: strategy, labels, rows ({label, n, counts, right, accuracy, interval}), n, accuracy with its Wilson
        interval, balanced (mean accuracy of the rows), tokens and seconds per request, and items.
    """
    rows: list[dict[str, Any]] = []
    items: list[dict[str, Any]] = []
    started = time.perf_counter()
    for label, texts in requests.items():
        decisions = strategy.decide(list(texts))
        truth = label if label in names else label.partition(":")[0]
        counts = [sum(decision.label == name for decision in decisions) for name in names]
        right = sum(decision.label == truth for decision in decisions)
        rows.append(
            {
                "label": label, "n": len(texts), "counts": counts, "right": right, "accuracy": right / len(texts),
                "interval": list(wilson(right, len(texts))),
            }
        )  # fmt: skip
        pairs = zip(texts, decisions, strict=True)
        items += [{"request": text, "truth": label, **decision.to_json()} for text, decision in pairs]
    n, right = sum(row["n"] for row in rows), sum(row["right"] for row in rows)
    return {
        "strategy": strategy.name, "labels": list(names), "rows": rows, "n": n, "accuracy": right / n,
        "interval": list(wilson(right, n)), "balanced": sum(row["accuracy"] for row in rows) / len(rows),
        "tokens_per_request": sum(item["tokens"] for item in items) / n,
        "seconds_per_request": (time.perf_counter() - started) / n, "items": items,
    }  # fmt: skip


def plot(figures: Mapping[str, Any], path: str | Path) -> None:
    """Plot a confusion matrix as PNG: true labels in rows, shaded by their share of the row.

    Raises:
        ConfigError: matplotlib is not installed. OutputError: the file cannot be written.
    """
    rows, names = figures["rows"], figures["labels"]
    canvas = figure(2.5 + 0.8 * len(names), 2 + 0.5 * len(rows))
    axes = canvas.add_subplot()
    shares = [[count / row["n"] for count in row["counts"]] for row in rows]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(rows):
        for x, count in enumerate(row["counts"]):
            axes.text(x, y, count, ha="center", va="center", color="white" if shares[y][x] > 0.5 else "black")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), [f"{row['label']} (n = {row['n']})" for row in rows])
    axes.set_xlabel("decided")
    axes.set_title(f"{figures['strategy']}: {figures['accuracy']:.3f} of {figures['n']}")
    save_png(canvas, path)


def everyday(split: Split, n: int, seed: int = 0) -> list[str]:
    """Return up to n distinct everyday requests; no template is in two splits."""
    data = _everyday()
    every = [
        template.format(**{key: filler})
        for template in data["templates"][split]
        for key, fillers in data["fillers"].items()
        if "{" + key + "}" in template
        for filler in fillers.split("|")
    ]
    every += [template for template in data["templates"][split] if "{" not in template]
    random.Random(f"everyday {split} {seed}").shuffle(every)
    return every[:n]


def code_requests(n: int, seed: int = 0) -> list[str]:
    """Return up to n distinct requests for programs."""
    data = _everyday()
    parts = itertools.product(data["code_templates"], data["languages"].split(), data["programs"])
    every = [template.format(language=language, does=what) for template, language, what in parts]
    random.Random(f"code {seed}").shuffle(every)
    return every[:n]


def _everyday() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("everyday.json").read_text(encoding="utf-8"))
