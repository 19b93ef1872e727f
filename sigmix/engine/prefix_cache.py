"""Prefill with shared prefixes, and a prefix cache keyed by weights and token ids.

Chat prompts share a prefix (system turn, start of the user's turn), and the answers of one rollout share their prompt.
A batch is therefore a tree: common prefix [1, P], left-padded rests of the prompts [N, R] and, in training, G answers
to each prompt [N·G, C]. Keys and values of each level are computed once and repeated for its children; gradients flow
back through the repetition.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from sigmix.engine.kv_cache import Prefilled, keys_and_values
from sigmix.models.multimodal import embed_inputs, grid_positions
from sigmix.utils.lru import LRUCache

MIN_SHARED = 8
"""Shortest common prefix that is worth a forward pass of its own."""

Select = Callable[[list[int] | None], None]
"""Restricts the per-row state of adapted layers to the rows with given indices; None: all rows."""


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix that leaves every row at least one token."""
    if len(rows) < 2:
        return 0
    first, last = min(rows, key=list), max(rows, key=list)
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return max(min(shared, min(map(len, rows)) - 1), 0)


def left_pad(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids int64 [N, R] and mask bool [N, R] of left-padded rows."""
    width = max(map(len, rows))
    ids = torch.tensor([[fill] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=device)
    return ids, mask


@dataclass
class StoredPrefix:
    """Token ids shared by all N prompts of a batch, and their keys and values under each prompt's weights."""

    ids: tuple[int, ...]
    cache: DynamicCache

    def starts(self, rows: Sequence[Sequence[int]]) -> bool:
        """Return True if every prompt starts with the prefix and is longer."""
        return all(len(row) > len(self.ids) and tuple(row[: len(self.ids)]) == self.ids for row in rows)


def read_prefix(
    model: Any, ids: Sequence[int], cache: DynamicCache, rows: int = 1, all_logits: bool = False
) -> torch.Tensor:
    """Compute the keys and values of a prefix, or its continuation, in every row of a cache.

    Returns:
        Logits [rows, P, V] after each token; [rows, 0, V] unless ``all_logits``.
    """
    device = model.get_input_embeddings().weight.device
    no_logits = torch.empty(0, dtype=torch.long, device=device)
    batch = torch.tensor([list(ids)] * rows, device=device)
    places = grid_positions(model, [ids])
    positions = None if places is None else places[0][:, None].expand(-1, rows, -1).to(device)
    return model(
        **embed_inputs(model, batch),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=0 if all_logits else no_logits,
    ).logits


def prefill(
    model: Any, rows: Sequence[Sequence[int]], pad_id: int, share: bool = True, start: StoredPrefix | None = None,
    all_logits: bool = False,
) -> Prefilled:  # fmt: skip
    """Run prompts through a causal language model in its present adapted state; gradients flow if enabled.

    Args:
        rows: N token-id lists, none empty; for images see `sigmix.models.multimodal`.
        share: compute the common prefix once; False if rows have different weights.
        start: cached prefix of all rows under the same weights; its cache is consumed.
        all_logits: keep the logits after every token that is not in a prefix.
    """
    device = model.get_input_embeddings().weight.device
    cache = DynamicCache(config=model.config)
    if start is not None and start.starts(rows):
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
        **embed_inputs(model, ids),
        attention_mask=mask if not bool(mask.all()) else None,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=0 if all_logits else 1,
    )
    return Prefilled(cache, mask, out.logits[:, -1], lengths, out.logits if all_logits else None)


def _can_share(cache: DynamicCache, rows: Sequence[Sequence[int]]) -> bool:
    # padding between a prefix and ragged rests would count as distance in a sliding window
    return len(set(map(len, rows))) == 1 or not any(getattr(layer, "is_sliding", False) for layer in cache.layers)


