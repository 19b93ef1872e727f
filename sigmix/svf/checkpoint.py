"""What transformers does to a checkpoint's tensors when it loads them: under which names, and in which dtype."""

from __future__ import annotations

from typing import Any

import torch

from sigmix.shards import Shards


def checkpoint_names(model: Any, shards: Shards) -> tuple[dict[str, str], set[str]]:
    """{parameter of the model: tensor in the checkpoint}, and the parameters that are made of several tensors.

    transformers renames many checkpoints' tensors when it loads them; its own rules are applied here.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters: list[Any] = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    state = model.state_dict()
    tensors: dict[str, str] = {}
    converted: set[str] = set()
    for name in shards:
        found, by = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if by is None:
            tensors[found] = name
        else:
            converted.add(found)
    return tensors, converted


def kept_float(model: Any, dtype: torch.dtype) -> set[str]:
    """Parts of names that transformers keeps in float32 whatever dtype is asked for."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return kept
