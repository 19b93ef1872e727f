"""Preallocated KV cache for a batch whose rows come and go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

MIN_ROOM = 64
"""Least number of free columns in new buffers."""


@dataclass
class Prefilled:
    """Prompts after a forward pass.

    Attributes:
        cache: keys and values of all prompt tokens, N rows.
        mask: bool [N, P], False at padding.
        logits: [N, V] of the token after each prompt, in the model's dtype.
        lengths: int64 [N], position of the next token: the prompt's length without padding (less in Qwen-VL, where the
            tokens of an image share positions).
        prompt_logits: [N, R, V] after each of the last R columns, if they were requested.
    """

    cache: DynamicCache
    mask: torch.Tensor
    logits: torch.Tensor
    lengths: torch.Tensor
    prompt_logits: torch.Tensor | None = None

    def repeat(self, times: int) -> Prefilled:
        """Repeat every row ``times`` times in place, copies side by side."""
        if times > 1:
            self.cache.batch_repeat_interleave(times)
            self.mask, self.logits, self.lengths = (
                t.repeat_interleave(times, 0) for t in (self.mask, self.logits, self.lengths)
            )
        return self

    def select(self, rows: Sequence[int]) -> Prefilled:
        """Keep only the given rows, in place."""
        if len(rows) < len(self.mask):
            index = torch.tensor(rows, device=self.mask.device)
            self.cache.reorder_cache(index)  # type: ignore[arg-type]
            self.mask, self.logits, self.lengths = (t[index] for t in (self.mask, self.logits, self.lengths))
        return self


def keys_and_values(layer: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [N, heads, P, d] of a filled `DynamicLayer`."""
    assert isinstance(layer, DynamicLayer)
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys, layer.values


@dataclass
class Window:
    """Part of the buffers in use: rows [0, rows), columns [start, end)."""

    rows: int = 0
    start: int = 0
    end: int = 0


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer in two buffers [capacity, heads, width, d], of which a window is in use."""

    def __init__(self, window: Window, like: torch.Tensor, capacity: int, width: int) -> None:
        super().__init__()
        self.window, self.is_initialized = window, True
        self.dtype, self.device = like.dtype, like.device
        self.buffers = [like.new_zeros(capacity, like.shape[1], width, like.shape[3]) for _ in range(2)]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write one token's keys and values [rows, heads, 1, d]; return views of all, [rows, heads, P + 1, d]."""
        rows, start, end = self.window.rows, self.window.start, self.window.end
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, end : end + 1] = states
        keys, values = (buffer[:rows, :, start : end + 1] for buffer in self.buffers)
        return keys, values

    def get_seq_length(self) -> int:
        """Number of cached columns before the current step."""
        return self.window.end - self.window.start

    def resize(self, capacity: int, width: int, shift: int) -> None:
        """Move the window to larger buffers, ``shift`` columns to the right."""
        rows, start, end = self.window.rows, self.window.start, self.window.end
        old = self.buffers
        self.buffers = [buffer.new_zeros(capacity, buffer.shape[1], width, buffer.shape[3]) for buffer in old]
        for buffer, before in zip(self.buffers, old, strict=True):
            buffer[:rows, :, start + shift : end + shift] = before[:rows, :, start:end]

    def copy_row(self, source: int, target: int) -> None:
        """Overwrite a row's columns in use with those of another row."""
        span = slice(self.window.start, self.window.end)
        for buffer in self.buffers:
            buffer[target, :, span] = buffer[source, :, span]


