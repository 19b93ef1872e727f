"""Plan of a reproduction: run its stages on a tiny model, and estimate what each costs on the real one.

    python -m reproduction --scale half-billion --base FILE.gguf --data-dir DATA --allow-code --plan

All stages run, with the scale's tasks, kinds and seeds, on a few items each. The estimate counts the tokens that
training runs, validations, tunings of α and test cells read and write, with answers as long as their task allows, and
matrix products alone. It leaves out pass one of the strategies and the search of strategy C. Rates tie on the tiny
model, so sweeps add all they may.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from reproduction.lab import Lab
from reproduction.report import table
from reproduction.scale import Kind, Scale
from reproduction.stages import stages
from reproduction.store import Store
from reproduction.tiny import TINY
from sigmix.engine.tokenization import encode
from sigmix.models.loading import read_tokenizer
from sigmix.models.memory import empty_model
from sigmix.tasks.base import Task
from sigmix.train.config import TrainConfig

LARGER = ("larger", "gsm8k")
"""Stages on the larger model."""

READ = 32
"""Samples of a task that lengths are averaged over."""

SMALL = {
    "max_steps": 1, "eval_steps": 1, "generation_batch_size": 4, "per_device_train_batch_size": 4,
    "max_eval_samples": 2, "max_new_tokens": 2,
}  # fmt: skip


@dataclass
class Work:
    """What one stage does.

    Attributes:
        runs: (kind, task) of each training run. cells: of each test cell, the task. tried: tasks measured on validation
            items while α is tuned, with repeats.
    """

    stage: str
    runs: list[tuple[str, str]] = field(default_factory=list)
    cells: Counter[str] = field(default_factory=Counter)
    tried: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Length:
    """Tokens of a task's prompts, and of its targets, on average, and the most of an answer."""

    prompt: float
    target: float
    answer: int


def rehearsal(scale: Scale) -> Scale:
    """Return the same scale on the tiny model, with a few items and steps."""
    return replace(
        scale, base=TINY, larger=TINY, dtype=None, n=4, items={}, validation=2, training={**scale.training, **SMALL},
        larger_training={}, shots=scale.shots[:1], search={"population": 4, "iterations": 1}, classifier_steps=1,
        per_label=2, ia3_steps=1,
    )  # fmt: skip


def rehearse(scale: Scale, folder: Path, data_dir: Path | None = None, allow_code: bool = False) -> list[Work]:
    """Run every stage of a scale on the tiny model; return what each did."""
    small = rehearsal(scale)
    lab = Lab(small, Store(folder / "out"), folder / "work", data_dir, allow_code, lambda line: None)
    found: list[Work] = []
    for stage in stages(small).values():
        before = _stored(lab.store)
        stage.run(lab)
        runs, cells, facts = (
            {name: one for name, one in now.items() if name not in old}
            for now, old in zip(_stored(lab.store), before, strict=True)
        )
        work = Work(stage.name, [(run["kind"], run["task"]) for run in runs.values()], Counter(cells.values()))
        for fact in facts.values():
            for entry in fact.get("tried", []):
                work.tried.update(list(entry.get("accuracy") or ()))
        found.append(work)
    return found


def _stored(store: Store) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """Return the records of runs, {cell: task} and facts."""
    cells = {path.as_posix(): path.parent.name for path in store.folder.glob("cells/*/*.jsonl")}
    facts = {path.stem: store.fact(path.stem) or {} for path in store.folder.glob("facts/*.json")}
    return dict(store.runs()), cells, facts


def length_of(task: Task, tokenizer: Any) -> Length:
    """Measure a task's samples."""
    samples = task.samples("train" if "train" in task.splits() else task.splits()[0], READ)
    prompts = [len(encode(tokenizer, one.turns, one.system)) for one in samples]
    targets = [len(tokenizer(one.target)["input_ids"]) + 1 for one in samples]
    return Length(sum(prompts) / len(samples), sum(targets) / len(samples), task.max_new_tokens)


def passes(kind: Kind, config: TrainConfig) -> float:
    """Return the FLOPs of training per token, in forward passes of the base.

    The loss is a forward and a backward pass, each 1.5 in the factored form; a policy gradient adds rollouts, and a KL
    term the reference.
    """
    loss = 3.0 if kind.policy == "svf" else 2.0
    return loss + (config.objective == "reinforce") + (config.beta > 0)


def tokens(scale: Scale, work: Work, lengths: Mapping[str, Length], configs: Mapping[str, TrainConfig]) -> float:
    """Return the tokens of a stage's work, each counted as often as a forward pass of the base would read it."""
    count = 0.0
    for name, task in work.runs:
        config, length = configs[name], lengths[task]
        answer = length.target if config.objective == "sft" else length.answer
        rows = config.max_steps * config.generation_batch_size
        count += passes(scale.kinds[name], config) * rows * (length.prompt + answer)
        count += (1 + config.max_steps / config.eval_steps) * config.max_eval_samples * (length.prompt + length.answer)
    for task, cells in work.cells.items():
        count += cells * scale.items.get(task, scale.n) * (lengths[task].prompt + lengths[task].answer)
    for task, times in work.tried.items():
        count += times * scale.validation * (lengths[task].prompt + lengths[task].answer)
    return count


def plan_page(scale: Scale, works: Sequence[Work], lab: Lab, tflops: float) -> str:
    """Return the stages in Markdown: runs, cells, tokens, FLOPs, and hours at a rate.

    Args:
        lab: of the scale itself. tflops: effective rate in 10¹² FLOPs a second.
    """
    sizes: dict[str, tuple[Any, int]] = {}
    rows, total = [], 0.0
    for work in works:
        larger = work.stage in LARGER
        base = (scale.larger or scale.base) if larger else scale.base
        if base not in sizes:
            tokenizer, config = read_tokenizer(base)
            sizes[base] = tokenizer, sum(p.numel() for p in empty_model(config).parameters())
        tokenizer, parameters = sizes[base]
        own = replace(scale, base=base, training={**scale.training, **(scale.larger_training if larger else {})})
        tasks = {*(task for _, task in work.runs), *work.cells, *work.tried}
        lengths = {task: length_of(lab.task(task), tokenizer) for task in tasks}
        there = Lab(own, lab.store, lab.work, lab.data_dir, lab.allow_code)
        configs = {kind: there.config(kind, task) for kind, task in work.runs}
        count = tokens(own, work, lengths, configs)
        flops = 2 * parameters * count
        total += flops
        rows.append(_row(work.stage, len(work.runs), work.cells.total(), count, flops, tflops))
    rows.append(_row("all", "", "", 0, total, tflops))
    head = ["stage", "training runs", "test cells", "million tokens", "PFLOP", f"hours at {tflops:g} TFLOP/s"]
    about = (
        f"Base model {Path(scale.base).name}; every answer is counted at its task's limit. See `reproduction/plan.py` "
        "for what is left out."
    )
    return "\n\n".join([f"# Plan of `python -m reproduction --scale {scale.name}`", about, table(head, rows)]) + "\n"


def _row(name: str, runs: Any, cells: Any, count: float, flops: float, tflops: float) -> list[Any]:
    hours = flops / (tflops * 1e12) / 3600
    return [name, runs, cells, f"{count / 1e6:.1f}" if count else "", f"{flops / 1e15:.1f}", f"{hours:.1f}"]
