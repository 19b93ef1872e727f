"""Preallocated KV cache: holds what a plain cache does while rows join, leave and decode."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from sigmix.engine.kv_cache import BatchKVCache, Prefilled

LAYERS, HEADS, WIDTH = 2, 2, 4


def prefilled(lengths, seed=0):
    """Left-padded rows with random keys and values."""
    draw = torch.Generator().manual_seed(seed)
    columns = max(lengths)
    cache = DynamicCache()
    for layer in range(LAYERS):
        cache.update(*(torch.randn(len(lengths), HEADS, columns, WIDTH, generator=draw) for _ in range(2)), layer)
    mask = torch.arange(columns) >= columns - torch.tensor(lengths)[:, None]
    return Prefilled(cache, mask, torch.zeros(len(lengths), 9), torch.tensor(lengths))


def contents(state, row):
    """Keys and values of a row's own tokens, by layer."""
    used = state.mask[row]
    return [(layer.keys[row][:, used], layer.values[row][:, used]) for layer in state.cache.layers]


def decode(cache, rows, draw):
    """One step with random keys and values; extends the plain copies in ``rows``."""
    cache.inputs(torch.zeros(len(rows), dtype=torch.long))
    for number in range(LAYERS):
        new = [torch.randn(len(rows), HEADS, 1, WIDTH, generator=draw) for _ in range(2)]
        cache.cache.layers[number].update(*new)
        for row, plain in enumerate(rows):
            keys, values = plain[number]
            plain[number] = (torch.cat([keys, new[0][row]], 1), torch.cat([values, new[1][row]], 1))
    cache.advance()


def check(cache, rows):
    assert len(cache) == len(rows)
    for row, plain in enumerate(rows):
        for (keys, values), (plain_keys, plain_values) in zip(cache.row(row), plain, strict=True):
            assert torch.equal(keys[0], plain_keys)
            assert torch.equal(values[0], plain_values)
        assert int(cache.lengths[row]) == plain[0][0].shape[1]


@pytest.mark.parametrize("steps", [3, 150])
def test_rows_join_decode_and_leave(steps):
    cache, draw, rows = BatchKVCache(), torch.Generator().manual_seed(1), []
    for seed, lengths in enumerate([[5, 3], [9], [2, 2, 70]]):
        state = prefilled(lengths, seed)
        rows += [contents(state, row) for row in range(len(lengths))]
        cache.append(state)
        check(cache, rows)
        for _ in range(steps):
            decode(cache, rows, draw)
        order = cache.remove([0], wipe=seed == 1)
        rows = [rows[row] for row in order]
        check(cache, rows)
    before = cache.nbytes
    cache.remove(range(len(rows)))
    cache.append(prefilled([4]))
    assert (len(cache), cache.nbytes) == (1, before)


def test_select_and_repeat():
    state, same = prefilled([4, 2, 3]), prefilled([4, 2, 3])
    picked = state.select([2, 0]).repeat(2)
    assert picked.lengths.tolist() == [3, 3, 4, 4]
    for row, source in enumerate([2, 2, 0, 0]):
        for ours, plain in zip(contents(picked, row), contents(same, source), strict=True):
            assert all(map(torch.equal, ours, plain))
