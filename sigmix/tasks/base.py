"""The task interface: frozen samples in three splits, a grader, and a check of both.

Splits are disjoint by *content* (a hash of the prompt), so the same question in another row of a file cannot be in two
of them. `Task.validate` requires that gold replies score 1 and that wrong, empty and garbage replies score 0; every
task of this package passes it. Chat templates are applied elsewhere: `Sample.prompt` is the user's turn alone.
"""

from __future__ import annotations

import hashlib
import random
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sigmix.errors import ConfigError, DataError
from sigmix.utils.images import Picture

Split = Literal["train", "validation", "test"]
Encode = Callable[[Any, str | None], list[int]]
SPLITS: tuple[Split, ...] = get_args(Split)
GARBAGE = ("", "  \n", "?!", "qx zzv kjw", "I don't know.", "\x00\ufffd{[(")  # replies that score 0 in every task


def content_id(
    prompt: str,
    system: str | None = None,
    images: Sequence[Picture] = (),
    history: Sequence[Mapping[str, str]] = (),
) -> str:
    """Return the first 16 hex digits of the SHA-256 of the turns (white space collapsed) and image digests."""
    turns = [system or "", *(f"{turn['role']}: {turn['content']}" for turn in history), prompt]
    text = "\x1f".join(" ".join(turn.split()) for turn in turns)
    text += "".join(f"\x1f{image.digest}" for image in images)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def hash_split(key: str, shares: tuple[float, float, float]) -> Split:
    """Return the split of ``key``, by its hash alone: the same for every seed, count and machine.

    Args:
        key: items with the same key stay together: a sample's id, or a word that several prompts share.
        shares: of train, validation and test; they add to 1.
    """
    place = int(hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:13], 16) / 16**13
    return "train" if place < shares[0] else "validation" if place < shares[0] + shares[1] else "test"


@dataclass(frozen=True)
class Sample:
    """A question with its gold reply. Treat ``meta`` as frozen too.

    Attributes:
        id: `content_id` of the turns and images.
        prompt: the user's turn; the last one, if there are several.
        gold: a reply that scores `Task.gold_value`.
        system: the system turn, if there is one.
        meta: data for the grader (choices, tests, …), never shown to the model; "target": see `target`.
        images: shown before the prompt, in the user's turn; need a vision-language model.
        history: earlier messages {"role", "content"} of user and assistant.
    """

    id: str
    prompt: str
    gold: str
    system: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)
    images: tuple[Picture, ...] = ()
    history: tuple[Mapping[str, str], ...] = field(default=(), hash=False)

    @property
    def turns(self) -> str | list[Mapping[str, str]]:
        """The prompt, or all messages but the system's, as `sigmix.engine.tokenization.encode` takes them."""
        return [*self.history, {"role": "user", "content": self.prompt}] if self.history else self.prompt

    @property
    def target(self) -> str:
        """Reply for next-token training: a worked solution, where the prompt asks for one and the data has it."""
        return str(self.meta.get("target", self.gold))

    @classmethod
    def make(
        cls, prompt: str, gold: str, system: str | None = None, images: Sequence[Picture] = (), **meta: Any
    ) -> Sample:
        """Create a sample with the `content_id` as its id."""
        return cls(content_id(prompt, system, images), prompt, gold, system, meta, tuple(images))


@dataclass(frozen=True)
class Score:
    """Result of grading one reply.

    Attributes:
        value: in [0, 1]; None if the reply could not be graded, which is not the same as wrong: leave it out of means
            and rewards, and count it apart.
        answer: the answer extracted from the reply, or None.
        explanation: the reason, for people.
    """

    value: float | None
    answer: str | None = None
    explanation: str = ""

    @classmethod
    def of(cls, right: bool, answer: str | None, explanation: str = "") -> Score:
        """Return a score of 1.0 or 0.0."""
        return cls(1.0 if right else 0.0, answer, explanation)


@dataclass(frozen=True)
class ValidationReport:
    """Result of `Task.validate`: figures in ``counts``, one sentence for each of ``problems``."""

    task: str
    problems: list[str]
    counts: dict[str, int]

    @property
    def ok(self) -> bool:
        return not self.problems


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


