"""What prompts begin with, read once for each set of weights and kept: templates, system turns, instructions.

Rows of a mixed batch have weights of their own, so a prefix that they share is read once for every distinct mix, not
for every row, and the next batch under the same mixes finds it here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from sigmix.engine.prefix import MIN_SHARED, StoredPrefix, read_prefix

BUDGET = 128 << 20
"""Bytes of keys and values that an engine keeps by default: 250 mixes of the default base's system turn."""

Entry = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [1, heads, P, d] of every layer."""


class Prefixes:
    """Keys and values by weights and token ids, within a memory budget; those used last stay.

    Args:
        model: whose. budget: bytes to keep; 0 keeps nothing.
    """

    def __init__(self, model: Any, budget: int = BUDGET) -> None:
        self.model, self.budget = model, budget
        self.bytes = 0
        self._kept: OrderedDict[Any, Entry] = OrderedDict()

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
            pair = (torch.cat([found[name][number][part] for name in distinct])[places] for part in (0, 1))
            cache.update(*pair, number)
        return StoredPrefix(tuple(ids), cache)

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
            [(layer.keys[row : row + 1].clone(), layer.values[row : row + 1].clone()) for layer in cache.layers]
            for row in range(len(rows))
        ]

    def _store(self, name: Any, entry: Entry) -> None:
        size = _bytes(entry)
        if size > self.budget:
            return
        while self._kept and self.bytes + size > self.budget:
            self.bytes -= _bytes(self._kept.popitem(last=False)[1])
        self._kept[name] = entry
        self.bytes += size

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
        self.bytes = 0


def _bytes(entry: Entry) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in entry)
