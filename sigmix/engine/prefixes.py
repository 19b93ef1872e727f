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

from sigmix.engine.growing import filled
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
