"""What a task is: frozen samples, a verifier, and a check that the verifier can be trusted.

A `Task` gives samples of three splits and scores replies. Splits are disjoint by *content* (a hash of the prompt), so
the same question under another row number cannot be in two of them. `Task.validate` demands that gold replies score
1 and that wrong, empty and garbage replies score 0; it is the test that every task in this package has to pass.

This module does not generate replies, does not apply chat templates (`Sample.prompt` is the user's turn alone) and
imports no model library.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sigmix.errors import ConfigError, DataError
from sigmix.utils.images import Picture

Split = Literal["train", "validation", "test"]


SPLITS: tuple[Split, ...] = get_args(Split)


# Replies that no task may reward: nothing, white space, noise, a refusal.
GARBAGE = ("", "  \n", "?!", "qx zzv kjw", "I don't know.", "\x00\ufffd{[(")


def content_id(prompt: str, system: str | None = None, images: Sequence[Picture] = ()) -> str:
    """Hex SHA-256, first 16 digits, of system and prompt with runs of white space made one blank, and the images."""
    text = " ".join((system or "").split()) + "\x1f" + " ".join(prompt.split())
    text += "".join(f"\x1f{image.digest}" for image in images)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def hash_split(key: str, shares: tuple[float, float, float]) -> str:
    """The split that ``key`` falls into, by its hash alone: the same for every seed, count and machine.

    Args:
        key: what must not be torn apart, e.g. a sample's id, or a word that several prompts ask about.
        shares: of train, validation and test; they add to 1.
    """
    place = int(hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:13], 16) / 16**13
    return "train" if place < shares[0] else "validation" if place < shares[0] + shares[1] else "test"


@dataclass(frozen=True)
class Sample:
    """One question. Treat ``meta`` as frozen too: it is a plain dict only so that it pickles and prints as JSON.

    Attributes:
        id: `content_id` of prompt, system and images.
        prompt: the user's turn.
        gold: a reply that must score 1 (`Task.gold_value`).
        system: the system turn, if the task needs one.
        meta: what the verifier needs (choices, tests, entry ...); never shown to the model.
        images: shown before the prompt, in the user's turn; they need a vision-language model.
    """

    id: str
    prompt: str
    gold: str
    system: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)
    images: tuple[Picture, ...] = ()

    @classmethod
    def make(
        cls, prompt: str, gold: str, system: str | None = None, images: Sequence[Picture] = (), **meta: Any
    ) -> Sample:
        """A sample whose id is computed."""
        return cls(content_id(prompt, system, images), prompt, gold, system, meta, tuple(images))


@dataclass(frozen=True)
class Score:
    """A verdict.

    Attributes:
        value: in [0, 1]; None means that the reply could not be judged (not that it is wrong): leave it out of means
            and rewards, and count it apart.
        answer: what was extracted from the reply, or None.
        explanation: why, for a person.
    """

    value: float | None
    answer: str | None = None
    explanation: str = ""

    @classmethod
    def of(cls, right: bool, answer: str | None, explanation: str = "") -> Score:
        """1.0 or 0.0."""
        return cls(1.0 if right else 0.0, answer, explanation)


@dataclass(frozen=True)
class ValidationReport:
    """What `Task.validate` found. ``counts`` are figures, ``problems`` are sentences; ``ok`` means no problem."""

    task: str
    problems: list[str]
    counts: dict[str, int]

    @property
    def ok(self) -> bool:
        return not self.problems


class Task(ABC):
    """A set of samples with a verifier. A subclass sets the attributes and writes `samples` and `score`.

    Attributes:
        name: the canonical spec; `get_task(task.name)` gives an equal task. The registry fills it in.
        domain: arithmetic, comparing, words, reading, format, logic, code, knowledge ...
        description: one sentence.
        max_new_tokens: how many tokens an answer may need.
        license: of the data, or None where unknown; the package's own generated tasks say so in words.
        notes: what a reader of a figure must know (dropped duplicates, how a split was made).
        costly: a scoring takes more than a few milliseconds (it runs a program), so callers should score sparingly.
        choices: the only replies that there are, where a policy is to choose among them and say nothing else.
        facts: JSON values that an expert trained on the task must carry with it, such as the labels of a classifier.
    """

    name: str = ""
    domain: str = "other"
    description: str = ""
    max_new_tokens: int = 16
    license: str | None = None
    costly: bool = False
    choices: tuple[str, ...] = ()
    facts: Mapping[str, Any] = {}

    def __init__(self) -> None:
        self.notes: list[str] = []

    @abstractmethod
    def samples(self, split: Split, n: int | None = None, seed: int = 0) -> list[Sample]:
        """Up to ``n`` samples of one split, the same for the same arguments on every machine.

        Items of different splits never share an id, whatever the seeds. A split that has fewer than ``n`` distinct
        items gives all it has (every reported accuracy carries its n); one that has none is an error.

        Args:
            split: "train", "validation" or "test".
            n: how many; None means all of a finite set, or a generated task's stated default.
            seed: orders a finite set, draws from a generated one. A smaller n gives a prefix of a larger one.

        Raises:
            ConfigError: no such split, or n < 1.
            DataError: the data cannot be had or read, or the split is empty.
        """

    @abstractmethod
    def score(self, sample: Sample, reply: str) -> Score:
        """Judge a reply. Only a verifier's own failure gives ``value=None``; an unreadable reply is wrong, 0."""

    def gold_value(self, sample: Sample) -> float:
        """What the gold reply must score: 1, unless the task has items on which no reply gets full marks."""
        return 1.0

    def wrong_replies(self, sample: Sample) -> list[str]:
        """Replies that a lax verifier would accept and that must score 0. Override to add the task's own traps."""
        return [sample.prompt, f"It is not {sample.gold}.", f"not {sample.gold}"]

    def validate(self, split: Split = "train", n: int = 50) -> ValidationReport:
        """Check the verifier on up to ``n`` samples of ``split``, and the splits against each other.

        Gold must score 1 and wrong, empty and garbage replies 0; an unscorable wrong reply is counted, an unscorable
        gold reply is a problem. Ids are recomputed from the content, and compared across all splits: whole splits of
        a finite set, two differently seeded draws of a generated one. A benchmark without that split is checked on
        the first one it has.
        """
        split = split if split in self.splits() or split not in SPLITS else self.splits()[0]
        problems: list[str] = []
        counts: Counter[str] = Counter()
        for sample in self.samples(split, n):
            counts["samples"] += 1
            gold = self.score(sample, sample.gold)
            counts["gold_right"] += gold.value == self.gold_value(sample)
            if gold.value != self.gold_value(sample):
                counts["gold_unscorable"] += gold.value is None
                problems.append(
                    f"gold {_short(sample.gold)} scores {gold.value} on {_short(sample.prompt)} "
                    f"({_short(gold.explanation)})"
                )
            for reply in (*GARBAGE, *self.wrong_replies(sample)):
                value = self.score(sample, reply).value
                counts["wrong_replies"] += 1
                counts["wrong_refused"] += value == 0.0
                counts["wrong_unscorable"] += value is None
                if value:
                    problems.append(
                        f"wrong reply {_short(reply)} scores {value} on {_short(sample.prompt)} "
                        f"(gold {_short(sample.gold)})"
                    )
        self._check_splits(n, problems, counts)
        return ValidationReport(self.name or type(self).__name__, problems, dict(counts))

    def _check_splits(self, n: int, problems: list[str], counts: Counter[str]) -> None:
        seen: dict[str, set[str]] = {}
        for split in self.splits():
            ids: set[str] = set()
            for sample in self._for_disjointness(split, n):
                fresh = content_id(sample.prompt, sample.system, sample.images)
                if fresh != sample.id:
                    problems.append(f"id {sample.id} is not the hash of its content, {fresh}")
                ids.add(fresh)
            counts[f"distinct_{split}"] = len(ids)
            for other, others in seen.items():
                if shared := ids & others:
                    problems.append(f"{len(shared)} samples are in {other} and in {split}, e.g. id {min(shared)}")
            seen[split] = ids

    def splits(self) -> tuple[Split, ...]:
        """The splits that this task has: all three, unless a benchmark has no training data."""
        return SPLITS

    def _for_disjointness(self, split: Split, n: int) -> list[Sample]:
        return self.samples(split)


