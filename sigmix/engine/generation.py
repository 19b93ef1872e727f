"""Token selection and termination: the decoding core of the engine, the server's batches and training's rollouts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sigmix.engine.constrained import TokenTrie
from sigmix.engine.cpu.native import can_choose, greedy
from sigmix.engine.detokenizer import StreamingDetokenizer
from sigmix.engine.kv_cache import BatchKVCache, Prefilled
from sigmix.engine.prefix_cache import PromptOnly, Select, everywhere, prefill
from sigmix.engine.structured_output import constrain, matcher_error
from sigmix.errors import ConfigError, ExpertError
from sigmix.experts.mix import Mix
from sigmix.models.batching import batching

if TYPE_CHECKING:
    from llguidance import LLMatcher


@dataclass(frozen=True)
class SamplingParams:
    """Options of one sequence, named as in transformers' `GenerationConfig` and vLLM's `SamplingParams`.

    In order of application: `logit_bias`, `repetition_penalty`, `frequency_penalty`, `presence_penalty`, then for
    sampling `temperature`, `min_p`, `top_k`, `top_p`.

    Attributes:
        do_sample: False: greedy decoding, and `temperature`, `top_p`, `top_k` and `min_p` are ignored.
        seed: seed of the sequence's own random stream.
        top_k: keep the most probable tokens; 0 or -1: all.
        min_p: keep tokens at least this many times as probable as the most probable one; 0: all.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens of the prompt and output.
        presence_penalty, frequency_penalty: subtracted from the logits of output tokens once, and for each occurrence.
        logit_bias: {token id: number added to its logit}.
    """

    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    @cached_property
    def penalized(self) -> bool:
        """True if a bias or a penalty changes the logits."""
        neutral = (1, 0, 0)
        return bool(self.logit_bias) or neutral != (
            self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        )  # fmt: skip

    def check(self, vocab_size: int) -> None:
        """Raise `ConfigError` for a value out of range."""
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], not {self.top_p}")
        if self.top_k < -1:
            raise ConfigError(f"top_k must be positive, or 0 for all tokens, not {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must be in [0, 1], not {self.min_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ConfigError(f"repetition_penalty must be positive and finite, not {self.repetition_penalty}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ConfigError(f"{name} must be in [-2, 2], not {getattr(self, name)}")
        for token, bias in self.logit_bias.items():
            if isinstance(token, str) or not 0 <= token < vocab_size:
                raise ConfigError(f"logit_bias has token {token!r}, but the tokens are 0 to {vocab_size - 1}")
            if not -100 <= bias <= 100:
                raise ConfigError(f"logit_bias of token {token} must be in [-100, 100], not {bias}")
        if self.do_sample and not 0 < self.temperature < float("inf"):
            raise ConfigError(
                f"temperature must be positive and finite, not {self.temperature}",
                remedy="do_sample=False for greedy decoding",
            )


def choice_seed(seed: int, index: int) -> int:
    """Return the random seed of choice ``index``: ``seed`` itself for the first one, else a hash of both.

    With ``seed + index`` the choices of neighbouring seeds would repeat each other.
    """
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # 63 bits: torch's seeds are signed


@dataclass(frozen=True)
class Generation:
    """Completion of one prompt.

    Attributes:
        text: decoded without special tokens, up to the first stop string. Without a chat template it continues the
            prompt: prompt + text keeps the space between both.
        ids: generated token ids, the end token included. logprobs: natural log-probability of each id.
        prompt_tokens: length of the prompt. finish: "stop", "length" or "error".
        error: reason of an "error"; the text is then empty.
    """

    text: str
    ids: list[int]
    logprobs: list[float]
    mix: Mix
    prompt_tokens: int
    finish: str
    error: Exception | None = None


TokenLogprobs = tuple[float, list[tuple[int, float]]]
"""Natural log-probability of a token, and the most probable tokens at its place with theirs."""

MIN_TEMPERATURE = 1e-5
"""Lowest temperature in use; lower ones choose the same tokens, but overflow."""

OnToken = Callable[[int, float, list[tuple[int, float]], str], None]
"""Callback of (token id, its natural log-probability, the most probable tokens with theirs, new final text)."""


@dataclass(eq=False)
class SequenceState:
    """One sequence of a decoding batch.

    Attributes:
        top_logprobs: number of most probable tokens that `on_token` receives.
        detokenizer: decodes the sequence and ends it at a stop string.
        on_prompt: receives the log-probabilities of the prompt's tokens from the second one on, in one or more parts;
            None: they are not computed.
        cache_prefix: keep keys and values for prompts that continue this sequence.
        scored: number of prompt tokens that `on_prompt` has received.
        ids, logprobs: generated so far, as in `Generation`.
        finish: "" while decoding, then "stop", "length" or "error".
        error: reason of an "error".
        matcher: constraint on the output, from `GrammarCompiler.compile`; the sequence ends when it is complete.
        context: for the caller's use.
    """

    prompt_ids: list[int]
    params: SamplingParams = SamplingParams()
    mix: Mix = field(default_factory=Mix.base)
    detokenizer: StreamingDetokenizer | None = None
    on_token: OnToken | None = None
    on_prompt: Callable[[list[TokenLogprobs]], None] | None = None
    top_logprobs: int = 0
    cache_prefix: bool = False
    matcher: LLMatcher | None = None
    context: Any = None
    scored: int = 0
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = ""
    error: Exception | None = None
    _draws: list[float] | None = field(default=None, repr=False)

    @cached_property
    def prompt_tokens(self) -> frozenset[int]:
        """Distinct tokens of the prompt."""
        return frozenset(self.prompt_ids)

    @property
    def plain_greedy(self) -> bool:
        """True if the next token is the most probable one, without other log-probabilities."""
        constrained = self.params.penalized or self.matcher is not None
        return not (self.params.do_sample or constrained or self.top_logprobs)

    @property
    def token_ids(self) -> list[int]:
        """Prompt and generated tokens."""
        return [*self.prompt_ids, *self.ids]

    def add(
        self, token: int, logprob: float, eos_token_ids: Collection[int], top: Sequence[tuple[int, float]] = ()
    ) -> None:
        """Append a chosen token; set ``finish`` if it is the last one, or if its log-probability is not finite.

        Args:
            top: most probable tokens at its place, for `on_token`.
        """
        self.ids.append(token)
        self.logprobs.append(logprob)
        if not logprob > float("-inf"):  # NaN, too
            self.fail(ExpertError(
                f"the logits under {self.mix.id} are not finite",
                remedy="use smaller weights, or load the base in float32",
            ))  # fmt: skip
            return
        try:
            self._deliver(token, logprob, list(top), token in eos_token_ids)
        except Exception as error:  # of the matcher, the detokenizer or the callback: the other rows go on
            self.fail(error)

    def _deliver(self, token: int, logprob: float, top: list[tuple[int, float]], end: bool) -> None:
        if self.matcher is not None and (not self.matcher.consume_token(token) or self.matcher.is_error()):
            raise matcher_error(self.matcher)
        text = "" if self.detokenizer is None else self.detokenizer.add(token, end=end)
        if self.on_token is not None:
            self.on_token(token, logprob, top, text)
        stopped = self.detokenizer is not None and self.detokenizer.stopped is not None
        if end or stopped or (self.matcher is not None and self.matcher.is_stopped()):
            self.finish = "stop"
        elif len(self.ids) >= self.params.max_new_tokens:
            self.finish = "length"

    def fail(self, error: Exception) -> None:
        """End the sequence with an error."""
        self.finish, self.error = "error", error

    def draw(self) -> float:
        """Uniform random number in [0, 1) for the next token."""
        if self._draws is None:
            stream = torch.Generator().manual_seed(int(self.params.seed) % 2**63)
            count = max(self.params.max_new_tokens, 1)
            self._draws = torch.rand(count, generator=stream, dtype=torch.float64).tolist()
        return self._draws[len(self.ids)]


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, top: int = 0) -> list[TokenLogprobs]:
    """Return the log-probability of each of N tokens, and the ``top`` most probable ones, from logits [N, V]."""
    scores = logits.float()
    normalizer = scores.logsumexp(-1, keepdim=True)
    chosen = (scores.gather(-1, tokens[:, None]) - normalizer)[:, 0].tolist()
    if not top:
        return [(logprob, []) for logprob in chosen]
    best = scores.topk(min(top, scores.shape[-1]))
    values = (best.values - normalizer).tolist()
    most = [list(zip(*row, strict=True)) for row in zip(best.indices.tolist(), values, strict=True)]
    return list(zip(chosen, most, strict=True))


def select_tokens(logits: torch.Tensor, sequences: Sequence[SequenceState]) -> torch.Tensor:
    """Choose the next token int64 [N] of each sequence from logits float32 [N, V], by its own options."""
    logits = _process(logits, sequences)
    groups: dict[tuple[float, float, int, float], list[int]] = {}
    for row, params in enumerate(one.params for one in sequences):
        if params.do_sample:
            options = (max(float(params.temperature), MIN_TEMPERATURE), params.top_p, params.top_k, params.min_p)
            groups.setdefault(options, []).append(row)
    tokens = logits.argmax(-1)
    for options, rows in groups.items():
        draws = torch.tensor([sequences[row].draw() for row in rows], dtype=torch.float64, device=logits.device)
        every_row = len(rows) == len(sequences)
        tokens[rows] = _sample(logits if every_row else logits[rows], *options, draws)
    return tokens


def _process(logits: torch.Tensor, sequences: Sequence[SequenceState]) -> torch.Tensor:
    """Apply biases, penalties and structured outputs, which hold for greedy decoding, too."""
    matchers = {row: one.matcher for row, one in enumerate(sequences) if one.matcher is not None}
    penalized = [(row, one) for row, one in enumerate(sequences) if one.params.penalized]
    if not matchers and not penalized:
        return logits
    logits = logits.clone()
    if matchers:
        constrain(logits, matchers)
    biases, seen, counted = list[Part](), list[Part](), list[Part]()
    for row, one in penalized:
        params = one.params
        if params.logit_bias:
            biases.append((row, params.logit_bias, list(params.logit_bias.values())))
        if params.repetition_penalty != 1:
            seen.append((row, one.prompt_tokens.union(one.ids), params.repetition_penalty))
        if one.ids and (params.presence_penalty or params.frequency_penalty):
            counts = Counter(one.ids)
            amounts = [params.presence_penalty + params.frequency_penalty * count for count in counts.values()]
            counted.append((row, counts, amounts))
    if biases:
        places, amount = _flatten(biases, logits)
        logits[places] += amount
    if seen:
        places, penalty = _flatten(seen, logits)
        values = logits[places]
        logits[places] = torch.where(values < 0, values * penalty, values / penalty)
    if counted:
        places, amount = _flatten(counted, logits)
        logits[places] -= amount
    return logits


Part = tuple[int, Collection[int], "float | list[float]"]
"""(row, tokens, a number for all or one for each)."""


def _flatten(parts: Sequence[Part], logits: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the index (rows, tokens) and the numbers of parts, so that any number of rows takes a few kernels."""
    rows = np.repeat([row for row, _, _ in parts], [len(tokens) for _, tokens, _ in parts])
    tokens = np.concatenate([np.fromiter(tokens, np.int64, len(tokens)) for _, tokens, _ in parts])
    numbers = np.concatenate([np.broadcast_to(number, len(tokens)) for _, tokens, number in parts]).astype(np.float32)
    fits = tokens < logits.shape[-1]  # image tokens have no logit
    arrays = [torch.from_numpy(array[fits]).to(logits.device) for array in (rows, tokens, numbers)]
    return (arrays[0], arrays[1]), arrays[2]


