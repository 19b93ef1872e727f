"""A forward pass over many prompts that computes what they share once.

Chat prompts begin alike (the system turn, the opening of the user's turn), and several sampled answers share their
whole prompt. A batch is therefore run as a tree: the common prefix [1, P], then the prompts' own rests [N, R]
(left-padded), then, in training, G answers of each prompt [N·G, C]. Each level's keys and values are computed once and
repeated for its children, with gradients flowing back through the repetition. The result equals running every row
alone; only the amount of work differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from sigmix.engine.images import embedded, grid_positions

MIN_SHARED = 8
"""Shorter common prefixes are not worth a pass of their own."""


@dataclass
class Prefilled:
    """Prompts that a model has read.

    Attributes:
        cache: keys and values of all prompt tokens, N rows.
        mask: bool [N, P + R], False where padded.
        logits: [N, V], of the token after each prompt, in the model's dtype.
        lengths: int64 [N], the position of the next token: prompt lengths without padding (less behind Qwen-VL's
            images, whose tokens share positions).
    """

    cache: DynamicCache
    mask: torch.Tensor
    logits: torch.Tensor
    lengths: torch.Tensor

    def repeat(self, times: int) -> Prefilled:
        """Every row `times` times in a row (in place for the cache)."""
        if times > 1:
            self.cache.batch_repeat_interleave(times)
            self.mask, self.logits, self.lengths = (
                t.repeat_interleave(times, 0) for t in (self.mask, self.logits, self.lengths)
            )
        return self


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Length of the prefix that all rows share, leaving every row at least one token of its own."""
    if len(rows) < 2:
        return 0
    first, last = min(rows, key=list), max(rows, key=list)
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return max(min(shared, min(map(len, rows)) - 1), 0)


def left_pad(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """ids int64 [N, R] and mask bool [N, R] of rows aligned at their ends."""
    width = max(map(len, rows))
    ids = torch.tensor([[fill] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=device)
    return ids, mask


@dataclass
class StoredPrefix:
    """Token ids that all N prompts of a batch begin with, and their keys and values under each prompt's weights."""

    ids: tuple[int, ...]
    cache: DynamicCache

    def begins(self, rows: Sequence[Sequence[int]]) -> bool:
        """Whether every prompt goes on from it, by one token at least."""
        return all(len(row) > len(self.ids) and tuple(row[: len(self.ids)]) == self.ids for row in rows)


def read_prefix(model: Any, ids: Sequence[int], cache: DynamicCache, rows: int = 1) -> None:
    """Put the keys and values of a prefix into an empty cache, in every one of some rows."""
    device = model.get_input_embeddings().weight.device
    # only the cache is wanted: the head gets no position
    none = torch.empty(0, dtype=torch.long, device=device)
    batch = torch.tensor([list(ids)] * rows, device=device)
    places = grid_positions(model, [ids])
    positions = None if places is None else places[0][:, None].expand(-1, rows, -1).to(device)
    model(
        **embedded(model, batch), position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=none
    )


def prefill(
    model: Any, rows: Sequence[Sequence[int]], pad_id: int, share: bool = True, start: StoredPrefix | None = None
) -> Prefilled:
    """Run prompts through the model.

    Args:
        model: a causal language model, in whatever adapted state it is; gradients flow if they are enabled.
        rows: N token-id lists, none empty; with images see `sigmix.engine.images`.
        share: compute the common prefix once. It must be False when rows have different weights.
        start: a prefix read before, in this very adapted state, for all rows; it is used up, if all rows go on from it.
    """
    device = model.get_input_embeddings().weight.device
    cache = DynamicCache(config=model.config)
    if start is not None and start.begins(rows):
        cache, shared = start.cache, len(start.ids)
    else:
        shared = common_prefix(rows) if share else 0
        shared = shared if shared >= MIN_SHARED and _can_share(cache, rows) else 0
        if shared:
            read_prefix(model, rows[0][:shared], cache)
            cache.batch_repeat_interleave(len(rows))
    ids, mask = left_pad([row[shared:] for row in rows], pad_id, device)
    positions = (mask.long().cumsum(1) - 1).clamp_min(0) + shared
    lengths = torch.tensor([len(row) for row in rows], device=device)
    if (places := grid_positions(model, rows)) is not None:
        positions = positions.expand(3, -1, -1).clone()
        for number, own in enumerate(places):
            positions[:, number, positions.shape[2] - own.shape[1] + shared :] = own[:, shared:].to(device)
            lengths[number] = own.max() + 1
    mask = torch.cat([mask.new_ones(len(rows), shared), mask], dim=1)
    out = model(
        **embedded(model, ids),
        attention_mask=mask if not bool(mask.all()) else None,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return Prefilled(cache, mask, out.logits[:, -1], lengths)


def _can_share(cache: DynamicCache, rows: Sequence[Sequence[int]]) -> bool:
    # padding between a prefix and ragged rests would count as distance in a sliding window
    return len(set(map(len, rows))) == 1 or not any(getattr(layer, "is_sliding", False) for layer in cache.layers)


def answer_logits(model: Any, state: Prefilled, answers: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits [N, C, V] that predict each answer token.

    Args:
        state: prompts read by `prefill`; its cache is used up.
        answers: int64 [N, C], right-padded. mask: bool [N, C].
    """
    first = state.logits.unsqueeze(1)
    if answers.shape[1] == 1:
        return first
    width = answers.shape[1] - 1
    positions = state.lengths.unsqueeze(1) + torch.arange(width, device=answers.device)
    out = model(
        input_ids=answers[:, :-1].contiguous(),
        attention_mask=torch.cat([state.mask, mask[:, :-1]], dim=1),
        position_ids=positions,
        past_key_values=state.cache,
        use_cache=True,
    )
    return torch.cat([first, out.logits], dim=1)
