"""A tiny base and experts that vLLM's engine runs, and that engine; see `needs_vllm`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from helpers_engine import expert
from helpers_experts import at
from helpers_export import base_folder
from helpers_tiny import build_tiny

from sigmix.experts.bank import Bank

SIZES = {"hidden_size": 128, "intermediate_size": 192}
"""With heads of 32: vLLM's attention on the CPU has none of 16."""

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
}  # fmt: skip

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def home(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Bank]:
    """Write a base, and a bank of two experts on all tokens (math, word) and two on prompts (ask, tell)."""
    base, bank = base_folder(folder / "base", dtype=dtype, **SIZES), Bank(folder / "bank", create=True)
    for seed, name in enumerate(("math", "word", "ask", "tell"), 1):
        made = expert(build_tiny(**SIZES).to(dtype), name, seed)
        bank.add(at("prompt", made, name) if name in ("ask", "tell") else made)
    return base, bank


ALIVE = []
"""Engines of this process: one that is collected ends the process groups of all."""


def start(base: Path, bank: Bank, **options):
    """Return `vllm.LLM` with the plugin, and with a cache of 8,192 tokens."""
    os.environ["SIGMIX_VLLM_EXPERTS"] = str(bank.folder)
    import vllm

    options = {
        "dtype": "float32", "num_gpu_blocks_override": 256, "max_loras": 4, "max_model_len": 256, "block_size": 32,
        "max_num_seqs": 64, **options,
    }  # fmt: skip
    ALIVE.append(vllm.LLM(str(base), enable_lora=True, enforce_eager=True, **options))
    return ALIVE[-1]
