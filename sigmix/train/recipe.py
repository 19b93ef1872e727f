"""Training by one objective or by two in turn, within a time budget, and the report on held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from sigmix.errors import ConfigError, UnknownNameError
from sigmix.evals import report
from sigmix.evals.accuracy import Result
from sigmix.experts.expert import Expert
from sigmix.tasks.base import Task
from sigmix.tasks.dataset import DataTask
from sigmix.train.config import TrainConfig, make_config
from sigmix.train.trainer import Trainer

OBJECTIVES = {
    "auto": (), "sft": ("sft",), "reinforce": ("reinforce",), "sft+reinforce": ("sft", "reinforce"),
}  # fmt: skip
SHARES = {"sft": 0.6, "reinforce": 0.4}  # of the time budget, if there are both
EPOCHS = 4  # maximum passes over a user's training rows
MINUTES = 5.0  # default time budget for a user's data
PATIENCE = 4  # validations without improvement after which training on a user's data stops
LORA = {"policy": "lora", "learning_rate": 1e-3, "lora_r": 16, "lora_alpha": 32}
"""Peer of a report; the rate with the best validation accuracy of a sweep (reproduction/tables/laptop.md)."""
MAX_CALIBRATED_LABELS, MAX_CALIBRATED_ROWS = 20, 200

Phases = Mapping[str, tuple[TrainConfig, Path]]
"""Configuration and folder of each objective of a run, in turn."""


def phases(objective: str, task: Task, run: Path, preset: str, options: Mapping[str, Any]) -> Phases:
    """Return the objectives of a run with their configurations; a later one begins with the best z so far.

    Args:
        objective: "sft", "reinforce", "sft+reinforce", or "auto": "sft" for a task with gold replies, else "reinforce".
        options: fields of `TrainConfig`; None: not given.

    Raises:
        UnknownNameError: no such objective. ConfigError: next-token training without gold replies; see `make_config`.
    """
    if objective not in OBJECTIVES:
        raise UnknownNameError("objective", objective, OBJECTIVES)
    gold = bool(task.samples("train", 1)[0].gold)
    chosen = OBJECTIVES[objective] or (("sft",) if gold else ("reinforce",))
    if "sft" in chosen and not gold:
        raise ConfigError(
            f"objective {objective} needs answers, and the data have none", remedy="use --objective reinforce"
        )
    if len(chosen) == 1:
        return {chosen[0]: (make_config(preset, **{**options, "objective": chosen[0]}), run)}
    result: dict[str, tuple[TrainConfig, Path]] = {}
    start = options.get("init_from")
    for phase in chosen:
        config = make_config(preset, **{**options, "objective": phase, "init_from": start})
        result[phase], start = (config, run / phase), str(run / phase / "best")
    return result


def fit(
    parts: Phases,
    trainer_of: Callable[[TrainConfig, Path], Trainer],
    shown: Callable[[Trainer], AbstractContextManager[Any]],
    seconds: float | None = None,
    resume: bool = False,
) -> tuple[Trainer, Expert | None, Phases]:
    """Train by each objective in turn; return the last trainer, its expert, and the configurations that were run.

    Args:
        trainer_of: makes the trainer of a configuration and its folder, on a fresh base. shown: displays its progress.
        seconds: time budget, see `Trainer.set_budget`; None: the steps of the configurations.
    """
    done: dict[str, tuple[TrainConfig, Path]] = {}
    spent = 0.0
    for phase, (config, folder) in parts.items():
        trainer = trainer_of(config, folder)
        if seconds is not None:
            trainer.set_budget(seconds * (SHARES[phase] if len(parts) > 1 else 1.0), EPOCHS, resume)
        with shown(trainer):
            expert = trainer.fit(resume and (len(parts) == 1 or trainer.run.exists))
        done[phase], spent = (trainer.config, folder), spent + trainer.seconds
    trainer.seconds = spent
    return trainer, expert, done


def lora_phases(parts: Phases, run: Path) -> Phases:
    """Return the configurations of `LORA` with the objectives and the number of steps of a run."""
    result: dict[str, tuple[TrainConfig, Path]] = {}
    start = None
    for phase, (config, _) in parts.items():
        folder = run / "lora" / phase
        own = {
            **config.to_dict(), **LORA, "layers_to_transform": None, "parametrization": "direct", "init_from": start
        }  # fmt: skip
        result[phase], start = (TrainConfig(**own), folder), str(folder / "best")
    return result


def write_report(
    trainer: Trainer, expert: Expert, n: int, constant: Mapping[str, Any], lora: Result | None, folder: Path
) -> dict[str, Any]:
    """Compare a tested expert with cheaper ways on the held-out rows, and write the report; return its figures.

    Args:
        n: held-out rows of `Trainer.test`. constant: best constant answer. lora: result of the peer on the same rows.
    """
    task = trainer.task
    assert isinstance(task, DataTask)
    labels = task.inferred.labels if task.grader is None else ()
    samples = trainer.test_samples(n)
    results = {report.EXPERT: trainer.tested["expert"], report.BASE: trainer.tested["base"]}
    calibrated = None
    if labels:
        results[report.TFIDF] = report.text_baseline(task, task.samples("train"), samples)
    if 2 <= len(labels) <= MAX_CALIBRATED_LABELS and trainer.processes.world_size == 1:
        part = samples[:MAX_CALIBRATED_ROWS]
        probabilities = trainer.label_probabilities(part, labels, expert.z)
        best, place = probabilities.max(1)
        right = [task.score(one, labels[int(at)]).value == 1.0 for one, at in zip(part, place, strict=True)]
        calibrated = report.calibration(best.numpy(), right)
    if lora is not None:
        results[report.LORA] = lora
    figures = report.summarize(task, results, constant, labels, calibrated)
    report.write_report(folder, figures, results, trainer.run.history())
    return figures
