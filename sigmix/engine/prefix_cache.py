"""Prefill with shared prefixes, and a prefix cache keyed by weights and token ids.

Chat prompts share a prefix (system turn, start of the user's turn), and the answers of one rollout share their prompt.
A batch is therefore a tree: common prefix [1, P], left-padded rests of the prompts [N, R] and, in training, G answers
to each prompt [N·G, C]. Keys and values of each level are computed once and repeated for its children; gradients flow
back through the repetition. Models with linear attention (`Batching.recurrent`) share nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sigmix.engine.kv_cache import Prefilled, join, keys_and_values
from sigmix.models.batching import batching
from sigmix.models.multimodal import embed_inputs, forward_inputs, grid_positions
from sigmix.utils.lru import LRUCache

MIN_SHARED = 8
"""Shortest common prefix that is worth a forward pass of its own."""

Select = Callable[[list[int] | None], None]
"""Restricts the per-row state of adapted layers to the rows with given indices; None: all rows."""

PromptOnly = Callable[[bool | torch.Tensor], AbstractContextManager[None]]
"""State of adapted layers by the mask of prompt tokens, see `sigmix.svf.layer.prompt_only`."""


def everywhere(mask: bool | torch.Tensor) -> AbstractContextManager[None]:
    """Read answers as prompts are read."""
    return nullcontext()


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix that leaves every row at least one token."""
    if len(rows) < 2:
        return 0
    first, last = min(rows, key=list), max(rows, key=list)
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return max(min(shared, min(map(len, rows)) - 1), 0)


