"""A tiny base in a folder, experts on it, and dense oracles."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers_engine import expert
from helpers_tiny import build_tiny, build_tokenizer

from sigmix.export.base import BaseCheckpoint
from sigmix.export.low_rank import LowRank

NAMES = ("math", "word")


def base_folder(folder: Path, arch: str = "llama", dtype: torch.dtype = torch.float32, **changes) -> Path:
    """A complete model folder; the same weights every time."""
    model = build_tiny(arch, **changes).to(dtype)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def experts(arch: str = "llama", dtype: torch.dtype = torch.float32, targets="all-linear", **changes) -> dict:
    """{name: Expert} on that base."""
    return {
        name: expert(build_tiny(arch, **changes).to(dtype), name, seed, targets=targets)
        for seed, name in enumerate(NAMES, 1)
    }


def delta(source: BaseCheckpoint, low: LowRank, path: str) -> torch.Tensor:
    """ΔW [out, in] in float64, by LAPACK's SVD of W. W must have well separated singular values."""
    weight = source.layer(path).matrix().double()
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    return (u * (s * (low.z[path].double() - 1))) @ vt


def ids(count: int = 12, seed: int = 0) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(4, 99, (count,), generator=draw).tolist()
