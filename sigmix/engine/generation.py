"""What `Engine.generate` returns, and the checks on what it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from sigmix.engine.constrained import Choices
from sigmix.engine.kv_cache import Prefilled, growing
from sigmix.engine.prefix_cache import prefill
from sigmix.errors import ConfigError, ContextError
from sigmix.experts.mix import Mix

ROWS_PER_MIX = 24
"""Rows from which a mix is worth merged weights and a batch of its own. Measured on two cores, 64 rows, kept weights:
two mixes take 0.77 of the factored form's time, three 0.94, six 1.23."""


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: decoded, special tokens left out. ids: the generated token ids, the end token included.
        logprobs: natural log-probability of each id under the adapted model. mix: what answered.
        prompt_tokens: length of the prompt. finish: "stop", "length", or "error" for a prompt that does not fit.
        error: with finish "error", what is wrong with the prompt; the text is empty then.
    """

    text: str
    ids: list[int]
    logprobs: list[float]
    mix: Mix
    prompt_tokens: int
    finish: str
    error: ContextError | None = None


def check_options(
    max_new_tokens: int, do_sample: bool, temperature: float, top_p: float, stop_strings: Sequence[str]
) -> None:
    """Raise `ConfigError` for options of generation that cannot work."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be in (0, 1], not {top_p}")
    if do_sample and not 0 < temperature < float("inf"):
        raise ConfigError(
            f"temperature must be positive and finite, not {temperature}", remedy="do_sample=False for greedy decoding"
        )
    if isinstance(stop_strings, str) or not all(stop_strings):
        raise ConfigError(
            f"stop_strings must be a list of strings that are not empty, not {stop_strings!r}",
            remedy="stop_strings=['END']",
        )


def batches(rows: Sequence[int], mixes: Sequence[Mix], batch_size: int, form: str | None) -> Iterator[list[int]]:
    """Numbers of the rows that share a batch: mixes with many rows get one of their own, unless a form is asked for.

    Args:
        rows: numbers. mixes: of all rows, by number.
    """
    for start in range(0, len(rows), batch_size):
        part = list(rows[start : start + batch_size])
        distinct = dict.fromkeys(mixes[number] for number in part)
        if form is None and len(distinct) > 1 and len(part) >= ROWS_PER_MIX * len(distinct):
            for mix in distinct:
                yield [number for number in part if mixes[number] == mix]
        else:
            yield part


# --- The decoding loop: greedy or sampled, finished rows leave the batch, every row has its own random stream.


@dataclass
class SamplingParams:
    """Options of a batch, named as in transformers' `GenerationConfig`; seeds: one for each row."""

    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seeds: Sequence[int] | None = None