class BatchKVCache:
    """KV cache of the sequences of a decoding batch.

    All rows end at the same column, so that a step writes one column and shorter rows are padded on the left. Layers of
    other kinds than attention over keys and values (linear attention) are taken over from the first prompts; further
    prompts cannot join.

    Attributes:
        cache: argument of the model's forward pass. mask: bool [capacity, width].
        lengths: int64 [capacity], position of each row's next token.
    """

    def __init__(self) -> None:
        self.window = Window()
        self.cache = DynamicCache()
        self.mask = torch.zeros(0, 0, dtype=torch.bool)
        self.lengths = torch.zeros(0, dtype=torch.long)
        self._widths: list[int] = []  # columns of each row, padding between prefix and prompt included
        self._layers: list[PreallocatedLayer] = []
        self._others: list[Any] = []  # layers of other kinds

    def __len__(self) -> int:
        return self.window.rows

    @property
    def nbytes(self) -> int:
        """Size of all buffers."""
        return sum(buffer.nbytes for layer in self._layers for buffer in layer.buffers)

    def append(self, state: Prefilled) -> None:
        """Add prefilled rows after the present ones, by copy."""
        count, columns = state.mask.shape
        window = self.window
        if not window.rows:
            window.start = window.end = 0
        read: list[Any] = self._reserve(state, window.rows + count, columns)
        new = slice(window.rows, window.rows + count)
        for layer, given in zip(self._layers, read, strict=True):
            for buffer, states in zip(layer.buffers, (given.keys, given.values), strict=True):
                # a sliding-window layer has only its last tokens, and later ones attend to no others
                buffer[new, :, window.end - states.shape[2] : window.end] = states
        self.mask[new] = False
        self.mask[new, window.end - columns : window.end] = state.mask.to(self.mask.device)
        self.lengths[new] = state.lengths.to(self.lengths.device)
        self._widths += [columns] * count
        window.rows += count
        self._trim()

    def inputs(self, tokens: torch.Tensor) -> dict[str, Any]:
        """Return the arguments of a forward pass over one token [rows] per row; `advance` must follow the pass."""
        window = self.window
        if window.end + 1 > self.mask.shape[1]:
            self._grow(self.mask.shape[0], window.end - window.start)
        self.mask[: window.rows, window.end] = True
        return {
            "input_ids": tokens[:, None],
            "attention_mask": self.mask[: window.rows, window.start : window.end + 1],
            "position_ids": self.lengths[: window.rows, None],
            "past_key_values": self.cache,
            "use_cache": True,
        }

    def advance(self) -> None:
        """Count the token that a forward pass has appended to every row."""
        self.window.end += 1
        self.lengths[: self.window.rows] += 1
        self._widths = [width + 1 for width in self._widths]

    def remove(self, rows: Sequence[int], wipe: bool = False) -> list[int]:
        """Remove rows; return the previous indices of the remaining ones in their new order.

        Args:
            wipe: zero the rows. Masked values are still multiplied by zero, so non-finite ones would spread.
        """
        order = list(range(self.window.rows))
        for row in sorted(set(rows), reverse=True):
            last = len(order) - 1
            for layer in self._layers:
                if wipe:
                    for buffer in layer.buffers:
                        buffer[row].zero_()
                if row != last:
                    layer.copy_row(last, row)
            if row != last:
                self.mask[row], self.lengths[row] = self.mask[last].clone(), self.lengths[last].clone()
                order[row], self._widths[row] = order[last], self._widths[last]
            order.pop()
            self._widths.pop()
        for other in self._others if order else ():
            other.reorder_cache(torch.tensor(order, device=self.lengths.device))
        self.window.rows = len(order)
        self._trim()
        return order

    def row(self, row: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Copy a row's keys and values [1, heads, tokens, d] of every layer, without padding."""
        used = self.mask[row, : self.window.end].nonzero()[:, 0]
        pairs = ([buffer[row : row + 1].index_select(2, used) for buffer in layer.buffers] for layer in self._layers)
        return [(keys, values) for keys, values in pairs]

    def _trim(self) -> None:
        if not self._others:  # their lengths are fixed
            self.window.start = self.window.end - max(self._widths, default=0)

    def _reserve(self, state: Prefilled, rows: int, columns: int) -> list[Any]:
        """Make room for rows, and columns up to the present one; return the state's attention layers."""
        plain = [type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in state.cache.layers]
        read: list[Any] = [layer for layer, one in zip(state.cache.layers, plain, strict=True) if one]
        if not self.window.rows:
            self._others = [layer for layer, one in zip(state.cache.layers, plain, strict=True) if not one]
        elif not all(plain):
            raise NotImplementedError("sequences cannot join a running batch of a model with linear attention")
        if not self.cache.layers:
            device = state.mask.device
            self.mask = torch.zeros(rows, columns + MIN_ROOM, dtype=torch.bool, device=device)
            self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
            self._layers = [
                PreallocatedLayer(self.window, keys_and_values(layer)[0], rows, columns + MIN_ROOM) for layer in read
            ]
        mine, others = iter(self._layers), iter(self._others)
        self.cache.layers = [next(mine) if one else next(others) for one in plain]
        capacity, width = self.mask.shape
        if not self.window.rows and columns <= width:
            self.window.start = self.window.end = columns
        if rows > capacity or columns > self.window.end:
            self._grow(max(rows, min(2 * capacity, rows + 8)), max(columns, self.window.end - self.window.start))
        return read

    def _grow(self, capacity: int, used: int) -> None:
        """Allocate larger buffers in which the present column is number ``used``."""
        window, width = self.window, used + max(used // 2, MIN_ROOM)
        shift = used - window.end
        for layer in self._layers:
            layer.resize(capacity, width, shift)
        rows, old, new = window.rows, slice(window.start, window.end), slice(window.start + shift, window.end + shift)
        mask, lengths = self.mask.new_zeros(capacity, width), self.lengths.new_zeros(capacity)
        mask[:rows, new], lengths[:rows] = self.mask[:rows, old], self.lengths[:rows]
        self.mask, self.lengths = mask, lengths
        window.start, window.end = new.start, new.stop
