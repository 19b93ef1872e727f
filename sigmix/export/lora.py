"""Mixture as a PEFT LoRA, for PEFT, vLLM and SGLang. See `sigmix.export.low_rank`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from sigmix.errors import UnknownNameError
from sigmix.export.base import DTYPES
from sigmix.export.low_rank import LowRank
from sigmix.export.model_card import RECORD, adapter_card
from sigmix.utils.io import atomic_dir, check_new, check_room, write_json, write_text
from sigmix.utils.safetensors import TensorSpec, write_file


def export_lora(
    low: LowRank, out: Path, precision: str = "float32", progress: Callable[[], None] = lambda: None,
    accuracy: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:  # fmt: skip
    """Write a PEFT adapter folder, atomically.

    Args:
        precision: dtype of the file: float32, bfloat16 or float16. progress: called for every matrix.
        accuracy: of a truncated change, see `sigmix.evals.truncation.comparison`.

    Returns:
        `LowRank.describe`, ``bytes``, ``precision``, ``accuracy`` if it is given.

    Raises:
        OutputError: ``out`` exists, cannot be written, or has no room. UnknownNameError: no such precision.
    """
    check_new(out)
    if precision not in DTYPES:
        raise UnknownNameError("precision", precision, DTYPES)
    dtype = DTYPES[precision]
    specs, sides = [], {}
    for path in low.paths:
        rank, rows, columns = low.shape(path)
        for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            name = f"base_model.model.{path}.lora_{side}.weight"
            specs.append(TensorSpec.of(name, shape, dtype))
            sides[name] = path, side
    b: dict[str, torch.Tensor] = {}

    def tensor(name: str) -> torch.Tensor:
        path, side = sides[name]
        if side == "B":
            return b.pop(path).to(dtype)
        first, b[path] = low.factors(path)  # B is written next
        progress()
        return first.to(dtype)

    about = {**low.describe(), **({"accuracy": list(accuracy)} if accuracy else {})}
    size = low.nbytes(dtype)
    check_room(out, size)
    with atomic_dir(out, new=True) as temporary:
        write_file(temporary / "adapter_model.safetensors", specs, tensor)
        write_json(temporary / "adapter_config.json", _config(low))
        write_json(temporary / RECORD, {**about, "precision": precision})
        write_text(temporary / "README.md", adapter_card(about, low.base.vision))
    return {**about, "bytes": size, "precision": precision}


def _config(low: LowRank) -> dict[str, Any]:
    """Contents of ``adapter_config.json``. lora_alpha is the rank in every module, so that PEFT's scale is 1."""
    base = low.base
    ranks = {path: low.shape(path)[0] for path in low.paths}
    counts = list(ranks.values())
    common = max(set(counts), key=lambda rank: (counts.count(rank), rank))
    others = {path: rank for path, rank in ranks.items() if rank != common}
    # short names where they select the same modules, as other programs expect
    short = sorted({path.rsplit(".", 1)[-1] for path in ranks})
    selected = {path for path in base.linears if path.rsplit(".", 1)[-1] in short}
    return {
        # AutoPeftModel loads a folder or a hub name, not the name of the embedded default
        "base_model_name_or_path": str(base.folder) if base.kind in ("default", "gguf") else base.name,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(base.linears[path], Conv1D) for path in ranks),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": common,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": common,
        "rank_pattern": others,
        "target_modules": short if selected == set(ranks) else sorted(ranks),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