def _sample(
    logits: torch.Tensor, temperature: float, top_p: float, top_k: int, min_p: float, draws: torch.Tensor
) -> torch.Tensor:
    ids: Any = None  # not used
    logits = TemperatureLogitsWarper(temperature)(ids, logits)
    if min_p > 0:
        logits = MinPLogitsWarper(min_p)(ids, logits)
    if top_k > 0:
        logits = TopKLogitsWarper(top_k)(ids, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(ids, logits)
    probabilities = logits.softmax(-1)
    cumulative = probabilities.cumsum(-1)  # on the CPU torch accumulates in double
    # scaled by the last value so that rounding cannot leave the draw beyond every token
    draws = draws.to(cumulative.dtype) * cumulative[:, -1]
    tokens = torch.searchsorted(cumulative, draws[:, None], right=True).clamp_max(logits.shape[-1] - 1)
    chosen = probabilities.gather(1, tokens)
    if not chosen.all():  # nor on an excluded one
        tokens = torch.where(chosen > 0, tokens, probabilities.argmax(-1, keepdim=True))
    return tokens[:, 0]


OnePass = Callable[[Sequence[Mix], torch.Tensor], AbstractContextManager[Any]]
"""Context manager of (mixture of each row, tokens of the prompts: bool [B, T])."""


class DecodingBatch:
    """Sequences that decode together; finished ones leave, and prefilled ones can join.

    Log-probabilities are of the model's own distribution, regardless of sampling options and structured outputs.

    Args:
        model: a causal language model in the adapted state of the batch's rows.
        eos_token_ids: tokens that end a sequence.
        select: restricts per-row adapter state to remaining rows.
        trie: the only replies allowed; tokens are chosen, and log-probabilities taken, among its continuations.
        one_pass: state for reading prompts and answers again, see `Execution.one_pass`; None: the present state.
    """

    def __init__(
        self,
        model: Any,
        eos_token_ids: Sequence[int],
        select: Select | None = None,
        trie: TokenTrie | None = None,
        one_pass: OnePass | None = None,
    ) -> None:
        self.model, self.eos_token_ids, self.trie, self.one_pass = model, eos_token_ids, trie, one_pass
        self._select, self._threshold = select, batching(model).threshold
        self.clear()

    def clear(self) -> None:
        """Drop all sequences with their keys and values."""
        self.sequences: list[SequenceState] = []
        self.kv_cache = BatchKVCache(batching(self.model).cache_argument)
        self._rows: list[int] | None = None  # row of the adapter state of each sequence; None: state to be entered anew
        self._next: list[int] = []  # last token of each sequence, chosen but not read

    def append(self, sequences: Sequence[SequenceState], state: Prefilled) -> None:
        """Add prefilled sequences and choose their first tokens."""
        tokens = self._choose(sequences, state.logits)
        stay = [row for row, one in enumerate(sequences) if not one.finish]
        if not self.sequences:
            self._rows = stay
            if stay and len(stay) < len(sequences) and self._select is not None:
                self._select(stay)
        else:
            self._rows = None
        if stay:
            self.kv_cache.append(state.select(stay))
            self.sequences += [sequences[row] for row in stay]
            self._next += [tokens[row] for row in stay]

    @torch.no_grad()
    def step(self) -> None:
        """Decode one token of every sequence; those that finish leave."""
        if self._threshold is not None:
            self._read_crossing(self._threshold)
            if not self.sequences:
                return
        tokens = torch.tensor(self._next, device=self.kv_cache.lengths.device)
        logits = self._logits(self.kv_cache.inputs(tokens))
        self.kv_cache.advance()
        self._next = self._choose(self.sequences, logits)
        if finished := [one for one in self.sequences if one.finish]:
            self.remove(finished)

    def _logits(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Return the logits [N, V] of a forward pass, see `BatchKVCache.inputs`."""
        return self.model(**inputs).logits[:, -1]

    def _read_crossing(self, threshold: int) -> None:
        """Read sequences again that grow beyond a threshold of the rotary embedding, and choose their next tokens."""
        crossing = {
            row: one for row, one in enumerate(self.sequences) if len(one.prompt_ids) + len(one.ids) == threshold + 1
        }
        if not crossing:
            return
        assert self._rows is not None
        places = {id(one): self._rows[row] for row, one in crossing.items()}
        members = list(crossing.values())
        if self.one_pass is None and self._select is not None:
            self._select(list(places.values()))
        state = self.read_again(members)
        DecodingBatch.remove(self, members)
        kept = self._rows if self.sequences else []
        self.append(members, state)
        self._rows = [*kept, *(places[id(one)] for one in self.sequences[len(kept) :])]
        if self._select is not None and self._rows:
            self._select(self._rows)

    def read_again(self, sequences: Sequence[SequenceState]) -> Prefilled:
        """Read prompts and generated tokens."""
        rows = [one.token_ids for one in sequences]
        width, device = max(map(len, rows)), self.kv_cache.lengths.device
        ends = torch.tensor([width - len(one.ids) for one in sequences], device=device)  # rows are padded on the left
        is_prompt = torch.arange(width, device=device) < ends[:, None]
        with nullcontext() if self.one_pass is None else self.one_pass([one.mix for one in sequences], is_prompt):
            return prefill(self.model, rows, pad_id=0, share=False)

    def run(self, sequences: Sequence[SequenceState], state: Prefilled) -> None:
        """Decode prefilled sequences to their end."""
        self.append(sequences, state)
        while self.sequences:
            self.step()

    def remove(self, sequences: Sequence[SequenceState]) -> None:
        """Remove sequences; those that are not in the batch are ignored."""
        gone = set(map(id, sequences))
        for wipe in (True, False):  # rows with non-finite values must leave none behind
            rows = [
                row for row, one in enumerate(self.sequences) if id(one) in gone and (one.finish == "error") == wipe
            ]
            if not rows:
                continue
            order = self.kv_cache.remove(rows, wipe)
            self.sequences = [self.sequences[row] for row in order]
            self._next = [self._next[row] for row in order]
            if self._rows is not None:
                self._rows = [self._rows[row] for row in order]
                if self._select is not None and order:
                    self._select(self._rows)

    def _choose(self, sequences: Sequence[SequenceState], logits: torch.Tensor) -> list[int]:
        """Choose and record the next token of every sequence; set ``finish`` of those that end."""
        if self.trie is None and can_choose(logits) and all(one.plain_greedy for one in sequences):
            tokens, best = greedy(logits)
            logprobs: list[TokenLogprobs] = [(logprob, []) for logprob in best.tolist()]
        else:
            scores = logits.float()
            if self.trie is not None:
                scores = self.trie.constrain(scores, [one.ids for one in sequences])
            tokens = select_tokens(scores, sequences)
            logprobs = token_logprobs(scores, tokens, max(one.top_logprobs for one in sequences))
        chosen = tokens.tolist()
        for one, token, (logprob, most) in zip(sequences, chosen, logprobs, strict=True):
            if logprob > float("-inf") and not one.params.max_new_tokens:
                one.finish = "length"
            else:
                one.add(token, logprob, self.eos_token_ids, most[: one.top_logprobs])
        return chosen


@torch.no_grad()
def complete(
    model: Any,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    eos_token_ids: Sequence[int],
    pad_id: int,
    num_generations: int = 1,
    trie: TokenTrie | None = None,
    prompt_only: PromptOnly = everywhere,
    state: Prefilled | None = None,
) -> list[SequenceState]:
    """Generate ``num_generations`` completions of each prompt with a model in its present adapted state.

    Args:
        prompts: N token-id lists. params: for all, or one for each of the N·num_generations completions.
        trie: see `DecodingBatch`.
        prompt_only: state of the model by the mask of prompt tokens.
        state: the prompts if they were read before; consumed.

    Returns:
        The finished sequences, those of one prompt side by side.
    """
    count = len(prompts) * num_generations
    each = [params] * count if isinstance(params, SamplingParams) else params
    sequences = [
        SequenceState(list(prompts[row // num_generations]), one) for row, one in zip(range(count), each, strict=True)
    ]
    state = (state or prefill(model, prompts, pad_id)).repeat(num_generations)
    with prompt_only(False):
        batch = DecodingBatch(model, eos_token_ids, trie=trie, one_pass=lambda _, is_prompt: prompt_only(is_prompt))
        batch.run(sequences, state)
    return sequences