class ProceduralTask(Task):
    """A task that generates its items; `samples` draws from a seeded stream and keeps those of the split asked for.

    An item belongs to a split by the hash of its content (or of its ``split_key``), so the splits are disjoint by
    construction, whatever n and seed. Repeats within a drawing are dropped. Training items are in endless supply, so
    the shares favour evidence: small spaces (word pairs) keep a test split that is worth measuring on.
    """

    shares: tuple[float, float, float] = (0.6, 0.2, 0.2)
    default_n: int = 500
    license = "generated; no third-party data"
    # After this many draws plus `patience_per_item` times the distinct items seen, all without a new item of the
    # split, the space is taken to be exhausted: at 20 per item a uniform generator misses one with chance e^-20.
    patience: int = 200
    patience_per_item: int = 20

    @abstractmethod
    def stream(self, seed: int) -> Any:
        """An endless iterator of (Sample, split_key or None); the same for the same seed."""

    def samples(self, split: Split, n: int | None = None, seed: int = 0) -> list[Sample]:
        check_request(self, split, n)
        wanted = self.default_n if n is None else n
        found: list[Sample] = []
        seen: set[str] = set()
        barren = 0
        for sample, key in self.stream(seed):
            barren += 1
            if sample.id not in seen:
                seen.add(sample.id)
                if hash_split(sample.id if key is None else key, self.shares) == split:
                    found.append(sample)
                    barren = 0
            if len(found) == wanted or barren > self.patience + self.patience_per_item * len(seen):
                break
        if not found:
            raise DataError(
                f"task {self.name}: none of its {len(seen)} distinct items falls into split {split!r}",
                remedy="choose options with a larger space of items",
            )
        return found

    def _for_disjointness(self, split: Split, n: int) -> list[Sample]:
        return self.samples(split, n) + self.samples(split, n, seed=1)


def check_request(task: Task, split: str, n: int | None) -> None:
    """Refuse a split that is not there and a count below 1 (`ConfigError`)."""
    if split not in SPLITS:
        raise ConfigError(f"task {task.name}: no split {split!r}; there are {', '.join(SPLITS)}")
    if split not in task.splits():
        raise ConfigError(f"task {task.name} has no {split} split; it has {', '.join(task.splits())}")
    if n is not None and (not isinstance(n, int) or n < 1):
        raise ConfigError(f"task {task.name}: n must be a whole number of at least 1, not {n!r}")


def shuffled(items: Sequence[Sample], *seed: Any) -> list[Sample]:
    """A copy in an order that depends only on ``seed``."""
    order = list(items)
    random.Random("|".join(map(str, seed))).shuffle(order)
    return order


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
