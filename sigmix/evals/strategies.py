"""Accuracy of adaptation strategies on the same items, each paired with the base model.

Entries are named base, A, B, C, D, each-expert and oracle. "each-expert" runs every expert alone. "oracle" is an upper
bound: an item counts as right if the base model or any expert alone is right, as under a perfect choice of one expert
per request. The examples of C are training items; no test item takes part in any choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sigmix.adapt.base import Strategy, skills
from sigmix.engine.base import InferenceEngine
from sigmix.evals.accuracy import Result, answer_samples, compare, figures_of
from sigmix.experts.mix import Mix
from sigmix.tasks.base import Sample, Split, Task

NAMES = ("base", "A", "B", "C", "D", "each-expert", "oracle")
EACH, ORACLE = "each-expert", "oracle"


def run_strategies(
    engine: InferenceEngine,
    task: Task,
    strategies: Mapping[str, Strategy],
    *,
    each_expert: bool = True,
    split: Split = "test",
    n: int = 300,
    seed: int = 0,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    progress: Callable[[int, str], None] | None = None,
) -> tuple[dict[str, Any], dict[str, Result]]:
    """Evaluate the base model, strategies, and every expert alone with the oracle bound over them.

    Args:
        strategies: {entry's name: strategy}.
        each_expert: include every expert alone and the oracle.
        progress: called with (items answered, name) after each batch.

    Returns:
        JSON figures as of `sigmix.evals.accuracy.run`, with entries per strategy: ``strategy``, `Result.summary`,
        ``chosen`` ({mix id: items}), ``pass1_seconds``, ``pass1_tokens``, ``pass2_seconds`` and ``paired`` with the
        base model. And {name: `Result`}.
    """
    task.prepare(engine.tokenizer, engine.encode, engine.context_length)
    samples = task.samples(split, n, seed=seed)
    limit = max_new_tokens or task.max_new_tokens
    experts = skills(engine.bank) if each_expert else []
    rows: dict[str, Strategy | Mix] = {
        "base": Mix.base(), **strategies, **{expert: Mix.one(expert) for expert in experts}
    }  # fmt: skip
    results: dict[str, Result] = {}
    entries: list[dict[str, Any]] = []
    for name, strategy in rows.items():
        results[name], facts = measure_strategy(
            engine, task, samples, strategy, max_new_tokens=limit, batch_size=batch_size,
            progress=None if progress is None else lambda count, name=name: progress(count, name),  # type: ignore[misc]
        )  # fmt: skip
        paired = compare(results[name], results["base"], seed) if name != "base" else None
        entries.append({"strategy": name, **results[name].summary(), **facts, "paired": paired})
    if each_expert:
        results[ORACLE] = _oracle([results[name] for name in ("base", *experts)])
        paired = compare(results[ORACLE], results["base"], seed)
        entries.append({"strategy": ORACLE, **results[ORACLE].summary(), "chosen": {}, "bound": True, "paired": paired})
    return figures_of(engine, task, samples, entries, split=split, seed=seed, max_new_tokens=limit), results


def measure_strategy(
    engine: InferenceEngine,
    task: Task,
    samples: Sequence[Sample],
    strategy: Strategy | Mix,
    *,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
    form: str | None = None,
) -> tuple[Result, dict[str, Any]]:
    """Evaluate samples, each under the mixture that a strategy chooses for its text, or all under one mixture.

    Args:
        form: see `Engine.generate`.

    Returns:
        The result, and chosen ({mix id: items}), pass1_seconds, pass1_tokens and pass2_seconds.
    """
    result, answers, seconds = answer_samples(
        engine, task, samples, strategy, batch_size=batch_size, progress=progress,
        max_new_tokens=max_new_tokens or task.max_new_tokens, form=form,
    )  # fmt: skip
    decisions = [answer.decision for answer in answers]
    return result, {
        "chosen": dict(Counter(decision.mix.id for decision in decisions).most_common()),
        "pass1_seconds": round(seconds[0], 3),
        "pass1_tokens": sum(decision.tokens for decision in decisions),
        "pass2_seconds": round(seconds[1], 3),
    }


def _oracle(alone: Sequence[Result]) -> Result:
    """Take for every item the first result that is right, else the first result."""
    chosen = []
    for place, item in enumerate(alone[0].items):
        tries = [result.items[place] for result in alone]
        chosen.append(next((one for one in tries if one.score == 1.0), item))
    return replace(alone[0], items=chosen)
