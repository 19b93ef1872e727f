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


def divergence(
    model: Any, actor: Actor, samples: Sequence[Sample], rows: Sequence[SequenceState], under: Under, reference: Under
) -> float:
    """Return the mean exact KL(π‖π₀) in nats per token over the tokens of replies.

    Args:
        actor: encodes samples. rows: the replies to them. under: the state π that gave them. reference: the base's, π₀.
    """
    prompts = [actor.encode(sample) for sample in samples]
    rollouts = Rollouts(prompts, [row.ids for row in rows], [], torch.zeros(len(rows)), [])
    ids, mask = (t.to(model.get_input_embeddings().weight.device) for t in rollouts.padded(slice(None), actor.pad_id))

    def logits() -> torch.Tensor:
        return completion_logits(model, prompts, ids, mask, actor.pad_id)

    with torch.no_grad():
        with reference():
            theirs = logits()
        with under():
            ours = logits()
        stats = token_stats(ours, theirs, ids, mask)
    return float(stats.kl.sum() / mask.sum())
