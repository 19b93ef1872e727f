"""Least-recently-used cache with a byte budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LRUCache(Generic[K, V]):
    """Mapping that drops its least recently used entries once they exceed a number of bytes.

    Args:
        max_bytes: budget; 0 keeps nothing. Larger values are never kept.

    Attributes:
        nbytes: size of all entries.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def items(self) -> list[tuple[K, V]]:
        """Return keys and values, least recently used first, without marking them as used."""
        return [(key, value) for key, (value, _) in self._entries.items()]

    def get(self, key: K) -> V | None:
        """Return an entry and mark it as used; None if there is none."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: K, value: V, nbytes: int) -> None:
        """Store a value of ``nbytes`` in place of the key's previous one."""
        self.pop(key)
        if nbytes > self.max_bytes:
            return
        while self.nbytes + nbytes > self.max_bytes:
            self.pop(next(iter(self._entries)))
        self._entries[key] = value, nbytes
        self.nbytes += nbytes

    def pop(self, key: K) -> V | None:
        """Remove an entry and return it; None if there is none."""
        value, nbytes = self._entries.pop(key, (None, 0))
        self.nbytes -= nbytes
        return value

    def clear(self) -> None:
        """Remove all entries."""
        self._entries.clear()
        self.nbytes = 0
