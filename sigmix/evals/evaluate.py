"""A task, a set of its samples and a way of answering -> scored items and a summary.

Every accuracy comes with n, a 95 % Wilson interval, the accuracy of the best constant reply and the entropy of the
answers, so that a model that learned to say one thing is seen. Replies that a verifier could not judge are left out
of n and counted apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sigmix.evals.stats import mcnemar, paired_difference, wilson
from sigmix.files import write_text
from sigmix.tasks.base import Sample, Task
from sigmix.tasks.constant import answer_entropy, best_constant

Answer = Callable[[Sequence[Sample]], list[str]]


@dataclass(frozen=True)
class Item:
    """One sample (of its images the names), its reply and its score (None where the verifier could not judge)."""

    id: str
    prompt: str
    gold: str
    reply: str
    answer: str | None
    score: float | None
    explanation: str
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """Items of one evaluation; the figures are computed from them alone."""

    task: str
    items: list[Item]

    @property
    def scored(self) -> list[Item]:
        """Items that could be judged."""
        return [item for item in self.items if item.score is not None]

    @property
    def right(self) -> list[bool]:
        """Per scored item: full marks."""
        return [item.score == 1.0 for item in self.scored]

    @property
    def accuracy(self) -> float:
        """Share of scored items with full marks; 0 if there is none."""
        return sum(self.right) / len(self.right) if self.right else 0.0

    def summary(self) -> dict[str, Any]:
        """task, n, accuracy, interval (95 % Wilson), mean_score (which differs from the accuracy where a reply can be
        right in part, as in VQA), unscorable, answer_entropy (nats), distinct_answers."""
        scores = [item.score for item in self.scored if item.score is not None]
        answers = [item.answer for item in self.items]
        return {
            "task": self.task,
            "n": len(self.right),
            "accuracy": self.accuracy,
            "interval": list(wilson(sum(self.right), len(self.right))),
            "mean_score": sum(scores) / len(scores) if scores else 0.0,
            "unscorable": len(self.items) - len(self.scored),
            "answer_entropy": answer_entropy(answers),
            "distinct_answers": len(set(answers)),
        }

    def save(self, path: str | Path) -> None:
        """One JSON object a line, atomically."""
        rows = [{key: value for key, value in asdict(item).items() if key != "images" or value} for item in self.items]
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def evaluate(task: Task, samples: Sequence[Sample], answer: Answer) -> Result:
    """Answer and score samples, in their order."""
    replies = answer(samples)
    items = []
    for sample, reply in zip(samples, replies, strict=True):
        score = task.score(sample, reply)
        names = tuple(image.name for image in sample.images)
        items.append(
            Item(sample.id, sample.prompt, sample.gold, reply, score.answer, score.value, score.explanation, names)
        )
    return Result(task.name, items)


def compare(ours: Result, theirs: Result, seed: int = 0) -> dict[str, Any]:
    """Paired comparison on the items that both could be judged on: difference with interval, McNemar."""
    other = {item.id: item for item in theirs.scored}
    pairs = [(item, other[item.id]) for item in ours.scored if item.id in other]
    a, b = [x.score == 1.0 for x, _ in pairs], [y.score == 1.0 for _, y in pairs]
    difference, low, high = paired_difference(a, b, seed)
    return {"n": len(pairs), "difference": difference, "interval": [low, high], **mcnemar(a, b)}


def in_part(summary: Mapping[str, Any]) -> dict[str, float]:
    """{"mean_score": …} of a summary where some reply was right in part; {} where it is the accuracy."""
    score = summary.get("mean_score")
    return {} if score is None or score == summary["accuracy"] else {"mean_score": score}


def rank(summary: Mapping[str, Any]) -> tuple[float, float]:
    """What the better of two summaries of the same items has more of: mean score, then full marks. Where no reply is
    right in part both are the accuracy."""
    return in_part(summary).get("mean_score", summary["accuracy"]), summary["accuracy"]


def constant_baseline(task: Task, samples: Sequence[Sample]) -> dict[str, Any]:
    """The best constant reply on these samples and its accuracy; empty where trying them is too costly."""
    if task.costly:
        return {}
    reply, accuracy = best_constant(task, samples)
    return {"reply": reply, "accuracy": accuracy}
