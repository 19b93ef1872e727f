"""Stored tensors in the dtype that they have once the model is loaded: what `load_base` does, one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

from sigmix.experts.expert import Expert
from sigmix.svf.checkpoint import kept_float

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
HALF = ("bfloat16", "float16")
ON_DISK = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def loaded_dtype(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """That of the float parameter ``name`` in a model loaded in ``dtype``: transformers keeps some in float32.

    Its rules (``_keep_in_fp32_modules`` and ``…_strict``) are patterns that are searched for in the name, and they
    hold for half precision only.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return dtype
    kept = any(re.search(part.replace("*", ".*"), name) for part in kept_float(model, dtype))
    return torch.float32 if kept else dtype


def cast_as_loaded(model: Any, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of the checkpoint as the model loaded in ``dtype`` has it; what is no float stays as it is."""
    return tensor.to(loaded_dtype(model, name, dtype)) if tensor.is_floating_point() else tensor


def widens(narrow: str, wide: str) -> bool:
    """Whether every value of one dtype is one of the other."""
    return narrow == wide or wide == "float64" or (wide == "float32" and narrow in HALF)


def dtype_of_experts(experts: Iterable[Expert]) -> str | None:
    """What these experts recorded as the dtype of their base, if they all have the same; of verified ones only.

    An expert of a quantised base names both, such as "bfloat16 in int8".
    """
    made = {(expert.meta.get("base") or {}).get("dtype") for expert in experts if expert.verified}
    return made.pop() if len(made) == 1 else None
