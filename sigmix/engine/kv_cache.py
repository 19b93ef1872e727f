"""Keys and values with room to grow: a decoding step writes its own instead of copying all that were there before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


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


# --- Keys and values of rows that come and go while the others decode.


ROOM = 64
"""Columns of room for coming tokens in new buffers, at least."""


@dataclass
class Window:
    """Rows [0, rows) and columns [start, end) of the buffers are in use."""

    rows: int = 0
    start: int = 0
    end: int = 0


class SlotLayer(DynamicLayer):
    """One layer's keys and values [capacity, heads, width, d], of which a window is in use."""

    def __init__(self, window: Window, like: torch.Tensor, capacity: int, width: int) -> None:
        super().__init__()
        self.window, self.is_initialized = window, True
        self.dtype, self.device = like.dtype, like.device
        self.buffers = [like.new_zeros(capacity, like.shape[1], width, like.shape[3]) for _ in range(2)]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write the step's keys and values [rows, heads, 1, d]; returns all [rows, heads, end - start + 1, d]."""
        rows, start, end = self.window.rows, self.window.start, self.window.end
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, end : end + 1] = states
        keys, values = (buffer[:rows, :, start : end + 1] for buffer in self.buffers)
        return keys, values

    def get_seq_length(self) -> int:
        """Columns that were in use before this step."""
        return self.window.end - self.window.start


class Slots:
    """Rows under way, with what they have read.

    Attributes:
        cache: for the model's pass. mask: bool [capacity, width]. lengths: tokens that each row has read, which is the
            position of its next one.
    """

    def __init__(self) -> None:
        self.window = Window()
        self.cache = DynamicCache()
        self.mask = torch.zeros(0, 0, dtype=torch.bool)
        self.lengths = torch.zeros(0, dtype=torch.long)
        self._widths: list[int] = []  # columns that each row takes, gaps among them

    def __len__(self) -> int:
        return self.window.rows

    @property
    def width(self) -> int:
        """Columns in use: those of the longest row."""
        return self.window.end - self.window.start

    @property
    def _layers(self) -> list[Any]:
        """The cache's layers, which have `buffers` once there are rows."""
        return self.cache.layers

    def bytes(self) -> int:
        """Of all buffers."""
        return sum(buffer.nbytes for layer in self._layers for buffer in layer.buffers)

    def join(self, state: Prefilled) -> None:
        """Add rows that `prefill` has read, behind those that are there; its cache may be any, and is not changed."""
        count, columns = state.mask.shape
        window = self.window
        if not window.rows:
            window.start = window.end = 0
        self._reserve(state, window.rows + count, columns)
        new = slice(window.rows, window.rows + count)
        span = slice(window.end - columns, window.end)
        read: list[Any] = state.cache.layers
        for layer, given in zip(self._layers, read, strict=True):
            for buffer, states in zip(layer.buffers, (given.keys, given.values), strict=True):
                # a sliding layer has kept its last tokens only; the others are out of every later token's sight
                buffer[new, :, window.end - states.shape[2] : window.end] = states
        self.mask[new] = False
        self.mask[new, span] = state.mask.to(self.mask.device)
        self.lengths[new] = state.lengths.to(self.lengths.device)
        self._widths += [columns] * count
        window.rows += count
        window.start = window.end - max(self._widths)

    def inputs(self, tokens: torch.Tensor) -> dict[str, Any]:
        """Arguments of a pass that reads one more token [rows] of every row; call `advance` after it."""
        window = self.window
        self._make_room(1)
        self.mask[: window.rows, window.end] = True
        return {
            "input_ids": tokens[:, None],
            "attention_mask": self.mask[: window.rows, window.start : window.end + 1],
            "position_ids": self.lengths[: window.rows, None],
            "past_key_values": self.cache,
            "use_cache": True,
        }

    def advance(self) -> None:
        """The pass is done: every row is a token longer."""
        self.window.end += 1
        self.lengths[: self.window.rows] += 1
        self._widths = [width + 1 for width in self._widths]

    def leave(self, places: Sequence[int], wipe: bool = False) -> list[int]:
        """Take rows out; returns where the rows that stay were, in the order in which they now are.

        Args:
            wipe: forget what the rows held. What is masked is still multiplied by zero, and NaN times zero is NaN, so
                a row whose values are not finite must leave nothing behind.
        """
        order = list(range(self.window.rows))
        span = slice(self.window.start, self.window.end)
        buffers = [buffer for layer in self._layers for buffer in layer.buffers]
        for place in sorted(set(places), reverse=True):
            last = len(order) - 1
            for buffer in buffers if wipe else ():
                buffer[place].zero_()
            if place != last:
                for buffer in buffers:
                    buffer[place, :, span] = buffer[last, :, span]
                self.mask[place], self.lengths[place] = self.mask[last].clone(), self.lengths[last].clone()
                order[place], self._widths[place] = order[last], self._widths[last]
            order.pop()
            self._widths.pop()
        self.window.rows = len(order)
        self.window.start = self.window.end - max(self._widths, default=0)
        return order

    def row(self, place: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Copies of a row's keys and values [1, heads, tokens, d] of every layer, gaps left out."""
        used = self.mask[place, : self.window.end].nonzero()[:, 0]
        return [
            tuple(buffer[place : place + 1].index_select(2, used) for buffer in layer.buffers) for layer in self._layers
        ]

    # ------------------------------------------------------------------ room

    def _reserve(self, state: Prefilled, rows: int, columns: int) -> None:
        """Buffers with so many rows, and so many columns up to the present one."""
        read: list[Any] = state.cache.layers
        first = read[0].keys
        if not self._layers:
            self.mask = torch.zeros(rows, columns + ROOM, dtype=torch.bool, device=first.device)
            self.lengths = torch.zeros(rows, dtype=torch.long, device=first.device)
            self._layers.extend(SlotLayer(self.window, layer.keys, rows, columns + ROOM) for layer in read)
        capacity, width = self.mask.shape
        if not self.window.rows and columns <= width:
            self.window.start = self.window.end = columns
        if rows > capacity or columns > self.window.end:
            self._grow(max(rows, min(2 * capacity, rows + 8)), max(columns, self.width))

    def _make_room(self, columns: int) -> None:
        if self.window.end + columns > self.mask.shape[1]:
            self._grow(self.mask.shape[0], self.width)

    def _grow(self, capacity: int, used: int) -> None:
        """New buffers in which the present column is number ``used``, with as much room behind it."""
        window, width = self.window, used + max(used // 2, ROOM)
        rows, old = slice(window.rows), slice(window.start, window.end)
        new = slice(used - self.width, used)
        mask = self.mask.new_zeros(capacity, width)
        mask[rows, new] = self.mask[rows, old]
        lengths = self.lengths.new_zeros(capacity)
        lengths[rows] = self.lengths[rows]
        for layer in self._layers:
            made = []
            for buffer in layer.buffers:
                larger = buffer.new_zeros(capacity, buffer.shape[1], width, buffer.shape[3])
                larger[rows, :, new] = buffer[rows, :, old]
                made.append(larger)
            layer.buffers = made
        self.mask, self.lengths = mask, lengths
        window.start, window.end = new.start, new.stop
