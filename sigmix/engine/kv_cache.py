"""Preallocated KV cache for a batch that rows join and leave."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

MIN_ROOM = 64
"""Least number of free columns in new buffers."""

STATE_FIELDS = (
    "conv_states", "recurrent_states", "is_conv_states_initialized", "is_recurrent_states_initialized",
    "has_previous_state", "conv_kernel_size",
)  # fmt: skip
"""Fields of a `LinearAttentionCacheLayerMixin` that belong to its rows."""


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
        return self if times == 1 else self.select([row for row in range(len(self.mask)) for _ in range(times)])

    def detached(self) -> Prefilled:
        """Return a copy without gradients, which shares its tensors until either of the two is changed."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        copied = Prefilled(cache, self.mask, self.logits.detach(), self.lengths)
        for layer in _attention(copied):
            layer.keys, layer.values = (states.detach() for states in keys_and_values(layer))
        return copied

    def select(self, rows: Sequence[int]) -> Prefilled:
        """Keep only the given rows, in place and in their order."""
        if list(rows) != list(range(len(self.mask))):
            index = torch.tensor(rows, device=self.mask.device)
            self.cache.reorder_cache(index)  # type: ignore[arg-type]
            self.mask, self.logits, self.lengths = (t[index] for t in (self.mask, self.logits, self.lengths))
            self.prompt_logits = None if self.prompt_logits is None else self.prompt_logits[index]
        return self


def join(states: Sequence[Prefilled]) -> Prefilled:
    """Join the rows of several prefilled batches, padded on the left; consumes them."""
    first = states[0]
    if len(states) == 1:
        return first
    for layer, *others in zip(*(state.cache.layers for state in states), strict=True):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            for other in others:
                append_states(layer, other)
        if isinstance(layer, DynamicLayer) and layer.keys is not None:
            parts = [keys_and_values(one) for one in (layer, *others)]
            layer.keys, layer.values = (_join_columns([pair[part] for pair in parts], -2) for part in (0, 1))
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = max(one.cumulative_length for one in (layer, *others))
    mask = _join_columns([state.mask for state in states], -1)
    logits, lengths = (torch.cat([getattr(state, name) for state in states]) for name in ("logits", "lengths"))
    every = [state.prompt_logits for state in states if state.prompt_logits is not None]
    return Prefilled(first.cache, mask, logits, lengths, _join_columns(every, -2) if every else None)


