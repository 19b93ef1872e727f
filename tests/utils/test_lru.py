"""LRU cache: byte budget, order of use, replacement."""

from __future__ import annotations

from sigmix.utils.lru import LRUCache


def test_the_least_recently_used_entries_leave():
    cache: LRUCache[str, int] = LRUCache(10)
    for number, name in enumerate("abc"):
        cache.put(name, number, 3)
    assert cache.get("a") == 0
    cache.put("d", 3, 4)  # drops b
    assert ("a" in cache, "b" in cache, cache.get("b")) == (True, False, None)
    assert (len(cache), cache.nbytes) == (3, 10)
    assert [key for key, _ in cache.items()] == ["c", "a", "d"]


def test_replacing_a_value_counts_it_once_and_a_large_one_is_not_kept():
    cache: LRUCache[str, int] = LRUCache(10)
    cache.put("a", 1, 6)
    cache.put("a", 2, 7)
    assert (cache.get("a"), cache.nbytes) == (2, 7)
    cache.put("b", 3, 11)
    assert (cache.get("a"), cache.get("b")) == (2, None)
    cache.put("a", 4, 11)
    assert (cache.get("a"), cache.nbytes) == (None, 0)


def test_pop_clear_and_an_empty_budget():
    cache: LRUCache[str, int] = LRUCache(10)
    cache.put("a", 1, 5)
    assert cache.pop("a") == 1
    assert cache.pop("a") is None
    cache.put("a", 1, 5)
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)
    none: LRUCache[str, int] = LRUCache(0)
    none.put("a", 1, 1)
    assert len(none) == 0
