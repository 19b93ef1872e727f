"""Inference engine on transformers: generation and scoring under mixtures of experts."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from sigmix.engine import scoring
from sigmix.engine.base import Mixes, Prompt
from sigmix.engine.base_engine import BaseEngine, check_stop_strings
from sigmix.engine.continuous_batching import ContinuousBatch
from sigmix.engine.cpu.decode_step import DecodeStep
from sigmix.engine.cpu.kernels import PACKED_BYTES, contiguous_head
from sigmix.engine.execution import MERGED_BYTES, Execution
from sigmix.engine.generation import SamplingParams, SequenceState
from sigmix.engine.kv_cache import Prefilled
from sigmix.engine.prefix_cache import (
    PREFIX_BYTES,
    Entry,
    PrefixCache,
    Select,
    StoredPrefix,
    common_prefix,
    prefill,
    right_pad,
)
from sigmix.engine.structured_output import StructuredOutput
from sigmix.engine.tokenization import check_tokens
from sigmix.experts.bank import Bank
from sigmix.experts.expert import Expert
from sigmix.experts.fingerprint import fingerprint
from sigmix.experts.mix import Mix
from sigmix.models.batching import batching
from sigmix.models.multimodal import forward_inputs

MIN_GAIN = 16
"""Tokens that a prefix must have beyond the chat template's to be cached."""