def right_pad(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids int64 [N, R] and mask bool [N, R] of right-padded rows."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=device)
    return ids, torch.arange(width, device=device) < torch.tensor([[len(row)] for row in rows], device=device)


def left_pad(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids int64 [N, R] and mask bool [N, R] of left-padded rows."""
    width = max(map(len, rows))
    ids = torch.tensor([[fill] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=device)
    return ids, mask


@dataclass
class StoredPrefix:
    """Keys and values of the first ``length`` tokens of a prompt, a cache of one row."""

    length: int
    cache: DynamicCache


def read_prefix(
    model: Any, ids: Sequence[int], cache: DynamicCache, rows: int = 1, all_logits: bool = False
) -> torch.Tensor:
    """Compute the keys and values of a prefix, or its continuation, in every row of a cache.

    Returns:
        Logits [rows, P, V] after each token; [rows, 0, V] unless ``all_logits``.
    """
    device = model.get_input_embeddings().weight.device
    no_logits = torch.empty(0, dtype=torch.long, device=device)
    batch = torch.tensor([list(ids)] * rows, device=device)
    places = grid_positions(model, [ids])
    positions = None if places is None else places[0][:, None].expand(-1, rows, -1).to(device)
    return model(
        **embed_inputs(model, batch),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=0 if all_logits else no_logits,
    ).logits


def prefill(
    model: Any,
    rows: Sequence[Sequence[int]],
    pad_id: int,
    share: bool = True,
    starts: Sequence[StoredPrefix | None] | None = None,
    select: Select | None = None,
    all_logits: bool = False,
) -> Prefilled:
    """Run prompts through a causal language model in its present adapted state; gradients flow if enabled.

    Args:
        rows: N token-id lists, none empty; for images see `sigmix.models.multimodal`.
        share: compute the common prefix once; False if rows have different weights.
        starts: what was read before of each row, which is longer, under its weights; that of a single row is consumed.
            Several rows must be of a model without sliding windows.
        select: restricts the model to some of its rows, if they have different weights.
        all_logits: keep the logits after every token that is not in a prefix.
    """
    kind = batching(model)
    if kind.recurrent:
        return _read_by_length(model, rows, pad_id, select, all_logits)
    cache, shared = DynamicCache(config=model.config), 0
    if starts is not None and any(starts):
        cache, shared = _join_starts(cache, rows, starts)
    elif share and kind.one_regime(rows) and _can_share(cache, rows, common_prefix(rows)):
        shared = common_prefix(rows)
        with kind.part_of(min(map(len, rows))):
            read_prefix(model, rows[0][:shared], cache)
        cache.batch_repeat_interleave(len(rows))
        _shift(cache, [max(map(len, rows)) - len(row) for row in rows])
    return _read(model, rows, pad_id, cache, shared, all_logits)


def _join_starts(
    empty: DynamicCache, rows: Sequence[Sequence[int]], starts: Sequence[StoredPrefix | None]
) -> tuple[DynamicCache, int]:
    """Return the beginnings of N rows, which are padded on the left, in one cache, and its number of columns.

    Rows with more in their own cache read the rest of it again.
    """
    if len(rows) == 1 and starts[0] is not None:
        return starts[0].cache, starts[0].length
    width = max(map(len, rows))
    columns = width - max(len(row) - (start.length if start else 0) for row, start in zip(rows, starts, strict=True))
    for number in range(len(empty.layers) if columns else 0):
        pairs = [(row, keys_and_values(start.cache.layers[number])) for row, start in enumerate(starts) if start]
        joined = [one.new_zeros(len(rows), one.shape[1], columns, one.shape[3]) for one in pairs[0][1]]
        for row, pair in pairs:
            first = width - len(rows[row])
            for target, one in zip(joined, pair, strict=True):
                target[row, :, first:] = one[0, :, : max(columns - first, 0)]
        empty.update(joined[0], joined[1], number)
    return empty, columns


def _read_by_length(
    model: Any, rows: Sequence[Sequence[int]], pad_id: int, select: Select | None, all_logits: bool
) -> Prefilled:
    """Read prompts without padding, which would enter the states of linear attention."""
    groups: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(len(row), []).append(number)
    states = []
    for group in groups.values():
        if select is not None and len(groups) > 1:
            select(group)
        part, cache = [rows[number] for number in group], DynamicCache(config=model.config)
        states.append(_read(model, part, pad_id, cache, 0, all_logits))
    if select is not None and len(groups) > 1:
        select(None)
    order = [number for group in groups.values() for number in group]
    return join(states).select([order.index(number) for number in range(len(rows))])


def _read(
    model: Any, rows: Sequence[Sequence[int]], pad_id: int, cache: DynamicCache, shared: int, all_logits: bool
) -> Prefilled:
    """Read left-padded prompts behind their first ``shared`` columns, which the cache has."""
    device = model.get_input_embeddings().weight.device
    ids, mask = left_pad(rows, pad_id, device)
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    if (places := grid_positions(model, rows)) is not None:
        positions = positions.expand(3, -1, -1).clone()
        for number, own in enumerate(places):
            positions[:, number, positions.shape[2] - own.shape[1] :] = own.to(device)
            lengths[number] = own.max() + 1
    kind = batching(model)
    arguments: dict[str, Any] = {
        **embed_inputs(model, ids[:, shared:]),
        "attention_mask": mask if not bool(mask.all()) else None,
        "position_ids": positions[..., shared:],
        kind.cache_argument: cache,
    }
    out = model(**arguments, use_cache=True, logits_to_keep=0 if all_logits else 1)
    return Prefilled(cache, mask, out.logits[:, -1], lengths, out.logits if all_logits else None)


def _shift(cache: DynamicCache, padding: Sequence[int]) -> None:
    """Move each row's keys and values to the right by its padding; those beyond the end are read again.

    So a row has its padding on the left only, and columns are as far apart as tokens.
    """
    for layer in cache.layers if any(padding) else ():
        if not isinstance(layer, DynamicLayer) or layer.keys is None:
            continue
        columns = torch.arange(layer.keys.shape[2], device=layer.keys.device)
        places = (columns - torch.tensor(padding, device=columns.device)[:, None]).clamp_min(0)[:, None, :, None]
        keys, values = keys_and_values(layer)
        layer.keys, layer.values = (
            one.gather(2, places.expand(-1, one.shape[1], -1, one.shape[3])) for one in (keys, values)
        )


def _can_share(cache: DynamicCache, rows: Sequence[Sequence[int]], shared: int) -> bool:
    """Return True unless the prefix is short, or padded rows would need tokens that a sliding window has dropped."""
    windows = [one.sliding_window for one in cache.layers if isinstance(one, DynamicSlidingWindowLayer)]
    return shared >= MIN_SHARED and (len(set(map(len, rows))) == 1 or all(shared < window for window in windows))


def answer_logits(model: Any, state: Prefilled, answers: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return logits [N, C, V] that predict each answer token.

    Args:
        state: prompts read by `prefill`; its cache is consumed.
        answers: int64 [N, C], right-padded. mask: bool [N, C].
    """
    first = state.logits.unsqueeze(1)
    if answers.shape[1] < 2:
        return first[:, : answers.shape[1]]
    read = mask[:, 1:]  # the last token of an answer predicts nothing
    out = model(
        input_ids=answers[:, :-1].contiguous(),
        attention_mask=torch.cat([state.mask, read], dim=1),
        position_ids=state.lengths.unsqueeze(1) + (read.long().cumsum(1) - 1).clamp_min(0),
        past_key_values=state.cache,
        use_cache=True,
    )
    return torch.cat([first, out.logits], dim=1)


def needs_one_pass(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[int]) -> bool:
    """Return True if `one_pass_logits` must take the place of `answer_logits`.

    Args:
        answers: length of the answer to each prompt.
    """
    kind = batching(model)
    pairs = zip(prompts, answers, strict=True)
    return kind.recurrent or any(kind.regime(len(row)) != kind.regime(len(row) + more - 1) for row, more in pairs)


def one_pass_logits(
    model: Any,
    prompts: Sequence[Sequence[int]],
    answers: torch.Tensor,
    mask: torch.Tensor,
    pad_id: int,
    select: Select | None = None,
    prompt_only: PromptOnly = everywhere,
) -> torch.Tensor:
    """Return logits [N, C, V] that predict each answer token as decoding computes them, in one pass without a cache.

    Args:
        prompts: N token-id lists. answers: int64 [N, C], right-padded. mask: bool [N, C].
        select: restricts the model to some of its rows, if they have different weights.
        prompt_only: state of the model by the mask of prompt tokens.
    """
    kind, counts = batching(model), mask.sum(1).tolist()
    read = [answer[: max(count - 1, 0)] for answer, count in zip(answers.tolist(), counts, strict=True)]
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, read, strict=True)]
    # rows that cross the threshold are read a second time, up to it
    crossing = [row for row, prompt in enumerate(prompts) if kind.regime(len(prompt)) != kind.regime(len(rows[row]))]
    ids, used = right_pad([*rows, *(rows[row][: kind.threshold] for row in crossing)], pad_id, answers.device)
    first = min(map(len, prompts)) - 1
    if select is not None and crossing:
        select([*range(len(rows)), *crossing])
    inputs = forward_inputs(model, ids, used)
    lengths = [len(prompts[row]) for row in [*range(len(rows)), *crossing]]
    is_prompt = torch.arange(ids.shape[1], device=ids.device) < torch.tensor(lengths, device=ids.device)[:, None]
    with prompt_only(is_prompt):
        raw = model(**inputs, use_cache=False, logits_to_keep=ids.shape[1] - first).logits
    if select is not None and crossing:
        select(None)
    columns = [list(range(len(prompt) - 1, len(prompt) - 1 + answers.shape[1])) for prompt in prompts]
    source = [[row] * answers.shape[1] for row in range(len(rows))]
    for number, row in enumerate(crossing):
        early = (kind.threshold or 0) - len(prompts[row]) + 1
        source[row][:early] = [len(rows) + number] * early
    places = (torch.tensor(columns, device=raw.device) - first).clamp_max(raw.shape[1] - 1)
    return raw[torch.tensor(source, device=raw.device), places]


