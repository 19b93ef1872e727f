"""Stores with made-up items, and labs on tiny models."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from helpers_tiny import build_tiny
from peft import LoraConfig, get_peft_model

from reproduction.__main__ import app
from reproduction.blend import Blend
from reproduction.lab import Lab
from reproduction.names import run_name
from reproduction.scale import SCALES, Scale
from reproduction.store import Store
from sigmix.cli import run as run_app
from sigmix.evals.accuracy import Item, Result
from sigmix.experts.expert import Expert
from sigmix.tasks.base import Sample

IDS = torch.tensor([[5, 9, 33, 70, 12, 8]])


def samples(n: int = 10) -> list[Sample]:
    return [Sample.make(f"question {i}?", str(i)) for i in range(n)]


def result(task: str, right: list[bool]) -> Result:
    items = [
        Item(s.id, s.prompt, s.gold, f"reply {mark}", s.gold if mark else None, float(mark), "")
        for s, mark in zip(samples(len(right)), right, strict=True)
    ]
    return Result(task, items)


def put(store: Store, task: str, who: str, right: list[bool], **facts) -> None:
    """A cell with these marks."""
    store.write_items(task, samples(len(right)), {"best_constant": {"reply": "3", "accuracy": 0.1}})
    store.write(result(task, right), who, {"n": len(right), **facts})


def swept(store: Store, scale: Scale, kind: str, found: dict[float, tuple[float, float]], **changes) -> None:
    """Records of a sweep: {learning rate: (validation accuracy, KL)}."""
    for lr, (accuracy, kl) in found.items():
        record = {
            "kind": kind, "task": scale.sweep, "seed": scale.seeds[0], "lr": lr, "after": [], "outcome": "done",
            "best": {"accuracy": accuracy, "step": 2}, "parameters": 5, "seconds": 1.0, "config": {"beta": 0.1},
            "history": [{"kind": "step", "step": 1, "kl": kl}, {"kind": "step", "step": 2, "kl": 99.0}], **changes,
        }  # fmt: skip
        name = run_name(record["kind"], lr, record["task"], record["seed"], record["after"])
        store.write_run(name, {"name": name, **record})


def lab(tmp_path, base: str | None = None, **changes) -> Lab:
    """A lab of the smoke scale."""
    scale = replace(SCALES["smoke"], **({"base": base} if base else {}), **changes)
    return Lab(scale, Store(tmp_path / "out"), tmp_path / "work", say=lambda line: None)


def call(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    """Run ``python -m reproduction`` in this process; return its exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["reproduction", *words])
    code = 0
    try:
        run_app(app, "reproduction")
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


def expert(name: str, seed: int, width: float = 0.5) -> Expert:
    """Random z on the tiny Llama."""
    draw = torch.Generator().manual_seed(seed)
    layers = {n: m for n, m in build_tiny().named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    z = {n: 1 + width * (torch.rand(min(m.weight.shape), generator=draw) - 0.5) for n, m in layers.items()}
    return Expert(name, z)


def loras(folder, names=("one", "two"), width: float = 0.2):
    """Saved LoRA adapters with both factors away from zero."""
    found = {}
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        model = get_peft_model(build_tiny(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, width)
        model.save_pretrained(folder / name)
        found[name] = folder / name
    return found


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def dense(blend: Blend, weights) -> torch.Tensor:
    """The base with Σ α ΔW added in float64."""
    model = build_tiny().double()
    for path in blend.places:
        for name, alpha in weights.items():
            model.get_submodule(path).weight.data += alpha * blend.update(path, name).double()
    return logits(model)