class Engine(BaseEngine):
    """Generation and logits under mixtures of a bank's experts. The base weights never change.

    Args:
        model: a base model from `load_base`, or a PEFT model with SVF layers.
        tokenizer: its tokenizer.
        bank: a `Bank`, or any mapping from names to experts; None: the base only.
        keep_merged: bytes of merged weights to cache.
        keep_packed: bytes of packed weights, which speed up half precision on a CPU; 0: none.
        keep_prefixes: bytes of the prefix cache.
        decode_weights: "int8": decode the base, and experts with positions "prompt", with 8-bit copies of the base's
            weights; prompts and scores keep its own. See `sigmix.engine.cpu.native`.
        compile: decode with a compiled step on a CPU, from the cache or compiled in the background, see `DecodeStep`,
            and compute linear layers in bfloat16 with kernels in C++; both round differently from the model's own pass.

    Raises:
        BaseModelError: an architecture that is not supported.
        ConfigError: decode weights that this base or this machine cannot have.

    Attributes:
        batching: padding and cache that the model supports, see `Batching`.
        decode_step: compiled decode step; None without ``compile``.
        state_id: changes whenever the adapted layers are switched.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        bank: Bank | Mapping[str, Any] | None = None,
        keep_merged: int = MERGED_BYTES,
        keep_packed: int = PACKED_BYTES,
        keep_prefixes: int = PREFIX_BYTES,
        decode_weights: str | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(model, tokenizer)
        self.batching = batching(model)
        experts = bank if bank is not None else {}
        self.execution = Execution(model, experts, keep_merged, keep_packed, decode_weights, native=compile)
        self.layers = self.execution.layers
        self.prefix_cache = PrefixCache(model, keep_prefixes)
        pad = tokenizer.pad_token_id
        self.pad_id = pad if pad is not None else (self.eos_token_ids[0] if self.eos_token_ids else 0)
        self.state_id = 0
        self._template: list[int] | None = None
        contiguous_head(model)
        self.decode_step = DecodeStep(model) if compile else None

    # ------------------------------------------------------------------ mixtures

    @property
    def base_fingerprint(self) -> str:
        """Fingerprint of the base model."""
        return fingerprint(self.model)

    def check_mix(self, mix: Mix) -> None:
        """Raise as `z` does unless a mixture can run on this base."""
        self.execution.z(mix)

    def check_expert(self, expert: Expert) -> None:
        """Raise `FingerprintError` or `ExpertError` if an expert was made on another base; sketches are not checked."""
        expert.check(self.model, sketches=False)

    def z(self, mix: Mix) -> dict[str, torch.Tensor]:
        """Return the effective z by matrix path, {} for the base.

        Raises:
            UnknownNameError: no such expert. FingerprintError, ExpertError: an expert that does not fit this base.
        """
        return {} if mix == Mix.base() else self.execution.layout.split(self.execution.z(mix))

    @property
    def bank(self) -> Bank | Mapping[str, Any]:
        """Experts by name; another bank may be set at any time."""
        return self.execution.bank

    @bank.setter
    def bank(self, bank: Bank | Mapping[str, Any]) -> None:
        self.execution.bank = bank

    # ------------------------------------------------------------------ generation

    def decode(self, sequences: Sequence[SequenceState], form: str | None, batch_size: int, keep_errors: bool) -> None:
        """Run sequences to their end in batches, see `Execution.batches`."""
        for part in self.execution.batches(range(len(sequences)), [one.mix for one in sequences], batch_size, form):
            with ContinuousBatch(self, form, chunked=False) as batch:
                batch.add([sequences[row] for row in part])
                while batch:
                    batch.step()
            errors = [failed for row in part if (failed := sequences[row].error) is not None]
            if errors and not keep_errors:
                raise errors[0]

    @torch.no_grad()
    def stream(
        self,
        prompt: Prompt,
        mix: Mix | str | None = None,
        *,
        max_new_tokens: int = 256,
        structured_output: StructuredOutput | None = None,
        stop_strings: Sequence[str] = (),
        chat: bool | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Generate one completion piece by piece; the joined pieces are the text that `generate` returns.

        Args:
            options: fields of `SamplingParams`.
        """
        params = SamplingParams(max_new_tokens, **options)
        self.check_params(params)
        check_stop_strings(stop_strings)
        ids = self.encode(prompt, chat=chat)
        one = self._sequence(ids, params, self.mixes(mix, 1)[0], chat, stop_strings, structured_output)
        self.check_prompt(one.prompt_ids, max_new_tokens)
        detokenizer = one.detokenizer
        assert detokenizer is not None
        sent = 0
        with ContinuousBatch(self, chunked=False) as batch:
            batch.add([one])
            while True:
                if len(detokenizer.text) > sent:
                    yield detokenizer.text[sent:]
                    sent = len(detokenizer.text)
                if one.finish:
                    break
                batch.step()
        if one.error is not None:
            raise one.error
        if rest := detokenizer.flush():
            yield rest

    # ------------------------------------------------------------------ scoring

    @torch.no_grad()
    def logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        mix: Mix | str | Sequence[Mix | str] | None = None,
        form: str | None = None,
        is_prompt: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return logits [B, T, V] of token ids [B, T], padded left or right where the mask [B, T] is 0.

        Args:
            is_prompt: tokens of the prompts, bool [B, T], see `SVFConfig.positions`; None: all. For experts with
                positions "prompt" the exact mixed form is computed.

        Raises:
            PromptError: a token that the model has no embedding of.
        """
        read = input_ids if attention_mask is None else input_ids[attention_mask.bool()]
        check_tokens(self.model, read.unique().tolist(), tokenizer=self.tokenizer)
        mixes, ids, mask = self.mixes(mix, len(input_ids)), input_ids, attention_mask
        used = attention_mask.bool() if attention_mask is not None and self.batching.recurrent else None
        if used is not None:
            rows = [row[own].tolist() for row, own in zip(input_ids, used, strict=True)]
            ids, mask = right_pad(rows, self.pad_id, input_ids.device)
            is_prompt = None if is_prompt is None else torch.zeros_like(mask).masked_scatter_(mask, is_prompt[used])
        if is_prompt is None or list(map(self.execution.decoding, mixes)) == mixes:
            state = self.under(mixes, form, input_ids.numel())
        else:
            state = self.one_pass(mixes, is_prompt)
        with state:
            own = self.model(**forward_inputs(self.model, ids, mask), use_cache=False).logits
        if used is None:
            return own
        logits = own.new_zeros(*input_ids.shape, own.shape[-1])
        logits[used] = own[mask]
        return logits

    def next_logprobs(
        self, prompts: Sequence[Prompt], tokens: Sequence[int], mix: Mixes = None, *, answer: Sequence[int] = (),
        start: Sequence[int] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Return log-probabilities float32 [N, K] of K tokens after each prompt, normalised over these tokens."""
        return scoring.next_logits(self, prompts, mix, answer=answer, start=start)[:, list(tokens)].log_softmax(-1)

    def replies_and_logprobs(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]], mix: Mixes = None, *, max_new_tokens: int,
        start: Sequence[int] | None = None, batch_size: int = 64,
    ) -> tuple[list[str], list[list[float]]]:  # fmt: skip
        """Return greedy replies and scores of answers, see `sigmix.engine.scoring.replies_and_logprobs`."""
        return scoring.replies_and_logprobs(
            self, prompts, answers, mix, max_new_tokens=max_new_tokens, start=start, batch_size=batch_size
        )

    def cached_tokens(self, prefix: Sequence[int]) -> int:
        """Return the length of a prefix if the prefix cache can hold it, else 0."""
        return len(prefix) if self.prefix_cache.usable(prefix) else 0

    def hidden_states(self, prompts: Sequence[Prompt], layers: Sequence[int], batch_size: int = 64) -> torch.Tensor:
        """Return hidden states of the base, see `sigmix.engine.scoring.hidden_states`."""
        return scoring.hidden_states(self, prompts, layers, batch_size)

    def embeddings(
        self,
        prompts: Sequence[Prompt],
        mix: Mix | str | Sequence[Mix | str] | None = None,
        *,
        batch_size: int = 64,
        normalize: bool = True,
    ) -> torch.Tensor:
        """Return the mean of the last hidden states over each prompt, see `sigmix.engine.scoring.embeddings`."""
        return scoring.embeddings(self, prompts, mix, batch_size=batch_size, normalize=normalize)

    # ------------------------------------------------------------------ state and prefix cache

    @contextmanager
    def under(
        self, mixes: Sequence[Mix], form: str | None = None, tokens: int = 0, decoding: bool = False
    ) -> Iterator[Select | None]:
        """Compute row b of a batch under ``mixes[b]`` inside this context, see `Execution.under`."""
        with self._switched(), self.execution.under(mixes, form, tokens, decoding) as select:
            yield select

    @contextmanager
    def one_pass(self, mixes: Sequence[Mix], is_prompt: torch.Tensor | bool = True) -> Iterator[Select | None]:
        """Compute prompts and answers in one pass inside this context, see `Execution.one_pass`."""
        with self._switched(), self.execution.one_pass(mixes, is_prompt) as select:
            yield select

    @contextmanager
    def _switched(self) -> Iterator[None]:
        self.state_id += 1
        try:
            yield
        finally:
            self.state_id += 1

    def read(
        self,
        rows: Sequence[list[int]],
        mixes: Sequence[Mix],
        select: Select | None,
        start: Sequence[int] | None = None,
        stored: Sequence[StoredPrefix | None] | None = None,
    ) -> Prefilled:
        """Run prompts through the model with the prefix cache, inside `under` for the same mixtures.

        Args:
            rows: token ids. select: as `under` yields it.
            start: prefix to cache; None: the chat template's, or the common prefix of the rows.
            stored: what was read before of each row, see `prefill`.
        """
        ids = self._common_start(rows) if start is None else list(start)
        starts, shortest = list(stored or [None] * len(rows)), min(map(len, rows))
        enough = [one is not None and one.length >= len(ids) for one in starts]
        begin = self.batching.one_regime(rows) and all(len(row) > len(ids) and row[: len(ids)] == ids for row in rows)
        if begin and not all(enough):
            keys = [(key, self.batching.regime(shortest)) for key in self.execution.prefix_keys(mixes)]
            with self.batching.part_of(shortest):
                common = self.prefix_cache.batch(ids, keys, select) or starts
            starts = [own if kept else other for own, other, kept in zip(starts, common, enough, strict=True)]
        return prefill(self.model, rows, self.pad_id, share=select is None, starts=starts, select=select)

    def cached_prefix(self, ids: Sequence[int], mix: Mix) -> StoredPrefix | None:
        """Return the longest cached prefix of a prompt, outside `under`."""
        return self.prefix_cache.longest(self._prefix_key(ids, mix), ids)

    def cache_prefix(self, ids: Sequence[int], mix: Mix, entry: Entry) -> None:
        """Cache keys and values that were computed under a mixture, outside `under`."""
        self.prefix_cache.put(self._prefix_key(ids, mix), ids, entry)

    def _prefix_key(self, ids: Sequence[int], mix: Mix) -> tuple[Hashable, bool]:
        # beyond a threshold of its rotary embedding a row's keys are others from its first token on
        return self.execution.prefix_key(mix), self.batching.regime(len(ids))

    def _common_start(self, rows: Sequence[list[int]]) -> list[int]:
        if self._template is None:
            two = [self.encode("a"), self.encode("7 b")]
            self._template = two[0][: common_prefix(two)]
        common = common_prefix(rows)
        template = self._template if all(row[: len(self._template)] == self._template for row in rows) else []
        # little more than the template's prefix would seldom be used again
        return template if common < len(template) + MIN_GAIN else rows[0][:common]
