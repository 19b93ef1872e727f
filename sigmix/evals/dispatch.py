"""Dispatch: which label does a request deserve? The data for strategies A, B and D, the task that B's expert learns,
and the confusion matrices.

A label's requests are the prompts of the task that its expert was trained on, from the split asked for. "Other" has
everyday requests, and prompts of tasks from domains that the bank does not have. Some of those domains are kept out of
training altogether and appear in the test only (`UNSEEN`), because "other" is all that nobody thought of.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sigmix.adapt.base import DISPATCH, OTHER, Label, Strategy, labels, skills
from sigmix.adapt.prompt import question
from sigmix.errors import ConfigError, ExpertError, SigmixError
from sigmix.evals.plots import figure, save_png
from sigmix.evals.statistics import wilson
from sigmix.tasks.base import SPLITS, Sample, Score, Split, Task, check_request, shuffled
from sigmix.tasks.graders import one_of
from sigmix.tasks.registry import get_task

SEEN = ("plural", "opposite", "spell", "odd-one-out", "json-record")
"""Tasks whose prompts are "other" in training, where the bank has no expert for their domain or task."""


FOREIGN = ("transitive", "odd-even", "longest-word", "reverse-words")
"""Tasks whose prompts are "other" in a probe's validation only: kinds that its training never saw, so that depth,
temperature and threshold are chosen where a probe can err. None of them is in the test."""


UNSEEN = ("syllogism", "boolean")
"""Tasks whose prompts are "other" and are never trained on, if the bank has no expert for them."""


CODE = "code"
"""A whole domain that is never trained on nor validated on: requests for programs (`everyday.code_requests`)."""


def requests(
    bank: Mapping[str, Any],
    split: Split,
    n: int,
    *,
    seed: int = 0,
    unseen: Sequence[str] = (),
    foreign: Sequence[str] = (),
    data_dir: Path | None = None,
) -> dict[str, list[str]]:
    """{label: n user turns of a split} over the bank's labels; finite tasks may give fewer.

    Args:
        unseen: tasks that join "other", each under its own key ``other:TASK``, with n prompts each.
        foreign: tasks that join "other" itself, n prompts in all, if the bank has no expert for them.

    Raises:
        ExpertError: an expert that does not say which task it was trained on.
    """
    kinds = labels(bank)
    found: dict[str, list[str]] = {}
    for label in kinds[:-1]:
        (name,) = label.mix.weights
        found[label.name] = [sample.prompt for sample in _task(bank, name, data_dir).samples(split, n, seed=seed)]
    others = [task for task in SEEN if not _has(bank, task)]
    half = n // 2 if others else n
    pool = everyday(split, n - (n - half), seed)
    share = -(-(n - len(pool)) // max(len(others), 1))
    for task in others:
        pool += [sample.prompt for sample in get_task(task).samples(split, share, seed=seed)]
    found[OTHER] = pool[:n]
    strange = [task for task in foreign if not _has(bank, task)]
    for task in strange:
        found[OTHER] += [one.prompt for one in get_task(task).samples(split, -(-n // len(strange)), seed=seed)]
    for task in unseen:
        if task == CODE:
            found[f"{OTHER}:{CODE}"] = code_requests(n, seed)
            continue
        found[f"{OTHER}:{task}"] = [
            one.prompt for one in get_task(task, data_dir=data_dir).samples(split, n, seed=seed)
        ]
    return found


def prompts_of_experts(
    bank: Mapping[str, Any], count: int, *, split: Split = "train", seed: int = 0, data_dir: Path | None = None
) -> list[str]:
    """Prompts of the tasks that a bank's experts were trained on, in turn: what they are for.

    Raises:
        ConfigError: the bank has no expert. ExpertError: one that does not say which task it was trained on.
    """
    names = skills(bank)
    if not names:
        raise ConfigError("the bank has no expert", remedy="train one first")
    each = -(-count // len(names))
    drawn = [_task(bank, name, data_dir).samples(split, each, seed=seed) for name in names]
    return [one.prompt for group in zip(*drawn, strict=False) for one in group][:count]


def _has(bank: Mapping[str, Any], task: str) -> bool:
    """Whether the bank has an expert for a task or for its domain."""
    domains = {bank[name].meta.get("domain") for name in skills(bank)}
    return get_task(task).domain in domains or any(bank[name].meta.get("task") == task for name in skills(bank))


def unseen_tasks(bank: Mapping[str, Any]) -> list[str]:
    """Of `UNSEEN`, those that the bank has no expert for; and `CODE` if none is of that domain."""
    found = [task for task in UNSEEN if not _has(bank, task)]
    return found + [CODE] * (CODE not in {bank[name].meta.get("domain") for name in skills(bank)})


def _task(bank: Mapping[str, Any], name: str, data_dir: Path | None) -> Task:
    spec = bank[name].meta.get("task")
    remedy = "seal it with its task: sigmix experts verify --seal"
    if not spec:
        raise ExpertError(f"expert {name!r} does not say which task it was trained on", remedy=remedy)
    try:
        return get_task(spec, data_dir=data_dir)
    except SigmixError as error:
        raise ExpertError(f"expert {name!r} was trained on {spec!r}, which cannot be had: {error}") from error


class DispatchTask(Task):
    """Say which label a request deserves; what strategy B's expert learns. The prompt is strategy A's template.

    Args:
        bank: whose labels. per_label: requests drawn per label and split. data_dir: for experts of finite benchmarks.
    """

    domain = DISPATCH
    description = "Say which expert a request is for."

    def __init__(self, bank: Mapping[str, Any], per_label: int = 400, data_dir: Path | None = None) -> None:
        super().__init__()
        self.bank, self.per_label, self.data_dir = bank, per_label, data_dir
        self.kinds: list[Label] = labels(bank)
        if len(self.kinds) < 2:
            raise ConfigError("the bank has no expert to choose", remedy="train one first")
        self.names = [label.name for label in self.kinds]
        self.choices = tuple(self.names)  # strategy B scores nothing else, so nothing else is sampled in training
        self.facts = {"labels": self.names}
        self.name = "dispatch"
        self.max_new_tokens = 2 + max(len(name) for name in self.names) // 2
        self.notes = ["requests are the experts' own prompts of the same split; 'other' is everyday and foreign tasks"]

    def samples(self, split: Split, n: int | None = None, seed: int = 0) -> list[Sample]:
        check_request(self, split, n)
        wanted = n or self.per_label * len(self.names)
        found = requests(
            self.bank, split, max(self.per_label, -(-wanted // len(self.names))), seed=seed, data_dir=self.data_dir
        )
        every = [
            Sample.make(question(self.kinds, request), label, request=request)
            for label, texts in found.items()
            for request in texts
        ]
        return shuffled(list({sample.id: sample for sample in every}.values()), self.name, seed)[:n]

    def score(self, sample: Sample, reply: str) -> Score:
        return one_of(reply, sample.gold, self.names)

    def wrong_replies(self, sample: Sample) -> list[str]:
        others = [name for name in self.names if name != sample.gold]
        return [*super().wrong_replies(sample), *others, ", ".join(self.names), f"{sample.gold} or {others[0]}"]


def confusion(strategy: Strategy, found: Mapping[str, Sequence[str]], names: Sequence[str]) -> dict[str, Any]:
    """How a strategy labels requests.

    Args:
        found: requests by true label, from `requests`; ``other:TASK`` counts as "other" and keeps a row of its own.
        names: the bank's labels, "other" last.

    Returns:
        strategy, labels (columns), rows: [{label, n, counts, right, accuracy, interval}], accuracy over all with its
        Wilson interval, the mean of the rows' accuracies ("balanced"), tokens and seconds per request, and items.
    """
    rows: list[dict[str, Any]] = []
    items: list[dict[str, Any]] = []
    started = time.perf_counter()
    for label, texts in found.items():
        decisions = strategy.decide(list(texts))
        truth = label.partition(":")[0] if label not in names else label
        counts = [sum(decision.label == name for decision in decisions) for name in names]
        right = sum(decision.label == truth for decision in decisions)
        rows.append(
            {
                "label": label, "n": len(texts), "counts": counts, "right": right, "accuracy": right / len(texts),
                "interval": list(wilson(right, len(texts))),
            }
        )  # fmt: skip
        items += [
            {"request": text, "truth": label, **decision.to_json()}
            for text, decision in zip(texts, decisions, strict=True)
        ]
    n, right = sum(row["n"] for row in rows), sum(row["right"] for row in rows)
    return {
        "strategy": strategy.name,
        "labels": list(names),
        "rows": rows,
        "n": n,
        "accuracy": right / n,
        "interval": list(wilson(right, n)),
        "balanced": sum(row["accuracy"] for row in rows) / len(rows),
        "tokens_per_request": sum(item["tokens"] for item in items) / n,
        "seconds_per_request": (time.perf_counter() - started) / n,
        "items": items,
    }


def plot(figures: Mapping[str, Any], path: str | Path) -> None:
    """A confusion matrix as PNG: rows are what requests are, columns what the strategy said, in shares of the row.

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


