"""A forward pass over many prompts that computes what they share once.

Chat prompts begin alike (the system turn, the opening of the user's turn), and several sampled answers share their
whole prompt. A batch is therefore run as a tree: the common prefix [1, P], then the prompts' own rests [N, R]
(left-padded), then, in training, G answers of each prompt [N·G, C]. Each level's keys and values are computed once and
repeated for its children, with gradients flowing back through the repetition. The result equals running every row
alone; only the amount of work differs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from sigmix.engine.kv_cache import Prefilled, filled
from sigmix.models.multimodal import embedded, grid_positions

MIN_SHARED = 8
"""Shorter common prefixes are not worth a pass of their own."""


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
        rows: N token-id lists, none empty; with images see `sigmix.models.multimodal`.
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


# --- What prompts begin with, read once for each set of weights and kept: templates, system turns, instructions.


PREFIX_BYTES = 128 << 20
"""Bytes of keys and values that an engine keeps by default: 250 mixes of the default base's system turn."""


Entry = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [1, heads, P, d] of every layer."""


class Prefixes:
    """Keys and values by weights and token ids, within a memory budget; those used last stay.

    Args:
        model: whose. budget: bytes to keep; 0 keeps nothing.
    """

    def __init__(self, model: Any, budget: int = PREFIX_BYTES) -> None:
        self.model, self.budget = model, budget
        self.bytes = 0
        self._kept: OrderedDict[Any, Entry] = OrderedDict()
        self._put: set[Any] = set()

    def __len__(self) -> int:
        return len(self._kept)

    def usable(self, ids: Sequence[int]) -> bool:
        """Whether a prefix is worth a pass of its own and the model can go on from one (no sliding windows)."""
        plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=self.model.config).layers)
        return len(ids) >= MIN_SHARED and plain

    def rows(
        self, ids: Sequence[int], keys: Sequence[Any], keep: Callable[[list[int] | None], None] | None = None
    ) -> StoredPrefix | None:
        """The prefix under each row's weights, read in the model's present state where it is not kept.

        Args:
            ids: the prefix. keys: of N rows; equal keys mean equal weights.
            keep: None where all rows have the same weights; else restricts the model's rows to given ones, and to all
                again with None.

        Returns:
            A cache of N rows, or None for a prefix that is not `usable`.
        """
        if not self.usable(ids):
            return None
        names = [(key, tuple(ids)) for key in keys]
        distinct = list(dict.fromkeys(names))
        fresh = [name for name in distinct if name not in self._kept]
        found = {name: self._kept[name] for name in distinct if name in self._kept}
        for name in found:
            self._kept.move_to_end(name)
        if fresh:
            found |= dict(zip(fresh, self._read(ids, [names.index(name) for name in fresh], keep), strict=True))
            for name in fresh:
                self._store(name, found[name])
        places = torch.tensor([distinct.index(name) for name in names])
        cache = DynamicCache(config=self.model.config)
        for number in range(len(found[distinct[0]])):
            first, second = (torch.cat([found[name][number][part] for name in distinct])[places] for part in (0, 1))
            cache.update(first, second, number)
        return StoredPrefix(tuple(ids), cache)

    def longest(self, key: Any, ids: Sequence[int]) -> StoredPrefix | None:
        """The longest stored beginning of a prompt under some weights, with a cache of one row; None if there is none.

        Args:
            key: of the weights. ids: the prompt; a beginning leaves at least one token of it.
        """
        found = [name for name in self._kept if name[0] == key and len(name[1]) < len(ids) and _begins(ids, name[1])]
        if not found:
            return None
        name = max(found, key=lambda name: len(name[1]))
        self._kept.move_to_end(name)
        cache = DynamicCache(config=self.model.config)
        for number, (keys, values) in enumerate(self._kept[name]):
            cache.update(keys, values, number)
        return StoredPrefix(name[1], cache)

    def put(self, key: Any, ids: Sequence[int], entry: Entry) -> None:
        """Store what was read of some tokens; shorter beginnings of them that were put here before are dropped."""
        if not self.usable(ids):
            return
        name = (key, tuple(ids))
        for other in [o for o in self._kept if o in self._put and o[0] == key and _begins(ids, o[1])]:
            self.bytes -= _bytes(self._kept.pop(other))
            self._put.discard(other)
        self._store(name, entry)
        self._put.add(name)

    def _read(self, ids: Sequence[int], rows: list[int], keep: Callable[..., None] | None) -> list[Entry]:
        cache = DynamicCache(config=self.model.config)
        if keep is not None:
            keep(rows)
        try:
            read_prefix(self.model, ids, cache, len(rows))
        finally:
            if keep is not None:
                keep(None)
        return [
            [(keys[row : row + 1].clone(), values[row : row + 1].clone()) for keys, values in map(filled, cache.layers)]
            for row in range(len(rows))
        ]

    def _store(self, name: Any, entry: Entry) -> None:
        size = _bytes(entry)
        if size > self.budget:
            return
        while self._kept and self.bytes + size > self.budget:
            gone, old = self._kept.popitem(last=False)
            self._put.discard(gone)
            self.bytes -= _bytes(old)
        self._kept[name] = entry
        self.bytes += size

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
        self._put.clear()
        self.bytes = 0


def _begins(ids: Sequence[int], start: tuple[int, ...]) -> bool:
    return tuple(ids[: len(start)]) == start


def _bytes(entry: Entry) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in entry)
