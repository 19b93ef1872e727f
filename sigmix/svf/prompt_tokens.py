"""Tokens of the prompt in the forward passes of a PEFT model with adapters of positions "prompt".

They are, by the first rule that holds:

1. a mask is set: those of `sigmix.svf.layer.prompt_only`;
2. within transformers' ``generate``: those of its input, whatever part of them a pass reads;
3. the cache is not empty: none;
4. there are ``labels``: those before the first label of a row that is not -100;
5. all.

TRL gives labels in every pass over prompts with completions (GRPO, RLOO, SFT, DPO, KTO).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from sigmix.errors import ConfigError
from sigmix.svf.layer import SVFLinear, prompt_only


def watch(model: Any) -> None:
    """Set `SVFLinear.prompt_mask` in every forward pass of a model from now on, unless a mask or z of rows are set.

    Raises:
        ConfigError: an encoder reads the model's prompts.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ConfigError(
            "positions='prompt' needs a decoder that reads the prompt, and this model has an encoder for it",
            remedy="use positions='all'",
        )
    if not hasattr(model, "sigmix_prompt_tokens"):
        model.sigmix_prompt_tokens = _Hooks(model)


def unwatch(model: Any) -> None:
    """Undo `watch`."""
    if hasattr(model, "sigmix_prompt_tokens"):
        model.sigmix_prompt_tokens.remove()
        del model.sigmix_prompt_tokens


class _Hooks:
    def __init__(self, model: Any) -> None:
        self.model = model
        self._length: int | None = None  # of the prompts, within generate
        self._layers: dict[str, SVFLinear] = {}  # of the present pass, if a mask is set
        self._checkpointing: list[tuple[Any, Any]] = []  # modules and their functions, replaced in the present pass
        self._handles = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]
        if hasattr(model, "generate"):
            # a deep copy of the model gets a bound method of the copy of this object
            model.generate, model.init_continuous_batching = self._generate, _refuse_packing

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for name in ("generate", "init_continuous_batching"):
            vars(self.model).pop(name, None)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        inputs = [kwargs.get("inputs_embeds"), *args[:1], kwargs.get("inputs"), kwargs.get("input_ids")]
        ids = next((one for one in inputs if one is not None), None)
        length, mask = 1 if ids is None else max(ids.shape[1], 1), kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            length = mask.shape[1]  # includes the tokens of a given cache
        before, self._length = self._length, length
        try:
            return type(self.model).generate(self.model, *args, **kwargs)
        finally:
            self._length = before

    def _enter(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, SVFLinear)}
        if any(layer.prompt_mask is not None or layer.row_z is not None for layer in layers.values()):
            return
        names = list(inspect.signature(type(model).forward).parameters)[1:] if args else []
        mask = self._find({**dict(zip(names, args, strict=False)), **kwargs})
        if mask is True:
            return
        self._layers = layers
        for layer in layers.values():
            layer.prompt_mask = mask
        if model.training and torch.is_grad_enabled():
            for module in model.modules():
                function = getattr(module, "_gradient_checkpointing_func", None)
                if function is not None and getattr(module, "gradient_checkpointing", False):
                    self._checkpointing.append((module, function))
                    module._gradient_checkpointing_func = partial(_checkpoint, function, layers, mask)  # type: ignore

    def _leave(self, *_: Any) -> None:
        for layer in self._layers.values():
            layer.prompt_mask = None
        for module, function in self._checkpointing:
            module._gradient_checkpointing_func = function
        self._layers, self._checkpointing = {}, []

    def _find(self, given: Mapping[str, Any]) -> bool | torch.Tensor:
        """Tokens of the prompt in a pass with these arguments: all, none, or bool [B, T]."""
        if given.get("cu_seq_lens_q") is not None:
            _refuse_packing()
        ids = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        rows, tokens = ids.shape[:2]
        cache = next((given[one] for one in ("past_key_values", "cache_params") if given.get(one) is not None), None)
        past = 0 if cache is None else _cached_tokens(cache)
        if self._length is not None:
            count = self._length - past
            if 0 < count < tokens:
                return (torch.arange(tokens, device=ids.device) < count).expand(rows, tokens)
            return count > 0
        if past:
            return False
        labels = given.get("labels")
        if labels is not None:
            return _before_labels(labels, given.get("attention_mask")) if labels.ndim == 2 else True
        if self.model.training and torch.is_grad_enabled() and cache is None:
            raise ConfigError(
                "a pass that trains an adapter with positions 'prompt' has no labels to separate prompt and answer",
                remedy="give labels with -100 on the prompt, or use sigmix.svf.layer.prompt_only(layers, mask)",
            )
        return True


def _refuse_packing(*_: Any, **__: Any) -> None:
    raise ConfigError(
        "an adapter with positions 'prompt' cannot read sequences that are packed into one row",
        remedy="turn packing, padding-free batches and paged generation off, or use positions='all'",
    )


def _cached_tokens(cache: Any) -> int:
    try:
        return int(cache.get_seq_length())
    except ValueError:  # states of a fixed size only
        return sys.maxsize if cache.has_previous_state() else 0


def _before_labels(labels: torch.Tensor, attention_mask: torch.Tensor | None) -> bool | torch.Tensor:
    """Return bool [B, T], True before the first label of each row.

    Raises:
        ConfigError: a row has no token there, or tokens without labels between its labels.
    """
    answer = labels != -100
    prompt = answer.cumsum(1) == 0
    used = prompt if attention_mask is None or attention_mask.ndim != 2 else prompt & attention_mask.bool()
    if bool((answer.any(1) & ~used.any(1)).any()):
        raise ConfigError(
            "labels begin at the first token, so an adapter with positions 'prompt' would act on none",
            remedy="set the labels of the prompt to -100, or use positions='all'",
        )
    starts = answer[:, :1].sum(1) + (answer[:, 1:] & ~answer[:, :-1]).sum(1)
    if bool((starts > 1).any()):
        raise ConfigError(
            "labels of a row have gaps, and an adapter with positions 'prompt' needs one prompt and one answer a row",
            remedy="make a row of each turn, turn packing off, or use positions='all'",
        )
    return True if bool(prompt.all()) else prompt


def _checkpoint(
    function: Any, layers: Mapping[str, SVFLinear], mask: bool | torch.Tensor, run: Any, *args: Any, **kwargs: Any
) -> Any:
    """Call a gradient-checkpointing function; the backward pass recomputes ``run`` under the same mask."""

    def masked(*inputs: Any) -> Any:
        with prompt_only(layers, mask):
            return run(*inputs)

    return function(masked, *args, **kwargs)