# --- Everyday requests that no bundled expert is for: the class "other" of the dispatch strategies. Written for sigmix.


# template families go to one split each, so that validation and test hold wordings that were never trained on
TEMPLATES: dict[Split, list[str]] = {
    "train": [
        "Explain {thing} to a child.",
        "Write a short poem about {thing}.",
        "What is the capital of {country}?",
        "Give me three tips for {activity}.",
        "Translate into French: I like {thing}.",
        "Who invented {invention}?",
        "Tell me a joke about {thing}.",
        "Why do people enjoy {activity}?",
        "Summarise the history of {country} in two sentences.",
        "What should I cook with {food}?",
        "How does {invention} work?",
        "Write an email to my boss about {activity}.",
        "Describe {country} in one paragraph.",
        "What are the health benefits of {food}?",
    ],
    "validation": [
        "Can you recommend a book about {thing}?",
        "What language do people speak in {country}?",
        "Plan a weekend of {activity} for me.",
        "Is {food} good for breakfast?",
        "When was {invention} invented?",
    ],
    "test": [
        "Write a story that begins with {thing}.",
        "Which currency is used in {country}?",
        "How can I get better at {activity}?",
        "Suggest a dessert with {food}.",
        "What would the world be like without {invention}?",
        "Hello! How are you today?",
    ],
}


