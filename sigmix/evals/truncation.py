"""Accuracy of a truncated LoRA of a mixture, beside the exact mixture and the base on the same held-out items.

The norm that a truncation loses does not say what it costs: accuracy may fall by more or by less. So the change is
measured as a program computes it that reads the file: the factors in the file's dtype, added to the base's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sigmix.engine import Engine
from sigmix.errors import ConfigError, SigmixError
from sigmix.evals.accuracy import Result, compare, run, training_task
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix
from sigmix.export.low_rank import LowRank
from sigmix.tasks.base import Task

Adapters = Sequence[tuple[LowRank, float]]
"""Low-rank changes of the same base with the scales at which they are added."""


def training_tasks(
    mix: Mix, bank: Mapping[str, Expert], data_dir: Path | None = None, allow_code: bool = False
) -> tuple[dict[str, Task], dict[str, str]]:
    """Return {name: task with test items} of a mixture's experts, and {expert: reason} of those without."""
    tasks: dict[str, Task] = {}
    missing: dict[str, str] = {}
    for name in mix.weights:
        try:
            task = training_task(bank[name], data_dir, allow_code)
            task.score(task.samples("test", 1)[0], "")  # fails early if programs must not run
            tasks[task.name] = task
        except SigmixError as error:
            missing[name] = str(error)
        except Exception as error:  # of a user's own task
            missing[name] = f"{type(error).__name__}: {error}"
    return tasks, missing


@torch.no_grad()
def changed_weights(engine: Engine, adapters: Adapters, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return W + Σ scale · B A by path, for `Execution.other_base`; summed in float32 and rounded once.

    Args:
        dtype: of the file, to which A and B are rounded.
    """
    weights = {}
    for path in dict.fromkeys(path for low, _ in adapters for path in low.paths):
        layer = engine.layers[path]
        weight = layer.matrix()
        total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for low, scale in adapters:
            if path in low.paths:
                a, b = (factor.to(dtype).to(total) for factor in low.factors(path))
                total += scale * (b @ a)
        total = total.to(weight.dtype)
        weights[path] = total.T.contiguous() if layer.transposed else total
    return weights


def comparison(base: Result, exact: Result, truncated: Result) -> dict[str, Any]:
    """Compare results on the same items.

    Returns:
        ``task``; the summaries ``base``, ``exact`` and ``truncated``; ``paired``, `compare` of the truncated mixture
        with the exact one; ``kept``, the share of the exact one's gain in accuracy over the base, None without a gain.
    """
    gain = exact.accuracy - base.accuracy
    return {
        "task": base.task, "base": base.summary(), "exact": exact.summary(), "truncated": truncated.summary(),
        "paired": compare(truncated, exact),
        # without the last digits of the division: nine of ten is 0.9
        "kept": round((truncated.accuracy - base.accuracy) / gain, 9) if gain > 0 else None,
    }  # fmt: skip


def measure(
    engine: Engine,
    mix: Mix,
    tasks: Mapping[str, Task],
    adapters: Adapters,
    dtype: torch.dtype,
    n: int = 300,
    progress: Callable[[int, str], None] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measure the accuracy of a truncated mixture, greedy.

    Args:
        mix: what ``adapters`` approximate. dtype: see `changed_weights`.
        n: test items of each task. progress: see `run`.

    Returns:
        `comparison` of each task, and {task: reason} of those that this base cannot be evaluated on.
    """
    whole: dict[str, dict[str, Result]] = {}
    failed: dict[str, str] = {}
    for name, task in tasks.items():
        try:
            whole[name] = run(engine, task, [mix], n=n, progress=progress)[1]
        except SigmixError as error:
            failed[name] = str(error)
    rows = []
    with engine.execution.other_base(changed_weights(engine, adapters, dtype) if whole else {}):
        for name, results in whole.items():
            truncated = run(engine, tasks[name], n=n, progress=progress)[1]
            rows.append(comparison(results[Mix.base().id], results[mix.id], truncated[Mix.base().id]))
    return rows, failed


def check_kept(rows: Sequence[Mapping[str, Any]], min_gain: float, what: str, remedy: str) -> None:
    """Raise `ConfigError` if a truncated mixture keeps less than a share of its gain on a task.

    Args:
        rows: of `measure`. min_gain: in [0, 1]; 0 accepts any loss. what: names the mixture and its rank.
    """
    worst = min((row for row in rows if row["kept"] is not None), key=lambda row: row["kept"], default=None)
    if worst is None or not min_gain or worst["kept"] >= min_gain:
        return
    raise ConfigError(
        f"{what} keeps {worst['kept']:.4g} of the gain in accuracy on {worst['task']}, below the threshold of "
        f"{min_gain:g}: {worst['truncated']['accuracy']:.3f} where the exact mixture has "
        f"{worst['exact']['accuracy']:.3f} and the base {worst['base']['accuracy']:.3f}; nothing is written",
        remedy=remedy,
    )
