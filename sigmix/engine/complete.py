"""Answers of a model in whatever adapted state it is in: the bare step that the engine and training share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sigmix.engine.choices import Choices
from sigmix.engine.decode import Row, Sampling, decode
from sigmix.engine.prefix import prefill


@torch.no_grad()
def complete(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    ends: Sequence[int],
    pad_id: int,
    group: int = 1,
    choices: Choices | None = None,
) -> list[Row]:
    """`group` answers to each prompt, answers of one prompt beside each other.

    Args:
        prompts: N token-id lists. sampling: its seeds, if given, number N·group.
        choices: the only replies, see `decode`.
    """
    state = prefill(model, prompts, pad_id).repeat(group)
    *_, rows = decode(model, state, sampling, ends, choices=choices)
    return rows
