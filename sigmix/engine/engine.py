"""`Engine`: a base, wrapped once, that answers under any mix of experts. Its weights never change.

One mix for the whole batch is merged (no cost per token); several mixes share one batch, each row with its own z.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from sigmix.engine import scoring
from sigmix.engine.base import Prompt
from sigmix.engine.cpu_kernels import PACKED_BYTES as PACKED
from sigmix.engine.cpu_kernels import contiguous_head
from sigmix.engine.detokenizer import decoded, held_back
from sigmix.engine.execution import MERGED_BYTES as BUDGET
from sigmix.engine.execution import States
from sigmix.engine.generation import Generation, Row, SamplingParams, batches, check_options, decode
from sigmix.engine.kv_cache import Prefilled
from sigmix.engine.prefix_cache import PREFIX_BYTES as PREFIXES
from sigmix.engine.prefix_cache import Entry, Prefixes, StoredPrefix, common_prefix, prefill
from sigmix.engine.tokenization import check_context, encode, end_ids
from sigmix.engine.truncation import Truncation
from sigmix.errors import ConfigError, ContextError
from sigmix.experts.bank import Bank
from sigmix.experts.mix import Mix
from sigmix.models.multimodal import as_ids, whole

WORTH = 16
"""Tokens that a batch must share beyond the chat template's beginning for these to be kept too."""