def _join_columns(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenate rows, with zeros on the left of the shorter ones in dimension ``dim``."""
    width = max(part.shape[dim] for part in parts)
    blank = [0, 0] * (-dim - 1)
    return torch.cat([torch.nn.functional.pad(part, [*blank, width - part.shape[dim], 0]) for part in parts])


def append_states(layer: Any, other: Any) -> None:
    """Append the rows of another layer's convolution and recurrent states."""
    for mine, more in ((layer.conv_states, other.conv_states), (layer.recurrent_states, other.recurrent_states)):
        for number, state in mine.items():
            if state is not None:
                mine[number] = torch.cat([state, more[number]])


def keys_and_values(layer: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [N, heads, P, d] of a filled `DynamicLayer`; their widths d may differ."""
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

    def __init__(self, window: Window, like: DynamicLayer, capacity: int, width: int) -> None:
        super().__init__()
        self.window, self.is_initialized = window, True
        pair = keys_and_values(like)
        self.dtype, self.device = pair[0].dtype, pair[0].device
        self.buffers = [one.new_zeros(capacity, one.shape[1], width, one.shape[3]) for one in pair]

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


class PreallocatedHybridLayer(PreallocatedLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc, override]
    """Keys and values in buffers, and states of linear attention."""


class BatchKVCache:
    """KV cache of the sequences of a decoding batch.

    All rows end at the same column, so that a step writes one column and shorter rows are padded on the left. States of
    linear attention and convolutions have a fixed size per row, and are concatenated.

    Args:
        argument: name of the cache in the model's forward pass.

    Attributes:
        cache: argument of the model's forward pass. mask: bool [capacity, width].
        lengths: int64 [capacity], position of each row's next token.
    """

    def __init__(self, argument: str = "past_key_values") -> None:
        self.argument = argument
        self.window = Window()
        self.cache = DynamicCache()
        self.mask = torch.zeros(0, 0, dtype=torch.bool)
        self.lengths = torch.zeros(0, dtype=torch.long)
        self._widths: list[int] = []  # columns of each row, padding between prefix and prompt included
        self._layers: list[PreallocatedLayer] = []
        self._states: list[Any] = []  # layers with states of a fixed size

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
        self._reserve(state, window.rows + count, columns)
        new = slice(window.rows, window.rows + count)
        for layer, given in zip(self._layers, _attention(state), strict=True):
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
            # without attention there is no padding, and Mamba multiplies the token's state by the whole mask
            "attention_mask": self.mask[: window.rows, window.start : window.end + 1] if self._layers else None,
            "position_ids": self.lengths[: window.rows, None],
            self.argument: self.cache,
            "use_cache": True,
        }

    def columns(self) -> list[torch.Tensor]:
        """Keys and values [rows, heads, P, d] of every layer in turn, up to the column that the present step writes."""
        rows, span = slice(self.window.rows), slice(self.window.start, self.window.end + 1)
        return [buffer[rows, :, span] for layer in self._layers for buffer in layer.buffers]

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
        for layer in self._states if order else ():
            index: Any = torch.tensor(order, device=self.lengths.device)
            LinearAttentionCacheLayerMixin.reorder_cache(layer, index)
        self.window.rows = len(order)
        self._trim()
        return order

    def row(self, row: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Copy a row's keys and values [1, heads, tokens, d] of every layer, without padding."""
        used = self.mask[row, : self.window.end].nonzero()[:, 0]
        pairs = ([buffer[row : row + 1].index_select(2, used) for buffer in layer.buffers] for layer in self._layers)
        return [(keys, values) for keys, values in pairs]

    def _trim(self) -> None:
        self.window.start = self.window.end - max(self._widths, default=0)

    def _reserve(self, state: Prefilled, rows: int, columns: int) -> None:
        """Make room for rows, and columns up to the present one; take over or append states."""
        if not self.cache.layers:
            device = state.mask.device
            self.mask = torch.zeros(rows, columns + MIN_ROOM, dtype=torch.bool, device=device)
            self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
            self._layers = [
                (PreallocatedHybridLayer if isinstance(layer, LinearAttentionCacheLayerMixin) else PreallocatedLayer)(
                    self.window, layer, rows, columns + MIN_ROOM
                )
                for layer in _attention(state)
            ]
            mine = iter(self._layers)
            self.cache.layers = [next(mine) if _is_attention(layer) else layer for layer in state.cache.layers]
            self._states = [one for one in self.cache.layers if isinstance(one, LinearAttentionCacheLayerMixin)]
        given = [one for one in state.cache.layers if isinstance(one, LinearAttentionCacheLayerMixin)]
        for layer, new in zip(self._states, given, strict=True):
            if self.window.rows:
                append_states(layer, new)
            else:
                for name in STATE_FIELDS:
                    setattr(layer, name, getattr(new, name))
        capacity, width = self.mask.shape
        if not self.window.rows and columns <= width:
            self.window.start = self.window.end = columns
        if rows > capacity or columns > self.window.end:
            self._grow(max(rows, min(2 * capacity, rows + 8)), max(columns, self.window.end - self.window.start))

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


def _is_attention(layer: Any) -> bool:
    return isinstance(layer, DynamicLayer) and layer.keys is not None


def _attention(state: Prefilled) -> list[Any]:
    """Layers of a prefilled cache with keys and values."""
    return [layer for layer in state.cache.layers if _is_attention(layer)]