def completion_logits(
    model: Any,
    prompts: Sequence[Sequence[int]],
    answers: torch.Tensor,
    mask: torch.Tensor,
    pad_id: int,
    share: bool = True,
    prompt_only: PromptOnly = everywhere,
    state: Prefilled | None = None,
) -> torch.Tensor:
    """Return logits [N·G, C, V] that predict each token of G answers to each of N prompts; gradients flow if enabled.

    Args:
        answers: int64 [N·G, C], right-padded, those to one prompt side by side. mask: bool [N·G, C].
        share: compute the common prefix once; False: the number of passes does not depend on the data.
        prompt_only: state of the model by the mask of prompt tokens.
        state: the prompts if they were read before; consumed.
    """
    generations = len(answers) // len(prompts)
    each = [prompt for prompt in prompts for _ in range(generations)]
    always = not share and batching(model).threshold is not None
    if always or needs_one_pass(model, each, mask.sum(1).tolist()):
        return one_pass_logits(model, each, answers, mask, pad_id, prompt_only=prompt_only)
    state = (state or prefill(model, prompts, pad_id, share=share)).repeat(generations)
    with prompt_only(False):
        return answer_logits(model, state, answers, mask)


PREFIX_BYTES = 128 << 20
"""Default budget of an engine's prefix cache: the default base's system turn under 250 mixtures."""

