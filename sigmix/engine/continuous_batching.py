"""Continuous batching: sequences join and leave between decoding steps, each under its own mixture.

`Engine.generate`, `Engine.stream` and the server's scheduler run on it. A sequence's tokens do not depend on the others
in its batch, up to the rounding of batched matmuls.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
"""Prompt tokens of one pass, padding included, at most; longer prompts take several passes."""

MIN_CHUNK_TOKENS = 64
"""Prompt tokens of one pass between two decoding steps, at least: fewer take little less time."""

PAUSE = 0.08
"""Seconds of reading prompts between two decoding steps, about. A step of 32 rows takes as long (two cores, default
base), so running sequences keep half their speed at worst. A number of tokens would fit one base on one machine."""

MAX_PADDING = 64
"""Padding of one pass in tokens, on a CPU: about the cost of a pass of its own."""


@dataclass(eq=False)
class Pending:
    """Sequence to be read.

    Attributes:
        stored: what was read of it; None: nothing.
        alone: read it in passes of its own.
    """

    sequence: SequenceState
    stored: StoredPrefix | None = None
    alone: bool = False

    @property
    def done(self) -> int:
        """Number of tokens that were read."""
        return 0 if self.stored is None else self.stored.length

    @property
    def left(self) -> int:
        """Number of tokens to be read."""
        return len(self.sequence.prompt_ids) + len(self.sequence.ids) - self.done

    @property
    def scored(self) -> bool:
        """True if log-probabilities of its prompt are missing."""
        return self.sequence.on_prompt is not None and self.sequence.scored < len(self.sequence.prompt_ids) - 1


class ContinuousBatch(DecodingBatch):
    """Decoding batch of an engine.

    The engine stays in the batch's state between steps; `release` frees it for other uses, and the next step resumes.
    As a context manager it releases the engine at the end.

    Args:
        form: see `Execution.choose`.
        chunked: read prompts in turn, a part of them before each step, and reuse cached conversations; False: read all
            before the next step. Models with linear attention always read a prompt in one pass.
        isolate: end a sequence with an error where its forward passes raise, and continue the others; False: raise.
    """

    def __init__(self, engine: Engine, form: str | None = None, *, chunked: bool = True, isolate: bool = False) -> None:
        super().__init__(engine.model, engine.eos_token_ids, one_pass=engine.execution.one_pass)
        self.engine, self.form, self.chunked, self.isolate = engine, form, chunked, isolate
        self._limit = float("inf")  # of sequences that decode together; the pending ones wait
        self._failed = False  # the last step
        self._pending: list[Pending] = []
        self._speed = 0.0  # prompt tokens per second
        self._finished: list[tuple[SequenceState, list[int], Entry]] = []  # for the prefix cache, at the next release
        self._stack = ExitStack()
        self._state_id = 0

    def __enter__(self) -> ContinuousBatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __len__(self) -> int:
        return len(self.sequences) + len(self._pending)

    def add(self, sequences: Sequence[SequenceState]) -> None:
        """Queue sequences, to be read during the following steps.

        Prompts must not be empty, and must fit the context together with their answers.
        """
        self.release()
        for one in sequences:
            # a cached prefix has no logits
            reuse = self.chunked and one.on_prompt is None
            self._pending.append(Pending(one, self._cached(one) if reuse else None))
        if not self.chunked:
            self._pending.sort(key=lambda entry: entry.left)  # for little padding

    def _cached(self, one: SequenceState) -> StoredPrefix | None:
        return self.engine.cached_prefix(one.prompt_ids, one.mix)

    def append(self, sequences: Sequence[SequenceState], state: Prefilled) -> None:
        """Add prefilled sequences and choose their first tokens."""
        super().append(sequences, state)
        if not all(map(self._same_weights, sequences)):
            self._rows = None

    def _same_weights(self, one: SequenceState) -> bool:
        """Return True if a sequence's prompt and answer are computed with the same weights."""
        return self.engine.execution.decodes_alike(one.mix)

    @torch.no_grad()
    def step(self) -> None:
        """Read prompts, choose the first tokens of those that are complete, and decode a token of every sequence.

        Where none decodes, first tokens are all that a step gives.
        """
        running = bool(self.sequences)
        while self._pending and len(self.sequences) < self._limit:
            self.release()  # for the lookup of cached prefixes
            budget = self._budget()
            group = self._take(budget)
            with self._recovering([entry.sequence for entry in group]):
                self._read(group, budget)
            if self.chunked:
                break
        if not self._pending:
            self._limit = float("inf")
        if not self.sequences:
            self.release()
        if not self.sequences or not running:
            return
        if self._rows is not None and self.engine.state_id != self._state_id:
            raise ConfigError(
                "another call changed the state of this engine during decoding",
                remedy="finish the stream first, or give each stream its own engine and model",
            )
        with self._recovering():
            if self._rows is None or self.engine.execution.count_step(len(self.sequences)):
                decoding = [self.engine.execution.decoding(one.mix) for one in self.sequences]
                self._enter(decoding, decoding=True)
                self._rows = list(range(len(self.sequences)))
            super().step()
            self._failed = False

    def remove(self, sequences: Sequence[SequenceState]) -> None:
        """Remove sequences at once; those that are not in the batch are ignored."""
        gone = set(map(id, sequences))
        self._pending = [entry for entry in self._pending if id(entry.sequence) not in gone]
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
                self.engine.cache_prefix(read, one.mix, entry)
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
            self._pending = [entry for entry in self._pending if entry.sequence not in suspects]
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
        self._pending = [Pending(one, alone=True) for one in sequences if not one.finish] + self._pending

    def _budget(self) -> float:
        """Return the number of prompt tokens to read before the next step."""
        if not self.chunked:
            return float("inf")
        if not self.sequences:
            return CHUNK_TOKENS
        # up to twice as long while more sequences wait for a pause than suffer from it
        pause = PAUSE * min(max(len(self._pending) / len(self.sequences), 1), 2)
        return min(max(pause * self._speed, MIN_CHUNK_TOKENS), CHUNK_TOKENS)

    def _take(self, budget: float) -> list[Pending]:
        """Remove and return the sequences of the next pass: the first one, and others that fit, in order.

        They are about as long, as all rows of a pass are read from the same column on.
        """
        first = self._pending[0]
        if self.chunked and not first.alone and not first.scored and first.left > budget:  # cached since it arrived?
            first.stored = self._cached(first.sequence) or first.stored
        limit = min(budget, CHUNK_TOKENS) if first.scored else budget  # all their logits are in memory
        padding = MAX_PADDING if self.model.device.type == "cpu" else CHUNK_TOKENS
        group, regime = [first], self._regime(first)
        for other in () if first.alone or first.left > limit else self._pending[1:]:
            size = max(entry.left for entry in [*group, other]) * (len(group) + 1)
            fits = size <= limit and size - sum(entry.left for entry in [*group, other]) <= padding
            if fits and not other.alone and other.scored == first.scored and self._regime(other) == regime:
                group.append(other)
        self._pending = [entry for entry in self._pending if entry not in group]
        return group

    def _regime(self, entry: Pending) -> bool:
        return self.engine.batching.regime(entry.done + entry.left)

    def _logits(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        step = self.engine.decode_step
        if step is not None and step.ready:
            return step(inputs, self.kv_cache)
        return super()._logits(inputs)

    def _enter(
        self, mixes: Sequence[Mix], tokens: int = 0, is_prompt: torch.Tensor | None = None, decoding: bool = False
    ) -> None:
        self.release()
        engine = self.engine
        if is_prompt is None:
            state = engine.under(mixes, self.form, tokens, decoding)
        else:
            state = engine.one_pass(mixes, is_prompt)
        self._select = self._stack.enter_context(state)
        self._state_id = self.engine.state_id

    def _read(self, group: list[Pending], budget: float) -> None:
        """Read sequences, or at most ``budget`` tokens of a single one, which then goes to the end of the queue."""
        first, sequences = group[0], [entry.sequence for entry in group]
        rows, mixes = [one.token_ids for one in sequences], [one.mix for one in sequences]
        complete = len(group) > 1 or first.left <= budget or self.engine.batching.recurrent
        end = len(rows[0]) if complete else first.done + int(budget)
        tokens = sum(entry.left for entry in group) if complete else int(budget)
        # a sequence that is read again, alone, has an answer
        is_prompt = torch.arange(first.done, end) < len(first.sequence.prompt_ids)
        again = not bool(is_prompt.all()) and not self._same_weights(first.sequence)
        self._enter(mixes, 0 if self.chunked else tokens, is_prompt[None] if again else None)
        started, starts = time.perf_counter(), [entry.stored for entry in group]
        if not complete:
            stored = first.stored or StoredPrefix(0, DynamicCache(config=self.model.config))
            with self.engine.batching.part_of(len(rows[0])):
                logits = read_prefix(self.model, rows[0][first.done : end], stored.cache, all_logits=first.scored)[0]
            if first.scored:
                _report_prompt(first.sequence, logits, first.done)
            first.stored, first.alone = StoredPrefix(end, stored.cache), True
            self._pending.append(first)
        elif first.scored or again:  # without the template's prefix
            state = prefill(self.model, rows, self.engine.pad_id, False, starts, self._select, all_logits=first.scored)
            for entry, logits in zip(group, () if state.prompt_logits is None else state.prompt_logits, strict=False):
                _report_prompt(entry.sequence, logits[-entry.left :], entry.done)
            self.append(sequences, state)
        else:
            state = self.engine.read(rows, mixes, self._select, stored=starts)
            self.append(sequences, state)
        if self.chunked:
            self.engine.execution.count_step(tokens)
            self._speed = max(tokens / (time.perf_counter() - started), 0.9 * self._speed)


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
