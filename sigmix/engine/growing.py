"""Keys and values with room to grow: a decoding step writes its own instead of copying all that were there before."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def filled(layer: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [N, heads, P, d] of a `DynamicLayer` that has some."""
    assert isinstance(layer, DynamicLayer)
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys, layer.values


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` in buffers [N, heads, P + room, d]; ``keys`` and ``values`` are views of what is filled.

    Values are the same as a plain layer's; gradients are not supported. Selecting rows copies them, and the next
    update makes new buffers.

    Args:
        layer: a filled layer, which is taken over. room: tokens that fit without new buffers.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, layer: DynamicLayer, room: int) -> None:
        super().__init__()
        self.room = room
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self.keys, self.values = filled(layer)
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append keys and values [N, heads, T, d]; returns all."""
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        grown = self._buffers
        if grown is None or end > grown[0].shape[-2] or self.keys.data_ptr() != grown[0].data_ptr():
            grown = (self._larger(self.keys, end), self._larger(self.values, end))
        grown[0][:, :, start:end] = key_states
        grown[1][:, :, start:end] = value_states
        self._buffers = grown
        self.keys, self.values = grown[0][:, :, :end], grown[1][:, :, :end]
        return self.keys, self.values

    def _larger(self, states: torch.Tensor, end: int) -> torch.Tensor:
        rows, heads, length, width = states.shape
        buffer = states.new_empty(rows, heads, max(end, length + self.room), width)
        buffer[:, :, :length] = states
        return buffer


def growing(cache: DynamicCache, room: int) -> None:
    """Give a cache's plain layers room for some tokens, in place; sliding and other layers stay as they are."""
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized and not filled(layer)[0].requires_grad:
            cache.layers[number] = GrowingLayer(layer, room)
