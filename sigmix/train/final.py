"""After training: base and expert on the same held-out test items, and the figures on the expert's card.

Nothing here chooses anything: the expert is the one that validation picked before a test item was read.
"""

from __future__ import annotations

from typing import Any

import torch

from sigmix.evals.evaluate import compare, constant_baseline, in_part
from sigmix.experts.expert import Expert
from sigmix.experts.metadata import thaw
from sigmix.train.loop import Trainer


def held_out(trainer: Trainer, expert: Expert, n: int) -> tuple[Expert, dict[str, Any]]:
    """Test accuracy of base and expert.

    Args:
        trainer: a finished run with an SVF policy. n: test items (fewer if the task has fewer).

    Returns:
        The expert with the figures in its metrics, and {"test", "base", "paired", "best_constant"}. The items of both
        are written to the run's folder as test-base.jsonl and test-expert.jsonl.
    """
    task = trainer.task
    samples = task.samples("test", n, seed=0)
    before = trainer.evaluate(samples, {path: torch.ones_like(z) for path, z in expert.z.items()})
    after = trainer.evaluate(samples, dict(expert.z))

    def write() -> None:
        before.save(trainer.run.path / "test-base.jsonl")
        after.save(trainer.run.path / "test-expert.jsonl")

    trainer.processes.from_main(write)
    constant, paired = constant_baseline(task, samples), compare(after, before)
    test, base = after.summary(), before.summary()
    metric = {
        "name": "test accuracy",
        "value": test["accuracy"],
        "n": test["n"],
        "interval": test["interval"],
        "base": base["accuracy"],
        "base_interval": base["interval"],
        "p": paired["p"],
        "best_constant": constant.get("accuracy"),
        "answer_entropy": test["answer_entropy"],
        "note": "held out; chose nothing",
    }
    if in_part(test) or in_part(base):
        metric |= {"mean_score": test["mean_score"], "base_mean_score": base["mean_score"]}
    figures = {"test": test, "base": base, "paired": paired, "best_constant": constant}
    return expert.with_meta(metrics=[metric, *thaw(expert.meta.get("metrics", []))]), figures
