"""A cache with room holds what a plain one does, through growth, row selection and more growth."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from sigmix.engine.kv_cache import GrowingLayer, growing


def filled(tokens=5, rows=3):
    draw = torch.Generator().manual_seed(0)
    cache = DynamicCache()
    for layer in range(2):
        cache.update(*(torch.randn(rows, 2, tokens, 4, generator=draw) for _ in range(2)), layer)
    return cache


@pytest.mark.parametrize("room", [0, 1, 3, 100])
def test_the_same_as_a_plain_cache(room):
    ours, plain = filled(), filled()
    growing(ours, room)
    assert all(isinstance(layer, GrowingLayer) for layer in ours.layers)
    draw = torch.Generator().manual_seed(1)
    for step in range(6):
        if step == 3:
            keep = torch.tensor([2, 0])
            ours.batch_select_indices(keep)
            plain.batch_select_indices(keep)
        count = 2 if step == 4 else 1
        for layer in range(2):
            new = [torch.randn(len(plain.layers[0].keys), 2, count, 4, generator=draw) for _ in range(2)]
            for a, b in zip(ours.update(*new, layer), plain.update(*new, layer), strict=True):
                assert torch.equal(a, b)
        assert ours.get_seq_length() == plain.get_seq_length()


def test_a_step_within_the_room_copies_nothing():
    cache = filled()
    growing(cache, 4)
    new = torch.ones(3, 2, 1, 4)
    first = cache.update(new, new, 0)[0].data_ptr()
    assert cache.update(new, new, 0)[0].data_ptr() == first


def test_layers_of_other_kinds_and_with_gradients_stay(tiny):
    sliding = DynamicCache(config=tiny("gemma3", num_hidden_layers=7).config)
    growing(sliding, 4)
    assert not any(isinstance(layer, GrowingLayer) for layer in sliding.layers if layer.is_sliding)
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 2, 4, requires_grad=True), torch.ones(1, 1, 2, 4), 0)
    growing(cache, 4)
    assert not isinstance(cache.layers[0], GrowingLayer)
