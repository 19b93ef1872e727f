"""KL divergence of an adapted model from its base model, on its own replies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from sigmix.engine.generation import SequenceState
from sigmix.engine.prefix_cache import completion_logits
from sigmix.tasks.base import Sample
from sigmix.train.objectives import token_stats
from sigmix.train.rollout import Actor, Rollouts

Under = Callable[[], AbstractContextManager[Any]]
"""Context in which a model is in some state."""


ROWS = 16
"""Replies that are read at once: long ones of a large vocabulary would not fit into memory together."""


@torch.no_grad()
def divergence(
    model: Any, actor: Actor, samples: Sequence[Sample], rows: Sequence[SequenceState], under: Under, reference: Under
) -> float:
    """Return the mean exact KL(π‖π₀) in nats per token over the tokens of replies.

    Args:
        actor: encodes samples, and has the state in which answers are read. rows: the replies to them. under: the state
            π that gave them. reference: the base's, π₀.
    """
    total = tokens = 0.0
    for start in range(0, len(rows), ROWS):
        prompts = [actor.encode(sample) for sample in samples[start : start + ROWS]]
        replies = [row.ids for row in rows[start : start + ROWS]]
        padded = Rollouts(prompts, replies, [], torch.zeros(len(replies)), []).padded(slice(None), actor.pad_id)
        ids, mask = (part.to(model.get_input_embeddings().weight.device) for part in padded)
        with reference():
            theirs = completion_logits(model, prompts, ids, mask, actor.pad_id)
        with under():
            ours = completion_logits(model, prompts, ids, mask, actor.pad_id, prompt_only=actor.prompt_only)
        total += float(token_stats(ours, theirs, ids, mask).kl.sum())
        tokens += float(mask.sum())
    return total / tokens