@dataclass
class Row:
    """One answer as it grows: token ids (the end token included), their log-probabilities, why it ended."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = ""


def decode(
    model: Any,
    state: Prefilled,
    sampling: SamplingParams,
    ends: Sequence[int],
    stopped: Callable[[int, Row], bool] | None = None,
    on_drop: Callable[[list[int]], None] | None = None,
    choices: Choices | None = None,
) -> Iterator[list[Row]]:
    """Decode answers, yielding all rows after every step (the same list, growing).

    Args:
        state: prompts read by `prefill`; its cache is used up.
        ends: ids that end an answer; they are kept in it.
        stopped: called with (row index, row) after each token of a row; True ends it.
        on_drop: called with the indices of the rows that stay whenever the batch shrinks, so that per-row state of the
            model (each row's own z) can follow.
        choices: the only replies that may be given; tokens are chosen, and their log-probabilities taken, among those
            that can still lead to one.

    The recorded log-probabilities are of the model's own distribution, whatever temperature and `top_p` chose with.
    """
    device, count = state.logits.device, len(state.logits)
    rows = [Row() for _ in range(count)]
    seeds = list(sampling.seeds) if sampling.seeds is not None else list(range(count))
    draws = uniforms(seeds, sampling.max_new_tokens).to(device) if sampling.do_sample else None
    active = list(range(count))
    logits, mask, lengths = state.logits, state.mask, state.lengths
    growing(state.cache, sampling.max_new_tokens)
    for step in range(sampling.max_new_tokens):
        scores = logits.float()
        if choices is not None:
            scores = choices.constrain(scores, [rows[index].ids for index in active])
        if draws is None:
            tokens = scores.argmax(-1)
        else:
            tokens = _sample(scores, sampling.temperature, sampling.top_p, draws[active, step])
        chosen = (scores.gather(1, tokens[:, None])[:, 0] - scores.logsumexp(-1)).tolist()
        stay = []
        for place, (index, token, logprob) in enumerate(zip(active, tokens.tolist(), chosen, strict=True)):
            row = rows[index]
            row.ids.append(token)
            row.logprobs.append(logprob)
            if token in ends or (stopped is not None and stopped(index, row)):
                row.finish = "stop"
            elif len(row.ids) >= sampling.max_new_tokens:
                row.finish = "length"
            else:
                stay.append(place)
        yield rows
        if not stay:
            return
        if len(stay) < len(active):
            keep = torch.tensor(stay, device=device)
            state.cache.batch_select_indices(keep)
            tokens, mask, lengths = tokens[keep], mask[keep], lengths[keep]
            active = [active[place] for place in stay]
            if on_drop is not None:
                on_drop(active)
        mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
        logits = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=lengths[:, None],
            past_key_values=state.cache,
            use_cache=True,
        ).logits[:, -1]
        lengths = lengths + 1


def uniforms(seeds: Sequence[int], count: int) -> torch.Tensor:
    """float64 [N, count] in [0, 1): a row's random stream, which only its seed decides."""
    streams = [torch.Generator().manual_seed(int(seed) % 2**63) for seed in seeds]
    return torch.stack([torch.rand(count, generator=stream, dtype=torch.float64) for stream in streams])


def choose(
    scores: torch.Tensor, temperature: Sequence[float], top_p: Sequence[float], draws: Sequence[float]
) -> torch.Tensor:
    """Tokens int64 [N] of logits float32 [N, V], where every row has options of its own; temperature 0 is greedy.

    A row gets the token that `decode` would choose for it with the same draw.
    """
    tokens = scores.argmax(-1)
    options = list(zip(temperature, top_p, strict=True))
    for warm, share in dict.fromkeys(option for option in options if option[0] > 0):
        rows = [number for number, option in enumerate(options) if option == (warm, share)]
        drawn = torch.tensor([draws[number] for number in rows], dtype=torch.float64, device=scores.device)
        tokens[rows] = _sample(scores[rows], warm, share, drawn)
    return tokens


def _sample(scores: torch.Tensor, temperature: float, top_p: float, draw: torch.Tensor) -> torch.Tensor:
    scores = TemperatureLogitsWarper(temperature)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    steps = scores.softmax(-1).cumsum(-1)  # on the CPU torch accumulates in double
    # scaled by the last step so that rounding can never leave the draw beyond every token
    return torch.searchsorted(steps, (draw.to(steps.dtype) * steps[:, -1])[:, None], right=True)[:, 0].clamp_max(
        scores.shape[-1] - 1
    )


# --- Answers of a model in whatever adapted state it is in: the bare step that the engine and training share.


@torch.no_grad()
def complete(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    ends: Sequence[int],
    pad_id: int,
    group: int = 1,
    choices: Choices | None = None,
) -> list[Row]:
    """`group` answers to each prompt, answers of one prompt beside each other.

    Args:
        prompts: N token-id lists. sampling: its seeds, if given, number N·group.
        choices: the only replies, see `decode`.
    """
    state = prefill(model, prompts, pad_id).repeat(group)
    *_, rows = decode(model, state, sampling, ends, choices=choices)
    return rows