FILLERS: dict[str, list[str]] = {
    "thing": "the sea|the moon|winter|a lost dog|old trains|friendship|the rain|a lighthouse|bees|dreams|the desert|"
    "volcanoes|gravity|the night sky|a small village|snow|music|clouds|an old clock|rivers".split("|"),
    "country": "Portugal|Norway|Vietnam|Canada|Morocco|Chile|Greece|Finland|Nepal|Mexico|Iceland|Poland|Ghana|Jordan|"
    "Cuba|Latvia|Thailand|Turkey|Sweden|Bolivia".split("|"),
    "activity": "running|learning the guitar|gardening|chess|hiking|painting|swimming|public speaking|baking bread|"
    "photography|sailing|yoga|knitting|cycling|learning Spanish|saving money|fishing|writing letters|dancing".split(
        "|"
    ),
    "food": "lentils|eggs|spinach|rice|mushrooms|tofu|apples|pumpkin|salmon|beans|carrots|yogurt|chickpeas|potatoes|"
    "tomatoes|noodles|oats|cheese|aubergines|walnuts".split("|"),
    "invention": "the telephone|the compass|the steam engine|the printing press|the bicycle|the microscope|radio|"
    "the light bulb|the refrigerator|the camera|the battery|paper|the zipper|the helicopter|the elevator".split("|"),
}


CODE_TEMPLATES = (
    "Write a {language} function that {does}.",
    "How do I write a program in {language} that {does}?",
    "Debug this {language} code, which should be one that {does}.",
    "Show me a short {language} script that {does}, with comments.",
)


LANGUAGES = ("Python", "JavaScript", "Rust", "C", "Go", "Java", "SQL", "Bash")


PROGRAMS = (
    "reverses a linked list", "reads a CSV file", "counts the words of a text", "sorts a list of names",
    "checks whether a string is a palindrome", "downloads a web page", "computes Fibonacci numbers",
    "parses a date", "removes duplicates", "finds the shortest path in a graph", "merges two dictionaries",
    "validates an email address",
)  # fmt: skip


def code_requests(n: int, seed: int = 0) -> list[str]:
    """Up to n distinct requests for programs: a domain that neither training nor validation of any strategy has."""
    every = [t.format(language=name, does=what) for t in CODE_TEMPLATES for name in LANGUAGES for what in PROGRAMS]
    random.Random(f"code {seed}").shuffle(every)
    return every[:n]


def everyday(split: Split, n: int, seed: int = 0) -> list[str]:
    """Up to n distinct requests of a split, the same for the same arguments."""
    assert split in SPLITS
    every = [
        template.format(**{key: filler})
        for template in TEMPLATES[split]
        for key, fillers in FILLERS.items()
        if "{" + key + "}" in template
        for filler in fillers
    ]
    every += [template for template in TEMPLATES[split] if "{" not in template]
    random.Random(f"everyday {split} {seed}").shuffle(every)
    return every[:n]