class Task(ABC):
    """A set of samples with a grader. Subclasses set the attributes and implement `samples` and `score`.

    Attributes:
        name: the canonical spec, set by the registry; `get_task(task.name)` gives an equal task.
        domain: arithmetic, comparing, words, reading, format, logic, code, knowledge, …
        description: one sentence.
        max_new_tokens: tokens that an answer may take.
        license: of the data; None if unknown.
        notes: remarks for readers of results (dropped duplicates, how a split was made).
        costly: grading takes more than a few milliseconds (it runs a program).
        choices: the only possible replies, if the policy is to choose among them.
        facts: JSON values that an expert trained on the task stores, such as the labels of a classifier.
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
        """Return up to ``n`` samples of one split, the same for the same arguments on every machine.

        Samples of different splits never share an id, whatever the seeds.

        Args:
            n: None: all of a finite set, or a generated task's default number. A split with fewer gives all it has.
            seed: orders a finite set, draws from a generated one. A smaller n gives a prefix of a larger one.

        Raises:
            ConfigError: no such split, or n < 1.
            DataError: the data cannot be found or read, or the split is empty.
        """

    @abstractmethod
    def score(self, sample: Sample, reply: str) -> Score:
        """Grade a reply. ``value=None`` is for failures of the grader alone; an unreadable reply scores 0."""

    def score_all(self, samples: Sequence[Sample], replies: Sequence[str]) -> list[Score]:
        """Grade replies, each to its sample; override if many are graded faster together."""
        return [self.score(sample, reply) for sample, reply in zip(samples, replies, strict=True)]

    def gold_value(self, sample: Sample) -> float:
        """Return the score of the gold reply: 1, unless no reply to this sample gets full marks."""
        return 1.0

    def wrong_replies(self, sample: Sample) -> list[str]:
        """Return replies that a lax grader would accept and that must score 0. Override to add the task's own."""
        return [sample.prompt, f"It is not {sample.gold}.", f"not {sample.gold}"]

    def splits(self) -> tuple[Split, ...]:
        """Return the splits of this task; a benchmark may lack some."""
        return SPLITS

    @property
    def reference(self) -> str:
        """Name for cards that others read."""
        return self.name

    def prepare(self, tokenizer: Any, encode: Encode, context: int | None) -> None:  # noqa: B027 (optional)
        """Adapt to a base model before samples are drawn; does nothing by default.

        Args:
            tokenizer: of transformers. encode: token ids of a prompt or messages, and a system turn. context: length in
                tokens; None if it is unlimited.
        """

    def validate(self, split: Split = "train", n: int = 50) -> ValidationReport:
        """Check the grader on up to ``n`` samples of ``split``, and that the splits are disjoint.

        Gold and target must score `gold_value`; wrong, empty and garbage replies, and gold in a draft, 0. Ungradable
        wrong replies are counted, an ungradable gold reply is a problem. Ids are recomputed from the content and
        compared across all splits: whole splits of a finite set, two draws of a generated one. If ``split`` is missing,
        the first existing one is used.
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
            target = self.score(sample, sample.target).value
            if target != self.gold_value(sample):
                problems.append(f"target {_short(sample.target)} scores {target} on {_short(sample.prompt)}")
            drafted = f"<think>{sample.gold}</think>\nI don't know."
            for reply in (*GARBAGE, drafted, *self.wrong_replies(sample)):
                value = self.score(sample, reply).value
                counts["wrong_replies"] += 1
                counts["wrong_refused"] += value == 0.0
                counts["wrong_unscorable"] += value is None
                if value:
                    problems.append(
                        f"wrong reply {_short(reply)} scores {value} on {_short(sample.prompt)} "
                        f"(gold {_short(sample.gold)})"
                    )
        seen: dict[str, set[str]] = {}
        for split in self.splits():
            ids: set[str] = set()
            for sample in self._for_disjointness(split, n):
                fresh = content_id(sample.prompt, sample.system, sample.images, sample.history)
                if fresh != sample.id:
                    problems.append(f"id {sample.id} is not the hash of its content, {fresh}")
                ids.add(fresh)
            counts[f"distinct_{split}"] = len(ids)
            for other, others in seen.items():
                if shared := ids & others:
                    problems.append(f"{len(shared)} samples are in {other} and in {split}, e.g. id {min(shared)}")
            seen[split] = ids
        return ValidationReport(self.name or type(self).__name__, problems, dict(counts))

    def _for_disjointness(self, split: Split, n: int) -> list[Sample]:
        return self.samples(split)


class ProceduralTask(Task):
    """A task that generates its samples from a seeded stream.

    The hash of a sample's content (or of its key) decides its split, so the splits are disjoint by construction.
    Repeats within a draw are dropped. The shares leave small spaces a test split that is worth measuring on.
    """

    shares: tuple[float, float, float] = (0.6, 0.2, 0.2)
    default_n: int = 500
    license = "generated; no third-party data"
    # a split is exhausted after this many draws, plus `patience_per_item` for each distinct item seen, without a new
    # item of it: at 20 per item a uniform generator misses one with probability e^-20
    patience: int = 200
    patience_per_item: int = 20

    @abstractmethod
    def stream(self, seed: int) -> Iterator[tuple[Sample, str | None]]:
        """Yield (sample, split key or None) endlessly; the same for the same seed."""

    def samples(self, split: Split, n: int | None = None, seed: int = 0) -> list[Sample]:
        check_request(self, split, n)
        limit = self.default_n if n is None else n
        samples: list[Sample] = []
        seen: set[str] = set()
        barren = 0
        for sample, key in self.stream(seed):
            barren += 1
            if sample.id not in seen:
                seen.add(sample.id)
                if hash_split(sample.id if key is None else key, self.shares) == split:
                    samples.append(sample)
                    barren = 0
            if len(samples) == limit or barren > self.patience + self.patience_per_item * len(seen):
                break
        if not samples:
            raise DataError(
                f"task {self.name}: none of its {len(seen)} distinct items falls into split {split!r}",
                remedy="choose options with a larger space of items",
            )
        return samples

    def _for_disjointness(self, split: Split, n: int) -> list[Sample]:
        return self.samples(split, n) + self.samples(split, n, seed=1)


def check_request(task: Task, split: str, n: int | None) -> None:
    """Raise `ConfigError` if the task has no such split, or if n < 1."""
    if split not in SPLITS:
        raise ConfigError(f"task {task.name}: no split {split!r}; there are {', '.join(SPLITS)}")
    if split not in task.splits():
        raise ConfigError(f"task {task.name} has no {split} split; it has {', '.join(task.splits())}")
    if n is not None and (not isinstance(n, int) or n < 1):
        raise ConfigError(f"task {task.name}: n must be a whole number of at least 1, not {n!r}")


def shuffled(items: Sequence[Sample], *seed: Any) -> list[Sample]:
    """Return a copy in an order that depends only on ``seed``."""
    order = list(items)
    random.Random("|".join(map(str, seed))).shuffle(order)
    return order


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
