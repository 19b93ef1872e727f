"""Continuous batching: sequences join and leave between decoding steps, each under its own mixture.

`Engine.generate`, `Engine.stream` and the server's scheduler run on it. A sequence's tokens do not depend on the others
in its batch, up to the rounding of batched matmuls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from sigmix.engine.generation import DecodingBatch, SequenceState, token_logprobs
from sigmix.engine.prefix_cache import Entry, StoredPrefix, prefill, read_prefix
from sigmix.errors import ConfigError
from sigmix.experts.mix import Mix

if TYPE_CHECKING:
    from sigmix.engine.engine import Engine

CHUNK_TOKENS = 512
"""Prompt tokens that are read between two decoding steps; longer prompts take several chunks."""


class ContinuousBatch(DecodingBatch):
    """Decoding batch of an engine.

    The engine stays in the batch's state between steps; `release` frees it for other uses, and the next step resumes.
    As a context manager it releases the engine at the end.

    Args:
        form: see `Execution.choose`.
        chunked: read long prompts in chunks between the steps, and reuse cached conversations; False: read all prompts
            in one pass.
    """

    def __init__(self, engine: Engine, form: str | None = None, *, chunked: bool = True) -> None:
        super().__init__(engine.model, engine.eos_token_ids)
        self.engine, self.form, self.chunked = engine, form, chunked
        self._pending: list[tuple[SequenceState, DynamicCache, int]] = []  # prompts read up to a number of tokens
        self._finished: list[tuple[Mix, list[int], Entry]] = []  # for the prefix cache, at the next release
        self._stack = ExitStack()
        self._state_id = 0

    def __enter__(self) -> ContinuousBatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __len__(self) -> int:
        return len(self.sequences) + len(self._pending)

    @torch.no_grad()
    def add(self, sequences: Sequence[SequenceState]) -> None:
        """Read prompts and choose their first tokens; long prompts are read during the following steps.

        Prompts must not be empty, and must fit the context together with their answers.
        """
        self.release()
        whole: list[SequenceState] = []
        scored: list[SequenceState] = []
        for one in sequences:
            # a cached prefix has no logits
            reuse = self.chunked and one.on_prompt is None
            prefix = self.engine.cached_prefix(one.prompt_ids, one.mix, self.form) if reuse else None
            if prefix is not None:
                self._pending.append((one, prefix.cache, len(prefix.ids)))
            elif self.chunked and len(one.prompt_ids) > CHUNK_TOKENS:
                self._pending.append((one, DynamicCache(config=self.model.config), 0))
            else:
                (whole if one.on_prompt is None else scored).append(one)
        parts = [*_by_length(scored, CHUNK_TOKENS)]  # few at once: all their logits are in memory
        for part in [*parts, *(_by_length(whole) if self.chunked else [whole])]:
            rows, mixes = [one.prompt_ids for one in part], [one.mix for one in part]
            tokens = sum(map(len, rows))
            self._enter(mixes, 0 if self.chunked else tokens)
            if part[0].on_prompt is None:
                state = self.engine.read(rows, mixes, self._select)
            else:
                state = prefill(self.model, rows, self.engine.pad_id, share=False, all_logits=True)
                assert state.prompt_logits is not None
                for one, logits in zip(part, state.prompt_logits, strict=True):
                    _report_prompt(one, logits[-len(one.prompt_ids) :], 0)
            self.append(part, state)
            if self.chunked:
                self.engine.execution.count_step(tokens)
        if not self._rows:  # the state is not that of the next step
            self.release()

    @torch.no_grad()
    def step(self) -> None:
        """Decode one token of every sequence and read a chunk of the pending prompts."""
        budget = CHUNK_TOKENS
        while self._pending and budget > 0:
            budget -= self._read_chunk(budget)
        if not self.sequences:
            self.release()
            return
        if self._rows is not None and self.engine.state_id != self._state_id:
            raise ConfigError(
                "another call changed the state of this engine during decoding",
                remedy="finish the stream first, or give each stream its own engine and model",
            )
        if self._rows is None or self.engine.execution.count_step(len(self.sequences)):
            self._enter([one.mix for one in self.sequences])
            self._rows = list(range(len(self.sequences)))
        super().step()

    def remove(self, sequences: Sequence[SequenceState]) -> None:
        """Remove sequences at once; those that are not in the batch are ignored."""
        gone = set(map(id, sequences))
        self._pending = [entry for entry in self._pending if id(entry[0]) not in gone]
        for row, one in enumerate(self.sequences):
            if id(one) in gone and one.cache_prefix and one.finish in ("stop", "length"):
                # the last token was chosen, but not read
                read = [*one.prompt_ids, *one.ids][: int(self.kv_cache.lengths[row])]
                self._finished.append((one.mix, read, self.kv_cache.row(row)))
        super().remove(sequences)
        if not self.sequences:
            self.release()

    def release(self) -> None:
        """Return the engine to its own state."""
        self._stack.close()
        self._select = self._rows = None
        finished, self._finished = self._finished, []
        for mix, read, entry in finished:
            self.engine.cache_prefix(read, mix, entry, self.form)

    def _enter(self, mixes: Sequence[Mix], tokens: int = 0) -> None:
        self.release()
        self._select = self._stack.enter_context(self.engine.under(mixes, self.form, tokens))
        self._state_id = self.engine.state_id

    def _read_chunk(self, budget: int) -> int:
        """Read up to ``budget`` tokens of the first pending prompt; return their number."""
        one, cache, done = self._pending[0]
        chunk = one.prompt_ids[done : done + budget]
        self._enter([one.mix])
        self.engine.execution.count_step(len(chunk))
        scored = one.on_prompt is not None
        if done + len(chunk) < len(one.prompt_ids):
            logits = read_prefix(self.model, chunk, cache, all_logits=scored)[0]
            self._pending[0] = (one, cache, done + len(chunk))
            if scored:
                _report_prompt(one, logits, done)
        else:
            self._pending.pop(0)
            start = StoredPrefix(tuple(one.prompt_ids[:done]), cache) if done else None
            share = self._select is None
            state = prefill(self.model, [one.prompt_ids], self.engine.pad_id, share, start, all_logits=scored)
            if state.prompt_logits is not None:
                _report_prompt(one, state.prompt_logits[0], done)
            self.append([one], state)
        return len(chunk)


def _report_prompt(one: SequenceState, logits: torch.Tensor, start: int) -> None:
    """Pass on the log-probabilities of prompt tokens, given the logits [R, V] after the tokens from ``start`` on."""
    following = one.prompt_ids[start + 1 : start + 1 + len(logits)]
    if one.on_prompt is not None and following:
        tokens = torch.tensor(following, device=logits.device)
        one.on_prompt(token_logprobs(logits[: len(following)], tokens, one.top_logprobs))


def _by_length(sequences: Sequence[SequenceState], limit: float = float("inf")) -> Iterator[list[SequenceState]]:
    """Group sequences: padding is at most as long as the prompts, and a group has at most ``limit`` tokens."""
    part: list[SequenceState] = []
    for one in sorted(sequences, key=lambda one: len(one.prompt_ids)):
        width = len(one.prompt_ids)
        if part and (width > 2 * len(part[0].prompt_ids) or width * (len(part) + 1) > limit):
            yield part
            part = []
        part.append(one)
    if part:
        yield part
