"""A task under adaptation strategies on the same items, each paired with the base.

Strategies are named base, A, B, C, D, each-expert and oracle. "each-expert" runs every expert of the bank alone.
"oracle" is no strategy but a bound: an item counts as right if the base or any expert alone has it right, which is what
a perfect choice of one expert per request would reach. C's examples are training items; no test item chooses anything.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sigmix.adapt.base import Decision, Strategy, skills
from sigmix.evals.accuracy import Result, compare, constant_baseline, evaluate
from sigmix.experts.mix import Mix
from sigmix.tasks.base import Sample, Split, Task

Decide = Callable[[Sequence[Sample]], list[Decision]]


NAMES = ("base", "A", "B", "C", "D", "each-expert", "oracle")


EACH, ORACLE = "each-expert", "oracle"


def run_strategies(
    engine: Any,
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
    """Evaluate the base, strategies, and every expert alone with the oracle bound over them.

    Args:
        strategies: by the name that they get in the table, such as "A".
        each_expert: run every expert alone too, and give the oracle.
        progress: called with (items just answered, name).

    Returns:
        Figures as of `sigmix.evals.accuracy.run`, an entry by strategy in place of one by mix: ``strategy``,
        `Result.summary`, ``chosen`` ({mix id: items}), ``pass1_seconds``, ``pass1_tokens``, ``pass2_seconds``,
        ``paired`` with the base. And the `Result` of every entry by its name.
    """
    samples = task.samples(split, n, seed=seed)
    limit = max_new_tokens or task.max_new_tokens
    results: dict[str, Result] = {}
    entries: list[dict[str, Any]] = []

    def measure(name: str, decide: Decide) -> None:
        told = None if progress is None else lambda count: progress(count, name)
        result, facts = measure_strategy(
            engine, task, samples, decide, max_new_tokens=limit, batch_size=batch_size, progress=told
        )
        results[name] = result
        paired = compare(result, results["base"], seed) if name != "base" else None
        entries.append({"strategy": name, **result.summary(), **facts, "paired": paired})

    measure("base", always(Mix.base()))
    for name, strategy in strategies.items():
        measure(name, by_prompt(strategy))
    if each_expert:
        for expert in skills(engine.bank):
            measure(expert, always(Mix.one(expert)))
        alone = [results["base"], *(results[name] for name in skills(engine.bank))]
        results[ORACLE] = _oracle(alone)
        entries.append(
            {"strategy": ORACLE, **results[ORACLE].summary(), "chosen": {}, "bound": True,
             "paired": compare(results[ORACLE], results["base"], seed)}
        )  # fmt: skip
    figures = {
        "task": task.name,
        "split": split,
        "seed": seed,
        "n": len(samples),
        "max_new_tokens": limit,
        "base": (getattr(engine.model, "sigmix_base", None) or {}).get("name"),
        "best_constant": constant_baseline(task, samples),
        "notes": list(task.notes),
        "results": entries,
    }
    return figures, results


def measure_strategy(
    engine: Any,
    task: Task,
    samples: Sequence[Sample],
    decide: Decide,
    *,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
    form: str | None = None,
) -> tuple[Result, dict[str, Any]]:
    """Decide for every sample, then answer each under its own mix, in the engine's form (see `Engine.generate`).

    Returns:
        The result, and chosen ({mix id: items}), pass1_seconds, pass1_tokens, pass2_seconds.
    """
    limit = max_new_tokens or task.max_new_tokens
    started = time.perf_counter()
    decisions = decide(samples)
    decided = time.perf_counter()

    def answer(wanted: Sequence[Sample]) -> list[str]:
        texts: list[str] = []
        for start in range(0, len(wanted), batch_size):
            part = wanted[start : start + batch_size]
            mixes = [decision.mix for decision in decisions[start : start + batch_size]]
            rows = [engine.encode(sample.prompt, sample.system, images=sample.images) for sample in part]
            done = engine.generate(rows, mixes, max_new_tokens=limit, batch_size=batch_size, form=form)
            texts += [one.text for one in done]
            if progress is not None:
                progress(len(part))
        return texts

    result = evaluate(task, samples, answer)
    return result, {
        "chosen": dict(Counter(decision.mix.id for decision in decisions).most_common()),
        "pass1_seconds": round(decided - started, 3),
        "pass1_tokens": sum(decision.tokens for decision in decisions),
        "pass2_seconds": round(time.perf_counter() - decided, 3),
    }


def always(mix: Mix) -> Decide:
    """The same mix for every sample."""
    return lambda samples: [Decision(mix, mix.id, "fixed") for _ in samples]


def by_prompt(strategy: Strategy) -> Decide:
    """What a strategy decides on the samples' prompts, the words alone."""
    return lambda samples: strategy.decide([sample.prompt for sample in samples])


def _oracle(alone: Sequence[Result]) -> Result:
    """For every item the first of the results that has it right, else the first one's."""
    chosen = []
    for place, item in enumerate(alone[0].items):
        tries = [result.items[place] for result in alone]
        chosen.append(next((one for one in tries if one.score == 1.0), item))
    return replace(alone[0], items=chosen)