def answer_logits(model: Any, state: Prefilled, answers: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return logits [N, C, V] that predict each answer token.

    Args:
        state: prompts read by `prefill`; its cache is consumed.
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


PREFIX_BYTES = 128 << 20
"""Default budget of an engine's prefix cache: the default base's system turn under 250 mixtures."""

Entry = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [1, heads, P, d] of every layer."""


class PrefixCache:
    """LRU cache of prefixes' keys and values, keyed by weights and token ids.

    Args:
        max_bytes: memory budget; 0 keeps nothing.
    """

    def __init__(self, model: Any, max_bytes: int = PREFIX_BYTES) -> None:
        self.model = model
        # values: keys and values, and whether a longer prefix replaces them (turns of a conversation)
        self.entries: LRUCache[tuple[Hashable, tuple[int, ...]], tuple[Entry, bool]] = LRUCache(max_bytes)

    def __len__(self) -> int:
        return len(self.entries)

    def usable(self, ids: Sequence[int]) -> bool:
        """Return True if a prefix is long enough, and the model can continue from one (no sliding windows)."""
        plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=self.model.config).layers)
        return len(ids) >= MIN_SHARED and plain

    def batch(self, ids: Sequence[int], keys: Sequence[Hashable], select: Select | None = None) -> StoredPrefix | None:
        """Return a prefix under each row's weights, computed in the model's present state where it is not cached.

        Args:
            ids: the prefix. keys: of the weights of N rows.
            select: restricts the model to some of its rows; None if all rows have the same weights.

        Returns:
            The prefix with a cache of N rows; None if it is not `usable`.
        """
        if not self.usable(ids):
            return None
        names = [(key, tuple(ids)) for key in keys]
        distinct = list(dict.fromkeys(names))
        cached = {name: found[0] for name in distinct if (found := self.entries.get(name)) is not None}
        missing = [name for name in distinct if name not in cached]
        if missing:
            computed = self._compute(ids, [names.index(name) for name in missing], select)
            cached |= dict(zip(missing, computed, strict=True))
            for name in missing:
                self.entries.put(name, (cached[name], False), _nbytes(cached[name]))
        places = torch.tensor([distinct.index(name) for name in names])
        cache = DynamicCache(config=self.model.config)
        for number in range(len(cached[distinct[0]])):
            keys_, values = (torch.cat([cached[name][number][part] for name in distinct])[places] for part in (0, 1))
            cache.update(keys_, values, number)
        return StoredPrefix(tuple(ids), cache)

    def longest(self, key: Hashable, ids: Sequence[int]) -> StoredPrefix | None:
        """Return the longest cached proper prefix of a prompt under some weights, with a cache of one row."""
        names = [name for name, _ in self.entries.items() if name[0] == key and len(name[1]) < len(ids)]
        name = max((name for name in names if _starts(ids, name[1])), key=lambda name: len(name[1]), default=None)
        if name is None or (found := self.entries.get(name)) is None:
            return None
        cache = DynamicCache(config=self.model.config)
        for number, (keys, values) in enumerate(found[0]):
            cache.update(keys, values, number)
        return StoredPrefix(name[1], cache)

    def put(self, key: Hashable, ids: Sequence[int], entry: Entry) -> None:
        """Store a conversation in place of its earlier turns."""
        if not self.usable(ids):
            return
        for name, (_, conversation) in self.entries.items():
            if conversation and name[0] == key and _starts(ids, name[1]):
                self.entries.pop(name)
        self.entries.put((key, tuple(ids)), (entry, True), _nbytes(entry))

    def _compute(self, ids: Sequence[int], rows: list[int], select: Select | None) -> list[Entry]:
        cache = DynamicCache(config=self.model.config)
        if select is not None:
            select(rows)
        try:
            read_prefix(self.model, ids, cache, len(rows))
        finally:
            if select is not None:
                select(None)
        layers = [keys_and_values(layer) for layer in cache.layers]
        return [
            [(keys[row : row + 1].clone(), values[row : row + 1].clone()) for keys, values in layers]
            for row in range(len(rows))
        ]

    def clear(self) -> None:
        """Remove all entries."""
        self.entries.clear()


def _starts(ids: Sequence[int], prefix: tuple[int, ...]) -> bool:
    return tuple(ids[: len(prefix)]) == prefix


def _nbytes(entry: Entry) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in entry)
