"""Scoring without generation: next-token logits, log-probabilities of completions, hidden states.

Prompts are read as `Engine.generate` reads them: in left-padded batches, a mixture per row, the common prefix once.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sigmix.engine.base import InferenceEngine, Mixes, Prompt
from sigmix.engine.detokenizer import token_decoder
from sigmix.engine.generation import DecodingBatch, SamplingParams, SequenceState
from sigmix.engine.prefix_cache import answer_logits, everywhere, needs_one_pass, one_pass_logits, right_pad
from sigmix.errors import ConfigError, ExpertError
from sigmix.experts.mix import Mix
from sigmix.models.multimodal import bare, forward_inputs
from sigmix.svf.layer import prompt_only

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from sigmix.engine.engine import Engine


@torch.no_grad()
def next_logits(
    engine: Engine,
    prompts: Sequence[Prompt],
    mix: Mixes = None,
    *,
    answer: Sequence[int] = (),
    start: Sequence[int] | None = None,
    form: str | None = None,
    batch_size: int = 64,
) -> torch.Tensor:
    """Return logits float32 [N, V] of the token after each prompt and the beginning of its answer, on the CPU.

    Args:
        answer: token ids that every answer begins with.
        start: token ids that every prompt starts with, to be cached; default: see `Engine.read`.
    """
    logits = []
    for rows, mixes in _batches(engine, prompts, mix, batch_size, len(answer) + 1):
        if answer and list(map(engine.execution.decoding, mixes)) != mixes:
            device = engine.model.get_input_embeddings().weight.device
            ids, mask = right_pad([[*answer, engine.pad_id]] * len(rows), engine.pad_id, device)
            with engine.one_pass(mixes) as select:
                divided = functools.partial(prompt_only, engine.layers)
                part = one_pass_logits(engine.model, rows, ids, mask, engine.pad_id, select, divided)[:, -1]
        else:
            given = [[*row, *answer] for row in rows]
            with engine.under(mixes, form, sum(map(len, given))) as select:
                part = engine.read(given, mixes, select, start).logits
        logits.append(part.float().cpu())
    return torch.cat(logits) if logits else torch.empty(0, 0)


@torch.no_grad()
def replies_and_logprobs(
    engine: Engine,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[int]],
    mix: Mixes = None,
    *,
    max_new_tokens: int,
    start: Sequence[int] | None = None,
    batch_size: int = 64,
) -> tuple[list[str], list[list[float]]]:
    """Return greedy replies, none if ``max_new_tokens`` is 0, and the log-probability of every token of given answers.

    Prompts are read once for both, and replies that equal their answers are not decoded if all rows decode alike.

    Args:
        answers: token ids, one answer per prompt, none empty. start: see `next_logits`.

    Raises:
        ConfigError: an empty answer, or another number of answers than prompts. ContextError: both do not fit.
    """
    encoded = encode_answered(engine, prompts, answers, max_new_tokens)
    texts: list[str] = []
    logprobs: list[list[float]] = []
    for rows, mixes in _batches(engine, encoded, mix, batch_size):
        part = answers[len(logprobs) : len(logprobs) + len(rows)]
        decoding = list(map(engine.execution.decoding, mixes))
        one_pass = needs_one_pass(engine.model, rows, list(map(len, part)))
        ids, mask = right_pad(part, engine.pad_id, engine.model.get_input_embeddings().weight.device)
        if max_new_tokens or not one_pass:
            tokens = sum(map(len, rows)) + (sum(map(len, part)) if decoding == mixes else 0)
            with engine.under(mixes, tokens=tokens) as select:
                state = engine.read(rows, mixes, select, start)
        if one_pass:
            with engine.one_pass(mixes) as select:
                positions = everywhere if decoding == mixes else functools.partial(prompt_only, engine.layers)
                logits = one_pass_logits(engine.model, rows, ids, mask, engine.pad_id, select, positions)
        with engine.under(decoding) as select:
            if not one_pass:
                logits = answer_logits(engine.model, copy.deepcopy(state) if max_new_tokens else state, ids, mask)
            if max_new_tokens:
                params = SamplingParams(max_new_tokens)
                replies = [SequenceState(row, params, mix) for row, mix in zip(rows, mixes, strict=True)]
                if select is None:
                    greedy = ((logits.argmax(-1) == ids) | ~mask).all(1).tolist()
                    for one, answer, same in zip(replies, part, greedy, strict=True):
                        ends = [place for place, token in enumerate(answer) if token in engine.eos_token_ids]
                        if same and len(answer) <= max_new_tokens and ends == [len(answer) - 1]:
                            one.ids = list(answer)
                left = [row for row, one in enumerate(replies) if not one.ids]
                batch = DecodingBatch(engine.model, engine.eos_token_ids, select, one_pass=engine.execution.one_pass)
                if left:
                    batch.run([replies[row] for row in left], state.select(left))
                decoder = token_decoder(engine.tokenizer)
                texts += [decoder.decode(one.ids, end=engine.eos_token_ids) for one in replies]
        scores = logits.float()
        chosen = (scores.gather(2, ids[..., None])[..., 0] - scores.logsumexp(-1)).tolist()
        logprobs += [row[: len(answer)] for row, answer in zip(chosen, part, strict=True)]
    return texts, logprobs


def encode_answered(
    engine: InferenceEngine, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """Return token ids of prompts with answers to score; raises as `replies_and_logprobs`."""
    if len(answers) != len(prompts) or not all(answers):
        raise ConfigError(f"expected {len(prompts)} completions, one per prompt and none empty, not {len(answers)}")
    rows = [engine.encode(prompt) for prompt in prompts]
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        engine.check_prompt(row, 1, f"prompt {number}")
        engine.check_prompt([*row, *answer], max(max_new_tokens - len(answer), 0), "a prompt with its completion")
    return rows


@torch.no_grad()
def hidden_states(
    engine: Engine, prompts: Sequence[Prompt], layers: Sequence[int], batch_size: int = 64
) -> torch.Tensor:
    """Return float32 [N, len(layers), d] on the CPU: the base's hidden states, averaged over the tokens of each prompt.

    Strings are read without the chat template. Each prompt follows `attention_sink`, which is not averaged. Only the
    layers up to the deepest one run.

    Args:
        layers: numbers of layers passed, from 1 to that of the model.

    Raises:
        ContextError: an empty prompt, or one that leaves no room for the attention sink.
        ConfigError: the model has no list of layers, or fewer, or its layers return several states (Gemma 3n).
    """
    modules = decoder_layers(engine.model)
    if not layers or not all(1 <= layer <= len(modules) for layer in layers):
        raise ConfigError(f"layers must be from 1 to {len(modules)}, not {list(layers)}")
    numbers, sink = sorted(set(layers)), attention_sink(engine.tokenizer)
    bare_rows = [text_ids(engine, prompt) for prompt in prompts]
    for number, row in enumerate(bare_rows):
        engine.check_prompt(row, 1, f"prompt {number}")
    states = []
    for rows, mixes in _batches(engine, [[sink, *row] for row in bare_rows], None, batch_size, new_tokens=0):
        outputs = _outputs(engine, rows, mixes, [modules[number - 1] for number in numbers], _mean_after_first)
        states.append(torch.stack([outputs[numbers.index(layer)] for layer in layers], 1))
    return torch.cat(states)


def text_ids(engine: InferenceEngine, prompt: Prompt) -> list[int]:
    """Return the token ids of a text without the chat template and without `attention_sink`; ids pass through."""
    ids = engine.encode(prompt, chat=False)
    return ids[1:] if ids[:1] == [attention_sink(engine.tokenizer)] else ids


def attention_sink(tokenizer: Any) -> int:
    """Return the token that texts follow in `hidden_states`: the beginning of a text, else its end.

    The first token's state is large and nearly constant (Xiao et al. 2023, arXiv 2309.17453), whatever the token.
    """
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, 0)
    return next(token for token in ids if token is not None)


@torch.no_grad()
def embeddings(
    engine: Engine, prompts: Sequence[Prompt], mix: Mixes = None, *, batch_size: int = 64, normalize: bool = True
) -> torch.Tensor:
    """Return float32 [N, d] on the CPU: the mean of the last hidden states over the tokens of each prompt.

    The last hidden states are those after the final norm. Strings are read without the chat template.

    Args:
        normalize: scale every row to Euclidean length 1, so that the dot product of two rows is their cosine.

    Raises:
        ContextError: an empty prompt, or one longer than the context. ExpertError: hidden states that are not finite.
        ConfigError: the model has no backbone without a language-model head.
    """
    backbone: Any = bare(engine.model).base_model
    if backbone is bare(engine.model):
        raise ConfigError(f"{type(backbone).__name__} has no backbone without a language-model head")
    bare_rows = [engine.encode(prompt, chat=False) for prompt in prompts]
    means = [
        _outputs(engine, rows, mixes, [backbone], _mean)[0]
        for rows, mixes in _batches(engine, bare_rows, mix, batch_size, new_tokens=0)
    ]
    vectors = torch.cat(means) if means else torch.empty(0, 0)
    if not vectors.isfinite().all():
        raise ExpertError("the hidden states are not finite", remedy="use smaller weights in the mixture")
    return nn.functional.normalize(vectors, dim=-1) if normalize else vectors


def decoder_layers(model: PreTrainedModel | PeftModel) -> nn.ModuleList:
    """Return the layers of the model, or of the language model in a vision-language model, in order.

    Raises:
        ConfigError: there is no list of as many modules as its config has layers.
    """
    count = model.config.get_text_config().num_hidden_layers
    inner: Any = bare(model)
    # first the language model, because an image encoder may have as many layers; ModernBERT's decoder is its head
    modules = itertools.chain(inner.get_decoder().modules(), inner.modules())
    lists = [m for m in modules if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise ConfigError(f"{type(model).__name__} has no list of {count} layers")
    return lists[0]


class _LayersDone(Exception):
    """Ends a forward pass after the last module needed."""


def _outputs(
    engine: Engine,
    rows: Sequence[list[int]],
    mixes: Sequence[Mix],
    modules: Sequence[nn.Module],
    reduce: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> list[torch.Tensor]:
    """Return the hidden states [N, T, d] after each module, reduced, in float32 on the CPU.

    Args:
        modules: in the order in which they run; the forward pass ends after the last one.
        reduce: function of hidden states and mask bool [N, T].
    """
    ids, mask = right_pad(rows, engine.pad_id, engine.model.get_input_embeddings().weight.device)
    outputs: list[torch.Tensor] = []

    def record(_: nn.Module, __: Any, output: Any) -> None:
        states = output if isinstance(output, torch.Tensor) else output[0]
        if states.dim() != 3:
            raise ConfigError(f"the layers of a {engine.model.config.model_type} model have no single hidden state")
        outputs.append(reduce(states, mask.to(states.device)).float().cpu())
        if len(outputs) == len(modules):
            raise _LayersDone

    handles = [module.register_forward_hook(record) for module in modules]
    try:
        with engine.under(mixes, tokens=ids.numel()), contextlib.suppress(_LayersDone):
            engine.model(**forward_inputs(engine.model, ids, mask), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def _mean_after_first(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return _mean(states[:, 1:], mask[:, 1:])


def _batches(
    engine: Engine, prompts: Sequence[Prompt], mix: Mixes, batch_size: int, new_tokens: int = 1
) -> Iterator[tuple[list[list[int]], list[Mix]]]:
    rows = [engine.encode(prompt) for prompt in prompts]
    mixes = engine.mixes(mix, len(rows))
    for number, row in enumerate(rows):
        engine.check_prompt(row, new_tokens, f"prompt {number}")
    for start in range(0, len(rows), batch_size):
        yield rows[start : start + batch_size], mixes[start : start + batch_size]
