"""What a model thinks of given text, without generating: next-token logits, answers' log-probabilities, hidden states.

All of these read prompts as `Engine.generate` does: in batches, left-padded, a mix per row, the common prefix once.
A prefix that many later requests begin with, a template, can be read once and stored.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sigmix.engine.base import Prompt
from sigmix.engine.generation import SamplingParams, decode
from sigmix.engine.kv_cache import Prefilled
from sigmix.engine.prefix_cache import answer_logits, left_pad
from sigmix.engine.tokenization import check_context
from sigmix.errors import ConfigError
from sigmix.experts.mix import Mix
from sigmix.models.multimodal import whole

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from sigmix.engine.engine import Engine


Mixes = Mix | str | Sequence[Mix | str] | None


def next_logits(
    engine: Engine,
    prompts: Sequence[Prompt],
    mix: Mixes = None,
    *,
    start: Sequence[int] | None = None,
    form: str | None = None,
    batch_size: int = 64,
) -> torch.Tensor:
    """float32 [N, V] on the CPU: logits of the token after each prompt.

    Args:
        start: token ids that every prompt begins with, to be read once and kept; None leaves that to the engine.
    """
    found = []
    for rows, mixes in _batches(engine, prompts, mix, batch_size):
        with engine.under(mixes, form) as keep, torch.no_grad():
            found.append(engine.read(rows, mixes, keep, start).logits.float().cpu())
    return torch.cat(found) if found else torch.empty(0, 0)


@torch.no_grad()
def score(
    engine: Engine,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[int]],
    mix: Mixes = None,
    *,
    batch_size: int = 64,
) -> list[list[float]]:
    """Natural log-probability of every token of given completions.

    Args:
        completions: token ids, one completion per prompt, none empty.

    Raises:
        ConfigError: an empty completion, or another number of completions than prompts. ContextError: both do not fit.
    """
    _check(prompts, completions)
    found: list[list[float]] = []
    for rows, mixes in _batches(engine, prompts, mix, batch_size):
        part = completions[len(found) : len(found) + len(rows)]
        for row, one in zip(rows, part, strict=True):
            check_context(engine.model, row, len(one))
        with engine.under(mixes) as keep:
            found += _logprobs(engine, engine.read(rows, mixes, keep), part)
    return found


def _check(prompts: Sequence[Prompt], completions: Sequence[Sequence[int]]) -> None:
    if len(completions) != len(prompts) or not all(completions):
        raise ConfigError(f"expected {len(prompts)} completions, one per prompt and none empty, not {len(completions)}")


def replies_and_logprobs(
    engine: Engine,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[int]],
    mix: Mixes = None,
    *,
    max_new_tokens: int,
    batch_size: int = 64,
) -> tuple[list[str], list[list[float]]]:
    """Greedy replies, and the natural log-probability of every token of given answers, as if the model had said them.

    The prompts are read once for both.

    Args:
        answers: token ids, one answer to each prompt, none empty.

    Raises:
        ConfigError: an empty answer, or another number of answers than prompts. ContextError: both do not fit.
    """
    _check(prompts, answers)
    texts: list[str] = []
    found: list[list[float]] = []
    for rows, mixes in _batches(engine, prompts, mix, batch_size):
        part = answers[len(found) : len(found) + len(rows)]
        for row, answer in zip(rows, part, strict=True):
            check_context(engine.model, row, max(len(answer), max_new_tokens))
        with engine.under(mixes) as keep, torch.no_grad():
            state = engine.read(rows, mixes, keep)
            found += _logprobs(engine, copy.deepcopy(state), part)
            *_, done = decode(engine.model, state, SamplingParams(max_new_tokens), engine.ends, on_drop=keep)
        texts += [engine.tokenizer.decode(row.ids, skip_special_tokens=True) for row in done]
    return texts, found


def _logprobs(engine: Engine, state: Prefilled, answers: Sequence[Sequence[int]]) -> list[list[float]]:
    """Of answers to prompts that were read; uses the state up."""
    width = max(map(len, answers))
    device = engine.model.get_input_embeddings().weight.device
    ids = torch.tensor([[*one, *[engine.pad_id] * (width - len(one))] for one in answers], device=device)
    mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in answers], device=device).bool()
    logits = answer_logits(engine.model, state, ids, mask).float()
    chosen = logits.gather(2, ids[..., None])[..., 0] - logits.logsumexp(-1)
    return [row[: len(one)] for row, one in zip(chosen.tolist(), answers, strict=True)]


def hidden(engine: Engine, prompts: Sequence[Prompt], depths: Sequence[int], batch_size: int = 64) -> torch.Tensor:
    """float32 [N, D, d] on the CPU: the base's hidden state at each prompt's last token after given layers.

    Only the layers up to the deepest one run.

    Args:
        depths: layer counts, from 1 to the number of layers.

    Raises:
        ConfigError: the model has no list of layers, or not that many.
    """
    layers = decoder_layers(engine.model)
    if not depths or not all(1 <= depth <= len(layers) for depth in depths):
        raise ConfigError(f"depths must be from 1 to {len(layers)}, not {list(depths)}")
    device = engine.model.get_input_embeddings().weight.device
    deepest = max(depths)
    seen: dict[int, torch.Tensor] = {}

    def record(depth: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[depth] = (output[0] if isinstance(output, tuple) else output)[:, -1].float().cpu()
            if depth == deepest:
                raise _Enough

        return hook

    found = []
    for rows, mixes in _batches(engine, prompts, None, batch_size):
        ids, mask = left_pad(rows, engine.pad_id, device)
        handles = [layers[depth - 1].register_forward_hook(record(depth)) for depth in set(depths)]
        try:
            with engine.under(mixes), torch.no_grad():
                engine.model(**whole(engine.model, ids, mask), use_cache=False)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        found.append(torch.stack([seen[depth] for depth in depths], 1))
    return torch.cat(found)


def decoder_layers(model: PreTrainedModel | PeftModel) -> nn.ModuleList:
    """The model's layers, in order.

    Raises:
        ConfigError: there is no one list of as many modules as the config says.
    """
    count = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise ConfigError(f"{type(model).__name__} has no list of {count} layers")
    return lists[0]


class _Enough(Exception):
    """Ends a forward pass whose later layers nobody needs."""


def _batches(
    engine: Engine, prompts: Sequence[Prompt], mix: Mixes, batch_size: int
) -> Iterator[tuple[list[list[int]], list[Mix]]]:
    rows = [engine.encode(prompt) for prompt in prompts]
    mixes = engine.mixes(mix, len(rows))
    for number, row in enumerate(rows):
        check_context(engine.model, row, 1, f"prompt {number}")
    for start in range(0, len(rows), batch_size):
        yield rows[start : start + batch_size], mixes[start : start + batch_size]
