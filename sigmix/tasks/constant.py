"""How far a reply that never looks at the question gets, and how varied a model's answers are.

An accuracy says little without the best constant's beside it, and a policy whose answers lose their entropy has
usually found that constant.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from sigmix.errors import DataError
from sigmix.tasks.base import Sample, Task

MAX_SCORINGS = 20_000
MAX_COSTLY_SCORINGS = 100


def best_constant(task: Task, samples: Sequence[Sample], candidates: Sequence[str] | None = None) -> tuple[str, float]:
    """The constant reply with the highest accuracy on ``samples``, and that accuracy.

    Unscorable pairs are left out of a candidate's accuracy. Candidates beyond the cost limit (20,000 scorings, 100
    where a scoring runs a program) are dropped, the rarest gold replies first; for a task whose gold replies all
    differ that leaves 1/n, which is what such a constant gets.

    Args:
        task: whose verifier judges.
        samples: at least one.
        candidates: default: the distinct gold replies, the most frequent first.

    Raises:
        DataError: no samples, or no candidates.
    """
    if not samples:
        raise DataError(f"task {task.name}: no samples to find the best constant reply on")
    golds = Counter(sample.gold for sample in samples)
    pool = list(dict.fromkeys(candidates)) if candidates is not None else [gold for gold, _ in golds.most_common()]
    if not pool:
        raise DataError(f"task {task.name}: no candidates for the best constant reply")
    if task.costly and candidates is None and len(golds) == len(samples):
        return pool[0], 1 / len(samples)
    limit = MAX_COSTLY_SCORINGS if task.costly else MAX_SCORINGS
    best = (pool[0], -1.0)
    for reply in pool[: max(1, limit // len(samples))]:
        values = [score.value for sample in samples if (score := task.score(sample, reply)).value is not None]
        accuracy = sum(values) / len(values) if values else 0.0
        if accuracy > best[1]:
            best = (reply, accuracy)
    return best


def answer_entropy(answers: Sequence[str | None]) -> float:
    """Entropy in nats of the extracted answers' distribution; "no answer" (None) counts as one value. 0 if empty."""
    counts = Counter(answers)
    return sum(-count / len(answers) * math.log(count / len(answers)) for count in counts.values())
