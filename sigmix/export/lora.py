"""A mix as a PEFT LoRA, for everything that loads LoRA: PEFT, vLLM, SGLang. See `sigmix.export.low_rank`.

lora_alpha equals the rank in every module (rank_pattern, alpha_pattern), so PEFT's scale alpha / r is 1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from sigmix.export.low_rank import LowRank
from sigmix.export.model_card import RECORD, adapter_card
from sigmix.svf.checkpoint import DTYPES
from sigmix.utils.io import atomic_dir, check_new, check_room, write_json, write_text
from sigmix.utils.safetensors import spec, write_file

WEIGHTS = "adapter_model.safetensors"


def export_lora(
    low: LowRank, out: Path, precision: str = "float32", progress: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Write a PEFT adapter folder, whole or not at all.

    Args:
        precision: of the numbers in the file; float32, bfloat16 or float16. progress: called for every matrix.

    Returns:
        What `LowRank.describe` says, ``bytes``, ``precision``.

    Raises:
        OutputError: ``out`` exists, cannot be written, or has no room.
    """
    check_new(out)
    dtype = DTYPES[precision]
    specs, pair = [], {}
    for path in low.paths:
        rank, rows, columns = low.size(path)
        first, second = (f"base_model.model.{path}.lora_{side}.weight" for side in "AB")
        specs += [spec(first, (rank, columns), dtype), spec(second, (rows, rank), dtype)]
        pair[first], pair[second] = (path, 0), (path, 1)
    made: dict[str, torch.Tensor] = {}

    def tensor(name: str) -> torch.Tensor:
        path, side = pair[name]
        if side == 0:  # A and B of a matrix come one after the other: they are made together, once
            a, b = low.factors(path)
            made["B"] = b
            progress()
            return a.to(dtype)
        return made.pop("B").to(dtype)

    about = low.describe()
    check_room(out, sum(one.bytes for one in specs))
    with atomic_dir(out, new=True) as temporary:
        write_file(temporary / WEIGHTS, specs, tensor)
        write_json(temporary / "adapter_config.json", _config(low))
        write_json(temporary / RECORD, {**about, "precision": precision})
        write_text(temporary / "README.md", adapter_card(about, bool(low.source.root)))
    return {**about, "bytes": sum(one.bytes for one in specs), "precision": precision}


def _config(low: LowRank) -> dict[str, Any]:
    """Contents of ``adapter_config.json``; nothing in it needs sigmix."""
    ranks = {path: low.size(path)[0] for path in low.paths}
    counts = list(ranks.values())
    common = max(set(counts), key=lambda rank: (counts.count(rank), rank))
    others = {path: rank for path, rank in ranks.items() if rank != common}
    return {
        "base_model_name_or_path": _base(low),
        "bias": "none",
        "fan_in_fan_out": any(isinstance(low.source.linears[path], Conv1D) for path in ranks),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": common,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": common,
        "rank_pattern": others,
        "target_modules": _targets(low, list(ranks)),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _base(low: LowRank) -> str:
    # what AutoPeftModel would load: a folder or a hub name; the embedded default's name means nothing to it
    return str(low.source.folder) if low.source.kind in ("default", "gguf") else low.source.name


def _targets(low: LowRank, paths: list[str]) -> list[str]:
    """Short names (``q_proj``) where these mean the same modules, as other programs expect; else full paths."""
    short = sorted({path.rsplit(".", 1)[-1] for path in paths})
    meant = {path for path in low.source.linears if path.rsplit(".", 1)[-1] in short}
    return short if meant == set(paths) else sorted(paths)
