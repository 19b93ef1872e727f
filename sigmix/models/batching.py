"""Independence of the rows of a batch: rotary frequencies per row, and the cache and padding that a model supports."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, cache_utils
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from sigmix.errors import BaseModelError
from sigmix.models.multimodal import auto_class, bare, is_vision

CACHE_LAYERS = (
    DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, LinearAttentionAndFullAttentionLayer,
    *((cache_utils.DummyLayer,) if hasattr(cache_utils, "DummyLayer") else ()),  # not in transformers 5.19
)  # fmt: skip
"""Kinds of cache layers of the supported models: keys and values, or states of a fixed size, or both, or nothing."""

MASK_POSITIONS = ("bloom", "mpt")
"""Attention without ``position_ids``: ALiBi, with distances from the mask or the columns."""

OWN_CACHE = ("minimax", "recurrent_gemma", "xlstm")
"""Models with a cache class of their own, or a state in their modules, in spite of their config."""


def check_config(config: Mapping[str, Any], label: str) -> None:
    """Raise `BaseModelError` unless the architecture of a ``config.json`` can run in batches, see `check_architecture`.

    Configs that transformers cannot read pass: loading reports them.
    """
    from transformers import CONFIG_MAPPING

    try:
        parsed = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        model_class = auto_class(config)._model_mapping[type(parsed)]
    except Exception:
        return
    if not is_vision(config):
        check_architecture(model_class, parsed, label)


def check_architecture(model_class: type[PreTrainedModel], config: PreTrainedConfig, label: str) -> None:
    """Raise `BaseModelError` if rows of such a model could not be independent of their batch."""
    accepted = inspect.signature(model_class.forward).parameters
    kind = config.get_text_config(decoder=True).model_type
    if kind in OWN_CACHE or not {"past_key_values", "cache_params"} & set(accepted):
        reason = "its state is not a cache of transformers' common classes"
    elif other := sorted({type(layer).__name__ for layer in _layers(config) if type(layer) not in CACHE_LAYERS}):
        reason = f"its cache has layers of the kinds {', '.join(other)}"
    elif "encoder_hidden_states" in accepted and getattr(config, "is_decoder", True) is False:
        reason = "its attention is not causal"
    elif (
        "position_ids" not in accepted
        and kind not in MASK_POSITIONS
        and not all(isinstance(layer, LinearAttentionLayer) for layer in _layers(config))
    ):
        reason = "its positions cannot be given, so padding would shift them"
    else:
        return
    raise BaseModelError(
        f"{label} has model_type {kind!r}, which sigmix does not support: {reason}",
        remedy="choose one of the architectures in docs/architectures.md",
    )


def _layers(config: PreTrainedConfig) -> list[Any]:
    return DynamicCache(config=config).layers


class Batching:
    """Batching capabilities of a model: padding, cache, and the threshold of its rotary embedding.

    Attributes:
        cache_argument: name of the cache's argument in the forward pass.
        recurrent: True if layers keep states of a fixed size: prompts are then read without padding, chunks or shared
            prefixes, and completions are scored without a cache.
        threshold: length in tokens above which a row has other rotary frequencies (longrope); None: no such length.
    """

    def __init__(self, model: Any) -> None:
        check_architecture(type(model), model.config, "this model")
        accepted = inspect.signature(model.forward).parameters
        self.cache_argument = "past_key_values" if "past_key_values" in accepted else "cache_params"
        self.recurrent = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in _layers(model.config))
        self._rotary = [RowRotary(module) for module in model.modules() if RowRotary.fits(module)]
        self.threshold = min((one.threshold for one in self._rotary if not one.dynamic), default=None)

    def regime(self, length: int) -> bool:
        """Return True if a row of this length is beyond the threshold."""
        return self.threshold is not None and length > self.threshold

    def one_regime(self, rows: Sequence[Sequence[int]]) -> bool:
        """Return True if all rows are on the same side of the threshold."""
        return self.threshold is None or len({self.regime(len(row)) for row in rows}) == 1

    @property
    def varying(self) -> bool:
        """True if rotary frequencies depend on the length of a row."""
        return bool(self._rotary)

    @contextmanager
    def part_of(self, length: int) -> Iterator[None]:
        """Compute rows as parts of rows with at least ``length`` tokens inside this context."""
        before = [one.least for one in self._rotary]
        for one in self._rotary:
            one.least = length
        try:
            yield
        finally:
            for one, least in zip(self._rotary, before, strict=True):
                one.least = least


_BATCHING: weakref.WeakKeyDictionary[nn.Module, Batching] = weakref.WeakKeyDictionary()


def batching(model: Any) -> Batching:
    """Return the `Batching` of a model; the first call replaces its rotary modules by `RowRotary`.

    Raises:
        BaseModelError: an architecture with rows that would depend on their batch.
    """
    base = bare(model)
    if base not in _BATCHING:
        _BATCHING[base] = Batching(base)
    return _BATCHING[base]


class RowRotary:
    """Forward pass of a rotary module with length-dependent frequencies, chosen for each row by its own length.

    transformers chooses them by the longest row of a batch, and keeps those of dynamic NTK for later batches.

    Attributes:
        least: length that rows have at least, if only parts of them are passed.
    """

    def __init__(self, module: Any) -> None:
        self.module, self.forward, self.least = module, module.forward, 0
        kinds = [module.rope_type] if isinstance(module.rope_type, str) else list(module.rope_type.values())
        self.dynamic = any("dynamic" in kind for kind in kinds)
        self.threshold: int = module.original_max_seq_len if self.dynamic else _original_length(module)
        module.forward = self

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Return True for a rotary module with length-dependent frequencies that was not replaced."""
        kinds = getattr(module, "rope_type", None)
        kinds = list(kinds.values()) if isinstance(kinds, dict) else [kinds]
        return any(isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind) for kind in kinds)

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths = [max(last + 1, self.least) for last in position_ids.amax(-1).tolist()]
        lengths = [length if length > self.threshold else 0 for length in lengths]
        groups: dict[int, list[int]] = {}
        for row, length in enumerate(lengths):
            groups.setdefault(length if self.dynamic else bool(length) * (self.threshold + 1), []).append(row)
        if self.dynamic:
            self._reset()
        if groups.keys() == {0}:
            return self.forward(x, position_ids, *args, **kwargs)
        parts = []
        for length, rows in groups.items():
            own = position_ids[rows]
            # an additional last position, which is cut off again, sets the length
            longer = torch.cat([own, own.new_full((len(rows), 1), max(length - 1, 0))], 1)
            out = self.forward(x, longer, *args, **kwargs)
            parts.append([out] if isinstance(out, torch.Tensor) else list(out))
            if self.dynamic:
                self._reset()
        order = [row for rows in groups.values() for row in rows]
        back = torch.tensor([order.index(row) for row in range(len(lengths))], device=position_ids.device)
        whole = [torch.cat(same)[back, :-1] for same in zip(*parts, strict=True)]
        return whole[0] if isinstance(out, torch.Tensor) else tuple(whole)

    def _reset(self) -> None:
        """Restore the frequencies below the threshold, which dynamic NTK overwrites."""
        module = self.module
        names = [""] if isinstance(module.rope_type, str) else [f"{name}_" for name in module.rope_type]
        for name in names:
            original = getattr(module, f"{name}original_inv_freq", None)
            if original is not None:
                setattr(module, f"{name}inv_freq", original.to(getattr(module, f"{name}inv_freq").device))
                setattr(module, f"{name}max_seq_len_cached", self.threshold)


def _original_length(module: Any) -> int:
    """Return the length up to which longrope has its short factors."""
    parameters = module.config.rope_parameters
    each: Sequence[Mapping[str, Any]] = [parameters, *(one for one in parameters.values() if isinstance(one, dict))]
    return min(one["original_max_position_embeddings"] for one in each if one.get("rope_type") == "longrope")
