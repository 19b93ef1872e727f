"""A tiny base in a folder, experts on it, and dense oracles."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers_engine import expert
from helpers_tiny import build_tiny, build_tokenizer

from sigmix.engine import Engine
from sigmix.experts.bank import Bank
from sigmix.export.base import BaseCheckpoint
from sigmix.export.low_rank import LowRank
from sigmix.models.loading import load_base

NAMES = ("math", "word")

TASK = """
from sigmix.tasks.base import Sample, Score, Task
from sigmix.tasks.sandbox import require_permission

class {name}(Task):
    domain, max_new_tokens = "copies", 4

    def __init__(self, allow_code=False):
        super().__init__()
        self.allow_code = allow_code or not {code}

    def samples(self, split, n=None, seed=0):
        assert split == "test"
        return [Sample.make(prompt, gold) for prompt, gold in {gold}.items()][:n]

    def score(self, sample, reply):
        require_permission(self.allow_code, "this task")
        return Score.of(reply == sample.gold, reply)
"""


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


def copies_bank(folder: Path, base: Path, mix: str, n: int) -> tuple[Bank, Path]:
    """A bank of the experts one and two, and the file of their task ``Copies``.

    The replies of the exact mixture are right, so that its accuracy is 1, and that of a truncated one rises with the
    rank. ``Code`` is the same and needs --allow-code; in ``Same`` the base's replies are right.
    """
    from helpers_cli import add_expert  # pytest loads it as a plugin first

    bank, file = Bank(folder / "bank", create=True), folder / "copies.py"
    for seed, name in enumerate(("one", "two")):
        add_expert(bank, base, name, seed, task=f"{file}:Copies")
    engine = Engine(*load_base(base, "float32"), bank)
    prompts = [f"{i} and {7 * i % 31} of {chr(97 + i % 26)}" for i in range(n)]
    text = ""
    for name, right in (("Copies", mix), ("Code", mix), ("Same", "base")):
        replies = engine.generate(prompts, right, max_new_tokens=4)
        gold = {prompt: one.text for prompt, one in zip(prompts, replies)}
        text += TASK.format(name=name, gold=gold, code=name == "Code")
    file.write_text(text)
    return bank, file
