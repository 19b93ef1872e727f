"""What the adaptation benchmarks share: the bundled bank on the default base, requests, and random mixtures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sigmix.engine import Engine
from sigmix.evals.dispatch import prompts_of_experts
from sigmix.experts.bank import Bank
from sigmix.experts.mix import Mix
from sigmix.models.default import DEFAULT
from sigmix.models.loading import load_base
from sigmix.tasks.base import Split


def bundled_engine(base: str = DEFAULT, dtype: str | None = None, bank: Any = None, **options: Any) -> Engine:
    """An engine over the bundled bank (or another one) whose answers never end early."""
    model, tokenizer = load_base(base, dtype)
    engine = Engine(model, tokenizer, Bank.bundled() if bank is None else bank, **options)
    engine.eos_token_ids = []  # so that every contestant makes the same number of tokens
    return engine


def prompts(engine: Engine, count: int, seed: int = 0, split: Split = "train") -> list[str]:
    """User turns of the bank's tasks in turn, of different lengths."""
    return prompts_of_experts(engine.bank, count, split=split, seed=seed)


def mixtures(names: Sequence[str], count: int, seed: int = 0) -> list[Mix]:
    """Distinct mixtures of all experts, drawn evenly from those whose weights sum to 1."""
    weights = np.random.default_rng(seed).dirichlet(np.ones(len(names)), count)
    return [Mix(dict(zip(names, map(float, row), strict=True))) for row in weights]
