"""Continuous batching: sequences join and leave between decoding steps, each under its own mixture.

`Engine.generate`, `Engine.stream` and the server's scheduler run on it. A sequence's tokens do not depend on the others
in its batch, up to the rounding of batched matmuls.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from sigmix.engine.generation import DecodingBatch, SequenceState, token_logprobs
from sigmix.engine.kv_cache import Prefilled
from sigmix.engine.prefix_cache import Entry, StoredPrefix, prefill, read_prefix
from sigmix.errors import ConfigError
from sigmix.experts.mix import Mix

if TYPE_CHECKING:
    from sigmix.engine.engine import Engine

log = logging.getLogger(__name__)

CHUNK_TOKENS = 512
"""Prompt tokens that are read between two decoding steps; longer prompts take several chunks."""


class ContinuousBatch(DecodingBatch):
    """Decoding batch of an engine.

    The engine stays in the batch's state between steps; `release` frees it for other uses, and the next step resumes.
    As a context manager it releases the engine at the end.

    Args:
        form: see `Execution.choose`.
        chunked: read long prompts in chunks between the steps, and reuse cached conversations; False: read all prompts
            in one pass. Models with linear attention always read a prompt in one pass.
        isolate: end a sequence with an error where its forward passes raise, and continue the others; False: raise.
    """

    def __init__(
        self, engine: Engine, form: str | None = None, *, chunked: bool = True, isolate: bool = False
    ) -> None:
        super().__init__(engine.model, engine.eos_token_ids, whole=engine.execution.whole)
        self.engine, self.form, self.chunked, self.isolate = engine, form, chunked, isolate
        self._limit = float("inf")  # of sequences that decode together; the pending ones wait
        self._failed = False  # the last step
        self._pending: list[tuple[SequenceState, DynamicCache, int]] = []  # prompts read up to a number of tokens
        self._finished: list[tuple[SequenceState, list[int], Entry]] = []  # for the prefix cache, at the next release
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
            elif self.chunked and len(one.prompt_ids) > CHUNK_TOKENS and not self.engine.batching.recurrent:
                self._pending.append((one, DynamicCache(config=self.model.config), 0))
            else:
                (whole if one.on_prompt is None else scored).append(one)
        # those that are scored in small parts: all their logits are in memory
        parts = [*_parts(scored, CHUNK_TOKENS), *(_parts(whole) if self.chunked else [whole])]
        for part in parts:
            with self._recovering(part):
                self._read(part)
        if not self._rows:  # the state is not that of the next step
            self.release()

    def append(self, sequences: Sequence[SequenceState], state: Prefilled) -> None:
        """Add prefilled sequences and choose their first tokens."""
        super().append(sequences, state)
        if not all(map(self._same_weights, sequences)):
            self._rows = None

    def _same_weights(self, one: SequenceState) -> bool:
        """Return True if a sequence's prompt and answer are computed with the same weights."""
        return self.engine.execution.decoding(one.mix) == one.mix

    @torch.no_grad()
    def step(self) -> None:
        """Decode one token of every sequence and read a chunk of the pending prompts."""
        budget = CHUNK_TOKENS
        while self._pending and budget > 0 and len(self.sequences) < self._limit:
            with self._recovering([self._pending[0][0]]):
                budget -= self._read_chunk(budget)
        if not self._pending:
            self._limit = float("inf")
        if not self.sequences:
            self.release()
            return
        if self._rows is not None and self.engine.state_id != self._state_id:
            raise ConfigError(
                "another call changed the state of this engine during decoding",
                remedy="finish the stream first, or give each stream its own engine and model",
            )
        with self._recovering():
            if self._rows is None or self.engine.execution.count_step(len(self.sequences)):
                self._enter([self.engine.execution.decoding(one.mix) for one in self.sequences])
                self._rows = list(range(len(self.sequences)))
            super().step()
            self._failed = False

    def remove(self, sequences: Sequence[SequenceState]) -> None:
        """Remove sequences at once; those that are not in the batch are ignored."""
        gone = set(map(id, sequences))
        self._pending = [entry for entry in self._pending if id(entry[0]) not in gone]
        for row, one in enumerate(self.sequences):
            kept = one.cache_prefix and not self.engine.batching.recurrent
            if id(one) in gone and kept and one.finish in ("stop", "length"):
                # the last token was chosen, but not read
                read = one.token_ids[: int(self.kv_cache.lengths[row])]
                self._finished.append((one, read, self.kv_cache.row(row)))
        running = list(self.sequences)
        try:
            super().remove(sequences)
        except Exception:
            if not self.isolate:
                raise
            log.warning("sequences could not be removed; the others are read again", exc_info=True)
            self.clear()
            self._read_again([one for one in running if id(one) not in gone])
        if not self.sequences:
            self.release()

    def release(self) -> None:
        """Return the engine to its own state."""
        self._stack.close()
        self._select = self._rows = None
        finished, self._finished = self._finished, []
        for one, read, entry in finished:
            try:
                if not self._same_weights(one):  # as part of a longer prompt the answer has other keys and values
                    end = len(one.prompt_ids)
                    read, entry = read[:end], [(keys[:, :, :end], values[:, :, :end]) for keys, values in entry]
                self.engine.cache_prefix(read, one.mix, entry, self.form)
            except Exception:
                log.warning("a conversation was not cached", exc_info=True)

    @contextmanager
    def _recovering(self, joining: Sequence[SequenceState] = ()) -> Iterator[None]:
        """Isolate an error: the sequence that causes it fails, and the others continue.

        A single sequence fails at once. Several are read again, each alone, from prompt and generated tokens (vLLM's
        preemption by recomputation). If the step after that fails too, half of them wait until others have finished:
        the batch may be too large for the memory.

        Args:
            joining: sequences that are read; empty: the running ones decode.
        """
        before, running = [len(one.ids) for one in joining], list(self.sequences)
        try:
            yield
        except Exception as error:
            if not self.isolate:
                raise
            log.warning("a forward pass failed", exc_info=True)
            self.release()
            suspects = list(joining or [one for one in running if not one.finish])
            self._pending = [entry for entry in self._pending if entry[0] not in suspects]
            if joining and before == [len(one.ids) for one in joining]:
                again = suspects  # the running ones are untouched
            else:
                again = list(dict.fromkeys([*running, *joining]))
                self.clear()
            if len(suspects) == 1:
                suspects[0].fail(error)
                self._limit = float("inf")
            elif not joining:
                self._limit = max(len(again) // 2, 1) if self._failed else float("inf")
                self._failed = True
            self._read_again(again)
            traceback.clear_frames(error.__traceback__)  # they hold activations

    def _read_again(self, sequences: Sequence[SequenceState]) -> None:
        """Move sequences to the pending prompts, with their generated tokens."""
        fresh = [(one, DynamicCache(config=self.model.config), 0) for one in sequences if not one.finish]
        self._pending = fresh + self._pending

    def _enter(self, mixes: Sequence[Mix], tokens: int = 0) -> None:
        self.release()
        self._select = self._stack.enter_context(self.engine.under(mixes, self.form, tokens))
        self._state_id = self.engine.state_id

    def _read(self, sequences: Sequence[SequenceState]) -> None:
        """Read prompts in one pass and choose their first tokens."""
        rows, mixes = [one.prompt_ids for one in sequences], [one.mix for one in sequences]
        tokens = sum(map(len, rows))
        self._enter(mixes, 0 if self.chunked else tokens)
        if sequences[0].on_prompt is None:
            state = self.engine.read(rows, mixes, self._select)
        else:
            state = prefill(self.model, rows, self.engine.pad_id, share=False, select=self._select, all_logits=True)
            assert state.prompt_logits is not None
            for one, logits in zip(sequences, state.prompt_logits, strict=True):
                _report_prompt(one, logits[-len(one.prompt_ids) :], 0)
        self.append(sequences, state)
        if self.chunked:
            self.engine.execution.count_step(tokens)

    def _read_chunk(self, budget: int) -> int:
        """Read up to ``budget`` tokens of the first pending prompt; return their number."""
        one, cache, done = self._pending[0]
        ids = one.token_ids
        chunk = ids[done:] if self.engine.batching.recurrent else ids[done : done + budget]
        is_prompt = torch.arange(done, done + len(chunk)) < len(one.prompt_ids)
        if bool(is_prompt.all()) or self._same_weights(one):
            self._enter([one.mix])
        else:  # read before
            self.release()
            self._stack.enter_context(self.engine.execution.whole([one.mix], is_prompt[None]))
        self.engine.execution.count_step(len(chunk))
        scored = one.on_prompt is not None and one.scored < len(one.prompt_ids) - 1
        if done + len(chunk) < len(ids):
            with self.engine.batching.part_of(len(ids)):
                logits = read_prefix(self.model, chunk, cache, all_logits=scored)[0]
            self._pending[0] = (one, cache, done + len(chunk))
            if scored:
                _report_prompt(one, logits, done)
        else:
            self._pending.pop(0)
            start = StoredPrefix(tuple(ids[:done]), cache) if done else None
            share = self._select is None
            state = prefill(self.model, [ids], self.engine.pad_id, share, start, all_logits=scored)
            if state.prompt_logits is not None:
                _report_prompt(one, state.prompt_logits[0], done)
            self.append([one], state)
        return len(chunk)


def _report_prompt(one: SequenceState, logits: torch.Tensor, start: int) -> None:
    """Pass on the log-probabilities of prompt tokens, given the logits [R, V] after the tokens from ``start`` on.

    Those that were passed on before, when the prompt was first read, are left out.
    """
    first = max(start, one.scored)
    following, logits = one.prompt_ids[first + 1 : start + 1 + len(logits)], logits[first - start :]
    if one.on_prompt is not None and following:
        tokens = torch.tensor(following, device=logits.device)
        one.on_prompt(token_logprobs(logits[: len(following)], tokens, one.top_logprobs))
        one.scored = first + len(following)


def _parts(sequences: Sequence[SequenceState], limit: float = float("inf")) -> Iterator[list[SequenceState]]:
    for numbers in by_length([len(one.prompt_ids) for one in sequences], limit):
        yield [sequences[number] for number in numbers]


def by_length(lengths: Sequence[int], limit: float = float("inf")) -> Iterator[list[int]]:
    """Yield the numbers of prompts to read in one pass: padding is at most as long as the prompts.

    Args:
        limit: tokens of one pass, padding included; a longer prompt is read alone.
    """
    part: list[int] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if part and (lengths[number] > 2 * lengths[part[0]] or lengths[number] * (len(part) + 1) > limit):
            yield part
            part = []
        part.append(number)
    if part:
        yield part