class Engine:
    """Generation and logits under mixes of a bank's experts.

    Args:
        model: a base from `load_base`, or a PEFT model with SVF layers.
        tokenizer: its tokenizer.
        bank: a `Bank`, or any mapping from names to experts; None: only the base.
        keep_merged: bytes of merged weights to keep for mixes that come back.
        keep_packed: bytes of packed copies, which make half precision on a CPU faster; 0 makes none.
        keep_prefixes: bytes of keys and values to keep of what prompts begin with.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        bank: Bank | Mapping[str, Any] | None = None,
        keep_merged: int = BUDGET,
        keep_packed: int = PACKED,
        keep_prefixes: int = PREFIXES,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.states = States(model, bank if bank is not None else {}, keep_merged, keep_packed)
        self.layers, self.packing, self.merged = self.states.layers, self.states.packing, self.states.merged
        self._turn = 0  # counts changes of the layers' state, so that a stream notices that it was overtaken
        self.prefixes = Prefixes(model, keep_prefixes)
        self._template: list[int] | None = None
        self.ends = end_ids(model, tokenizer)
        pad = tokenizer.pad_token_id
        self.pad_id = pad if pad is not None else (self.ends[0] if self.ends else 0)
        contiguous_head(model)
        # walking through the modules for every request takes longer than looking at the weights
        self._held = [(module._parameters, name) for module in model.modules() for name in module._parameters]

    # ------------------------------------------------------------------ prompts and mixes

    def encode(
        self, prompt: Prompt, system: str | None = None, chat: bool | None = None, images: Any = ()
    ) -> list[int]:
        """Token ids of a prompt, which `generate` takes too; ids pass through. See
        `sigmix.engine.tokenization.encode`."""
        return encode(self.tokenizer, prompt, system, chat, images) if isinstance(prompt, str) else as_ids(prompt)

    def z(self, mix: Mix) -> dict[str, torch.Tensor]:
        """Effective z by matrix path, {} for the base; each expert is checked against the base once.

        Raises:
            UnknownNameError: no such expert. FingerprintError, ExpertError: an expert that does not fit this base.
        """
        return {} if mix == Mix.base() else self.states.layout.split(self.states.z(mix))

    def key(self, mix: Mix) -> tuple[str, ...]:
        """The mix's id and its experts' digests: equal keys mean equal weights, whatever the bank holds by now."""
        return self.states.key(mix)

    def is_merged(self, mix: Mix) -> bool:
        """Whether a mix's merged weights are kept, so that a batch under it alone starts at once."""
        return self.merged.has(self.key(mix))

    def mixes(self, mix: Mix | str | Sequence[Mix | str] | None, count: int) -> list[Mix]:
        """A `Mix` for each of ``count`` prompts, from one for all or one for each; None is the base."""
        given = [mix] * count if mix is None or isinstance(mix, (Mix, str)) else list(mix)
        if len(given) != count:
            raise ConfigError(f"{len(given)} mixes for {count} prompts", remedy="give one mix, or one for each prompt")
        return [Mix.base() if m is None else Mix.parse(m) if isinstance(m, str) else m for m in given]

    @property
    def bank(self) -> Bank | Mapping[str, Any]:
        """{name: Expert} that mixes are of; another one may be set at any time."""
        return self.states.bank

    @bank.setter
    def bank(self, bank: Bank | Mapping[str, Any]) -> None:
        self.states.bank = bank

    @property
    def truncation(self) -> Truncation | None:
        """What ``form="truncated"`` computes by (`sigmix.engine.truncation.fit`); None: all components, exactly."""
        return self.states.truncation

    @truncation.setter
    def truncation(self, plan: Truncation | None) -> None:
        self.states.truncation = plan

    # ------------------------------------------------------------------ work

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        mix: Mix | str | Sequence[Mix | str] | None = None,
        *,
        max_new_tokens: int = 64,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seeds: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        form: str | None = None,
        chat: bool | None = None,
        batch_size: int = 64,
        keep_errors: bool = False,
    ) -> list[Generation]:
        """Answer prompts.

        Args:
            prompts: B user turns, or token-id lists.
            mix: one for all, or one for each; None is the base.
            do_sample: sample with `temperature` and `top_p`; False: greedy decoding, which ignores both.
            seeds: B random seeds, one per row; default: the row's index.
            stop_strings: strings that end an answer; they are cut off its text.
            form: None picks merged for one mix; for several factored, or merged mix by mix where each has many rows; on
                a quantised or offloaded base gain.
            chat: apply the chat template; None: if there is one.
            keep_errors: a prompt that cannot fit gets an answer with finish "error", and the others are answered.

        Raises:
            ContextError: a prompt that cannot fit, unless ``keep_errors``. UnknownNameError, ExpertError: see `z`.
            ConfigError: bad options.
        """
        check_options(max_new_tokens, do_sample, temperature, top_p, stop_strings)
        if isinstance(prompts, str):
            raise ConfigError("prompts must be a list, not one string", remedy="generate([prompt])[0]")
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
        mixes = self.mixes(mix, len(prompts))
        rows = [self.encode(prompt, chat=chat) for prompt in prompts]
        failed: dict[int, ContextError] = {}
        for number, row in enumerate(rows):
            try:
                check_context(self.model, row, max_new_tokens, f"prompt {number}")
            except ContextError as error:
                if not keep_errors:
                    raise
                failed[number] = error
        seeds = list(seeds) if seeds is not None else list(range(len(rows)))
        if len(seeds) != len(rows):
            raise ConfigError(f"{len(seeds)} seeds for {len(rows)} prompts", remedy="give one seed for each prompt")
        done = {
            number: Generation("", [], [], mixes[number], len(rows[number]), "error", error)
            for number, error in failed.items()
        }
        good = [number for number in range(len(rows)) if number not in failed]
        for part in batches(good, mixes, batch_size, form if self.states.mixed == "factored" else "gain"):
            sampling = SamplingParams(max_new_tokens, do_sample, temperature, top_p, [seeds[n] for n in part])
            *_, last = self._decode([rows[n] for n in part], [mixes[n] for n in part], sampling, stop_strings, form)
            for n, end in zip(part, last, strict=True):
                text = decoded(self.tokenizer, end.ids, stop_strings)
                done[n] = Generation(text, end.ids, end.logprobs, mixes[n], len(rows[n]), end.finish)
        return [done[number] for number in range(len(rows))]

    @torch.no_grad()
    def stream(
        self,
        prompt: Prompt,
        mix: Mix | str | None = None,
        *,
        max_new_tokens: int = 256,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_strings: Sequence[str] = (),
        chat: bool | None = None,
    ) -> Iterator[str]:
        """Answer one prompt piece by piece; the pieces joined are `generate`'s text."""
        check_options(max_new_tokens, do_sample, temperature, top_p, stop_strings)
        row = self.encode(prompt, chat=chat)
        check_context(self.model, row, max_new_tokens)
        sampling = SamplingParams(max_new_tokens, do_sample, temperature, top_p, [seed])
        told = ""
        for rows in self._decode([row], self.mixes(mix, 1), sampling, stop_strings, None):
            text = decoded(self.tokenizer, rows[0].ids, stop_strings)
            # an unfinished multi-byte character decodes to U+FFFD, and a stop string may be under way: hold those back
            held = "" if rows[0].finish else held_back(text, stop_strings)
            shown = text[: len(text) - len(held)]
            if shown.startswith(told) and len(shown) > len(told):
                yield shown[len(told) :]
                told = shown

    @torch.no_grad()
    def logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        mix: Mix | str | Sequence[Mix | str] | None = None,
        form: str | None = None,
    ) -> torch.Tensor:
        """Logits [B, T, V] of token ids [B, T] (padded left or right where the mask [B, T] is 0), a mix per row."""
        with self._turn_of(self.mixes(mix, len(input_ids)), form):
            return self.model(**whole(self.model, input_ids, attention_mask), use_cache=False).logits

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[int]],
        mix: Mix | str | Sequence[Mix | str] | None = None,
    ) -> list[list[float]]:
        """Return the natural log-probability of each token of each completion (token ids, none empty)."""
        return scoring.score(self, prompts, completions, mix)

    def hidden_states(self, prompts: Sequence[Prompt], layers: Sequence[int]) -> torch.Tensor:
        """Return float32 [N, len(layers), d]: the base's hidden state at each prompt's last token, after given numbers
        of layers."""
        return scoring.hidden(self, prompts, layers)

    def _decode(
        self, rows: list[list[int]], mixes: list[Mix], sampling: SamplingParams, stop: Sequence[str], form: str | None
    ) -> Iterator[list[Row]]:
        # a stop string has at most a token for each byte; a few more, because it can begin inside an earlier token
        window = 8 + max((len(mark.encode()) for mark in stop), default=0)

        def stopped(_: int, row: Row) -> bool:
            text = self.tokenizer.decode(row.ids[-window:], skip_special_tokens=True)
            return any(mark in text for mark in stop)

        with self._turn_of(mixes, form) as (keep, turn):
            state = self.read(rows, mixes, keep)
            for done in decode(self.model, state, sampling, self.ends, stopped if stop else None, keep):
                yield done
                if self._turn != turn and not all(row.finish for row in done):
                    raise ConfigError(
                        "another call used this engine while a stream was under way, so its weights are gone",
                        remedy="finish the stream first, or give each stream its own engine and model",
                    )

    def read(self, rows: list[list[int]], mixes: list[Mix], keep: Any, start: Sequence[int] | None = None) -> Prefilled:
        """Run prompts through the model, inside `under` for the same mixes; what they begin with is read once and kept.

        Args:
            rows: token ids. keep: what `under` yielded.
            start: what to keep the keys and values of; None: the template's beginning, or what all rows share.
        """
        ids = self._shared(rows) if start is None else list(start)
        stored = None
        if all(len(row) > len(ids) and row[: len(ids)] == ids for row in rows):
            stored = self.prefixes.rows(ids, [(self._weights, *self.key(mix)) for mix in mixes], keep)
        return prefill(self.model, rows, self.pad_id, share=keep is None, start=stored)

    def _shared(self, rows: list[list[int]]) -> list[int]:
        if self._template is None:
            two = [self.encode("a"), self.encode("7 b")]
            self._template = two[0][: common_prefix(two)]
        common = common_prefix(rows)
        template = self._template if all(row[: len(self._template)] == self._template for row in rows) else []
        # a prefix that is little longer than the template's would seldom be met again
        return template if common < len(template) + WORTH else rows[0][:common]

    @contextmanager
    def under(self, mixes: list[Mix], form: str | None = None) -> Iterator[Any]:
        """Inside, the model computes row b of a batch under ``mixes[b]``.

        Yields None where all rows have the same weights, else a function that keeps only the rows with given indices.

        Raises:
            ConfigError: see `generate`. UnknownNameError, ExpertError: see `z`.
        """
        with self._turn_of(mixes, form) as (keep, _):
            yield keep

    @contextmanager
    def _turn_of(self, mixes: list[Mix], form: str | None) -> Iterator[tuple[Any, int]]:
        self._turn += 1
        self._weights = self._weights_now(form)
        try:
            with self.states.under(mixes, form) as keep:
                yield keep, self._turn
        finally:
            self._turn += 1

    def _weights_now(self, form: str | None) -> tuple[Any, ...]:
        # weights that were cast, moved or edited in place are other weights
        found = (held[name] for held, name in self._held)
        weights = tuple((p.data_ptr(), p.dtype, p._version) for p in found if p is not None)
        # exact forms differ by rounding only; a truncation's keys and values are its own
        plan = self.truncation if form == "truncated" else None
        return (*weights, 0 if plan is None else plan.serial)

    def known_beginning(self, ids: Sequence[int], mix: Mix, form: str | None = None) -> StoredPrefix | None:
        """The longest beginning of a prompt that is kept for a mix (an earlier turn of a conversation), one row of it;
        None where that is no more than what all prompts begin with. `under` must not be entered."""
        found = self.prefixes.longest((self._weights_now(form), *self.key(mix)), ids)
        return found if found is not None and len(found.ids) >= len(self._shared([list(ids)])) + WORTH else None

    def keep_beginning(self, ids: Sequence[int], mix: Mix, entry: Entry, form: str | None = None) -> None:
        """Keep keys and values of what was read under a mix, for prompts that go on from it.
        `under` must not be entered."""
        self.prefixes.put((self._weights_now(form), *self.key(mix)), ids, entry)
