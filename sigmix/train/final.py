"""After training: base and expert on the same held-out test items, and the figures on the expert's card.

Nothing here chooses anything: the expert is the one that validation picked before a test item was read.
"""

from __future__ import annotations

from typing import Any

from sigmix.engine.modes import as_base, as_expert
from sigmix.evals.evaluate import compare, constant_baseline, evaluate
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
    task, actor, layers, tokens = trainer.task, trainer.actor, trainer.policy.layers, trainer.max_new_tokens
    samples = task.samples("test", n, seed=0)
    with as_base(layers):
        before = evaluate(task, samples, lambda part: actor.answer(part, tokens))
    with as_expert(layers, expert.z):
        after = evaluate(task, samples, lambda part: actor.answer(part, tokens))
    before.save(trainer.run.path / "test-base.jsonl")
    after.save(trainer.run.path / "test-expert.jsonl")
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
    figures = {"test": test, "base": base, "paired": paired, "best_constant": constant}
    return expert.with_meta(metrics=[metric, *thaw(expert.meta.get("metrics", []))]), figures
