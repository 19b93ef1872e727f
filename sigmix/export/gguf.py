"""Mixture, or each of its experts, as a GGUF LoRA adapter for llama.cpp. See `sigmix.export.low_rank`.

llama.cpp computes W x + scale · B (A x) with ``adapter.lora.alpha`` 0 and the scale of a request, so the scales of
several adapters are the weights of a mixture. Its Llama interleaves the rows of q and k (its rotary embedding pairs
neighbours), so B's rows are reordered likewise.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from sigmix.errors import ConfigError, UnknownNameError
from sigmix.experts.model_card import on_hub, without_path
from sigmix.export.low_rank import LowRank
from sigmix.export.model_card import CACHE_NOTE
from sigmix.utils.io import atomic_file, check_new, check_room

TYPES = {"f32": torch.float32, "f16": torch.float16}

ARCHITECTURES = {
    "llama": "LLAMA", "mistral": "LLAMA", "mixtral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gemma": "GEMMA",
    "gemma2": "GEMMA2", "gemma3_text": "GEMMA3", "phi3": "PHI3", "gpt2": "GPT2",
}  # fmt: skip
"""{transformers' model_type: llama.cpp's architecture}. Before adding one, check which matrices llama.cpp's converter
permutes: B needs the same permutation, and nothing would fail without it."""

PERMUTED = ("LLAMA",)  # architectures with interleaved rows of q and k in llama.cpp


def export_gguf(
    low: LowRank, out: Path, kind: str = "f32", progress: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Write one adapter file, atomically.

    Args:
        kind: f32 or f16. progress: called for every matrix.

    Returns:
        `LowRank.describe` with form "gguf", ``bytes``, ``type``, ``architecture``.

    Raises:
        ConfigError: see `tensor_names`. OutputError: ``out`` exists, cannot be written, or has no room.
    """
    if kind not in TYPES:
        raise UnknownNameError("number type", kind, TYPES)
    check_new(out)
    architecture, names = _architecture(low), tensor_names(low)
    about = {**low.describe(), "form": "gguf", "type": kind, "architecture": architecture.lower()}
    check_room(out, low.nbytes(TYPES[kind]))
    dtype = np.dtype(str(TYPES[kind]).removeprefix("torch."))
    with atomic_file(out) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[getattr(gguf.MODEL_ARCH, architecture)])
        _add_metadata(writer, low, about)
        for path in low.paths:
            rank, rows, columns = low.shape(path)
            for side, shape in (("lora_a", (rank, columns)), ("lora_b", (rows, rank))):
                writer.add_tensor_info(
                    f"{names[path]}.weight.{side}", shape, dtype, shape[0] * shape[1] * dtype.itemsize
                )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for path in low.paths:
            a, b = low.factors(path)
            for factor in (a, _permuted(low, path, b, architecture)):
                writer.write_tensor_data(factor.to(TYPES[kind]).numpy())
            progress()
        writer.close()
        size = temporary.stat().st_size
        check_new(out)  # minutes may have passed
    return {**about, "bytes": size}


def _architecture(low: LowRank) -> str:
    model_type = low.base.config.model_type
    name = ARCHITECTURES.get(model_type)
    if name is None or not hasattr(gguf.MODEL_ARCH, name):
        raise ConfigError(
            f"GGUF adapters are not supported for the architecture {model_type!r}, only for "
            f"{', '.join(sorted(ARCHITECTURES))}",
            remedy="export a merged checkpoint and convert it with llama.cpp's convert_hf_to_gguf.py",
        )
    return name


def tensor_names(low: LowRank) -> dict[str, str]:
    """Return {path: llama.cpp's tensor name}.

    Raises:
        ConfigError: an unsupported architecture, or a matrix that llama.cpp has no tensor for.
    """
    config, architecture = low.base.config, _architecture(low)
    blocks: int = getattr(config, "num_hidden_layers", None) or config.n_layer
    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture), blocks)
    names = {path: table.get_name(path) for path in low.paths}
    if missing := [path for path, name in names.items() if name is None]:
        raise ConfigError(
            f"llama.cpp has no tensor for {missing[0]} in the architecture {architecture.lower()}",
            remedy="export experts without it, or a merged checkpoint",
        )
    return {path: str(name) for path, name in names.items()}


def _permuted(low: LowRank, path: str, b: torch.Tensor, architecture: str) -> torch.Tensor:
    """B with llama.cpp's row order: the two halves of a head, one after the other in transformers, alternate."""
    part = path.rsplit(".", 1)[-1]
    if architecture not in PERMUTED or part not in ("q_proj", "k_proj"):
        return b
    config = low.base.config
    heads = config.num_attention_heads
    if part == "k_proj":
        heads = getattr(config, "num_key_value_heads", None) or heads
    rows, rank = b.shape
    return b.reshape(heads, 2, rows // heads // 2, rank).transpose(1, 2).reshape(rows, rank).contiguous()


def _add_metadata(writer: gguf.GGUFWriter, low: LowRank, about: dict[str, Any]) -> None:
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)  # 0: the request's scale alone, without alpha / rank
    writer.add_name(low.mix.id)
    writer.add_description(CACHE_NOTE)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, without_path(low.base.name))
    if (repo := on_hub(about["base"]["name"])) is not None:
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{repo}")
    writer.add_string("sigmix.mix", low.mix.id)
    writer.add_string("sigmix.version", about["sigmix"])
    for name, expert in about["experts"].items():
        writer.add_string(f"sigmix.expert.{name}", expert["digest"])
    if about["base"]["fingerprint"]:
        writer.add_string("sigmix.base.fingerprint", about["base"]["fingerprint"])