Entry = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [1, heads, P, d] of every layer."""


class PrefixCache:
    """LRU cache of prefixes' keys and values, keyed by weights and token ids.

    Args:
        max_bytes: memory budget; 0 keeps nothing.
    """

    def __init__(self, model: Any, max_bytes: int = PREFIX_BYTES) -> None:
        self.model = model
        # values: keys and values, and whether a longer prefix replaces them (turns of a conversation)
        self.entries: LRUCache[tuple[Hashable, tuple[int, ...]], tuple[Entry, bool]] = LRUCache(max_bytes)

    def __len__(self) -> int:
        return len(self.entries)

    def usable(self, ids: Sequence[int]) -> bool:
        """Return True if a prefix is long enough, and the model can continue from one (no sliding windows)."""
        plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=self.model.config).layers)
        return len(ids) >= MIN_SHARED and plain

    def batch(
        self, ids: Sequence[int], keys: Sequence[Hashable], select: Select | None = None
    ) -> list[StoredPrefix] | None:
        """Return a prefix under each row's weights, computed in the model's present state where it is not cached.

        Args:
            ids: the prefix. keys: of the weights of N rows.
            select: restricts the model to some of its rows; None if all rows have the same weights.

        Returns:
            The prefix for each row, in the same cache for the same key; None if it is not `usable`.
        """
        if not self.usable(ids):
            return None
        names = [(key, tuple(ids)) for key in keys]
        distinct = list(dict.fromkeys(names))
        cached = {name: entry[0] for name in distinct if (entry := self.entries.get(name)) is not None}
        missing = [name for name in distinct if name not in cached]
        if missing:
            computed = self._compute(ids, [names.index(name) for name in missing], select)
            cached |= dict(zip(missing, computed, strict=True))
            for name in missing:
                self.entries.put(name, (cached[name], False), _nbytes(cached[name]))
        stored = {name: StoredPrefix(len(ids), self._cache_of(entry, len(ids))) for name, entry in cached.items()}
        return [stored[name] for name in names]

    def longest(self, key: Hashable, ids: Sequence[int]) -> StoredPrefix | None:
        """Return the longest proper prefix of a prompt with which any entry under some weights begins."""
        shared = {
            name: min(common_prefix([ids, (*name[1], -1)]), len(name[1]))
            for name, _ in self.entries.items()
            if name[0] == key
        }
        name = max(shared, key=shared.__getitem__, default=None)
        if name is None or shared[name] < MIN_SHARED or (entry := self.entries.get(name)) is None:
            return None
        return StoredPrefix(shared[name], self._cache_of(entry[0], shared[name]))

    def _cache_of(self, entry: Entry, length: int) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        for number, (keys, values) in enumerate(entry):
            cache.update(keys[:, :, :length], values[:, :, :length], number)
        return cache

    def put(self, key: Hashable, ids: Sequence[int], entry: Entry) -> None:
        """Store a conversation in place of its earlier turns."""
        if not self.usable(ids):
            return
        for name, (_, conversation) in self.entries.items():
            if conversation and name[0] == key and tuple(ids[: len(name[1])]) == name[1]:
                self.entries.pop(name)
        self.entries.put((key, tuple(ids)), (entry, True), _nbytes(entry))

    def _compute(self, ids: Sequence[int], rows: list[int], select: Select | None) -> list[Entry]:
        cache = DynamicCache(config=self.model.config)
        if select is not None:
            select(rows)
        try:
            read_prefix(self.model, ids, cache, len(rows))
        finally:
            if select is not None:
                select(None)
        layers = [keys_and_values(layer) for layer in cache.layers]
        return [
            [(keys[row : row + 1].clone(), values[row : row + 1].clone()) for keys, values in layers]
            for row in range(len(rows))
        ]

    def clear(self) -> None:
        """Remove all entries."""
        self.entries.clear()


def _nbytes(entry: Entry) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in entry)
