"""Engine, requests and random mixtures shared by benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import say
from sigmix.adapt.base import skills
from sigmix.engine import Engine
from sigmix.evals.accuracy import training_task
from sigmix.evals.dispatch import without_data
from sigmix.experts.bank import Bank
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix
from sigmix.models.default import DEFAULT
from sigmix.models.loading import load_base
from sigmix.tasks.base import Split, Task


def bundled_engine(
    base: str = DEFAULT, dtype: str | None = None, bank: Any = None, compile: bool = False, **options: Any
) -> Engine:
    """Return an engine with the bundled bank (or another one) that ignores end tokens.

    Args:
        compile: decode with a compiled step, and wait for it. options: of `Engine`.
    """
    model, tokenizer = load_base(base, dtype)
    engine = Engine(model, tokenizer, Bank.bundled() if bank is None else bank, compile=compile, **options)
    if engine.decode_step is not None:
        say("compiling the decode step")
        engine.decode_step.wait()
    engine.eos_token_ids = []  # every answer has the same number of tokens
    return engine


def compiled(engine: Engine) -> bool | str:
    """Return whether the compiled decode step was used, or why not."""
    step = engine.decode_step
    return step is not None and (step.active or step.problem or False)


def save_base(base: str, dtype: str | None, folder: Path) -> tuple[Any, str]:
    """Write a base and its tokenizer as transformers does, for a peer; return the tokenizer and the dtype's name."""
    model, tokenizer = load_base(base, dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer, str(model.dtype).removeprefix("torch.")


def acting_on(positions: str, bank: Mapping[str, Expert]) -> dict[str, Expert]:
    """Return a bank's experts with their z at other positions, which needs no training: speed does not depend on z."""
    return {name: replace(bank[name], meta={**bank[name].meta, "positions": positions}) for name in bank}


def tasks(bank: Mapping[str, Expert]) -> dict[str, Task]:
    """Return the tasks of a bank's experts by expert, but for tasks without their data, see `without_data`."""
    missing = without_data(bank)
    for name, reason in missing.items():
        say(f"no requests of {name}: {reason}")
    return {name: training_task(bank[name]) for name in skills(bank) if name not in missing}


def prompts(engine: Engine, count: int, seed: int = 0, split: Split = "train") -> list[str]:
    """Return interleaved user turns of the `tasks` of the bank's experts."""
    every = tasks(engine.bank)
    each = -(-count // len(every))
    drawn = [task.samples(split, each, seed=seed) for task in every.values()]
    return [one.prompt for group in zip(*drawn, strict=False) for one in group][:count]


def mixtures(names: Sequence[str], count: int, seed: int = 0) -> list[Mix]:
    """Return mixtures of all experts with weights drawn uniformly from the simplex."""
    weights = np.random.default_rng(seed).dirichlet(np.ones(len(names)), count)
    return [Mix(dict(zip(names, map(float, row), strict=True))) for row in weights]
