"""What a checkpoint calls the parameters of the model that transformers makes of it.

Mostly the same. Checkpoints of a bare model lack its prefix (GPT-2), and transformers renames what some older or fused
architectures stored; its own rules are asked. A tensor that it splits, stacks or transposes has no counterpart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sigmix.shards import Shards


def placed(model: Any, shards: Shards) -> dict[str, str]:
    """{parameter of ``model`` (on the meta device): tensor of ``shards``}, for those that are stored as they are."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict(keep_vars=True).items()}
    rename = _rules(model, shapes)
    found: dict[str, str] = {}
    for key in shards:
        name = key if key in shapes else rename(key)
        if name is not None and shapes.get(name) == shards.entry(key).shape:
            found[name] = key
    return found


def _rules(model: Any, shapes: dict[str, Any]) -> Callable[[str], str | None]:
    prefix = model.base_model_prefix

    def prefixed(key: str) -> str | None:
        for name in (f"{prefix}.{key}", key.removeprefix(f"{prefix}.")):
            if name in shapes:
                return name
        return None

    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # older and, who knows, newer transformers have other places for them
        return prefixed
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = model.state_dict(keep_vars=True)

    def renamed(key: str) -> str | None:
        name, converted = rename_source_key(key, renamings, converters, prefix, state)
        return None if converted is not None else name

    return renamed
