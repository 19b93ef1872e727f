"""`sigmix train`: train an expert on a task. The options are the fields of `TrainConfig`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import typer

from sigmix.cli import app
from sigmix.cli._console import TrainingProgress, accuracy, emit
from sigmix.cli._loading import open_bank, read_device_map, read_layers, read_targets
from sigmix.cli._options import ALLOW_CODE, BANK, DATA_DIR, DEVICE_MAP, JSON, generated_command
from sigmix.errors import ConfigError


def train(
    task: str = typer.Option(..., help="Task: a name that sigmix tasks lists, rg:NAME, file.py:NAME, or dispatch."),
    out: Path = typer.Option(..., help="Folder for the expert; its name is the expert's."),
    run: Path = typer.Option(None, help="Folder for checkpoints and metrics. Default: runs/NAME."),
    resume: bool = typer.Option(False, "--resume", help="Continue from the run's checkpoint."),
    test_n: int = typer.Option(300, min=0, help="Test items, of the base and the expert after training; 0: none."),
    device_map: str = DEVICE_MAP,
    shard: bool = typer.Option(False, "--shard", help="Shard the base model over the processes; see docs/scaling.md."),
    data_dir: Path = DATA_DIR, allow_code: bool = ALLOW_CODE, bank: Path = BANK,
    tensorboard: Path = typer.Option(None, help="Folder for TensorBoard events."),
    as_json: bool = JSON,
    **options: Any,
) -> None:  # fmt: skip
    """Train an expert by reinforcement learning or supervised fine-tuning on a task.

    Processes started by `accelerate launch` or `torchrun` share the work (docs/scaling.md).
    """
    from sigmix.evals.dispatch import DispatchTask
    from sigmix.experts.metadata import check_name
    from sigmix.experts.serialization import CURVE, check_free
    from sigmix.models.loading import default_dtype, load_base
    from sigmix.tasks.registry import get_task
    from sigmix.train.config import make_config
    from sigmix.train.distributed import Processes
    from sigmix.train.trainer import Trainer, plot_curve
    from sigmix.utils.cache import claimed

    processes = Processes.from_environment()
    with processes.report_once(), contextlib.ExitStack() as held:
        name, run = check_name(out.name), run or Path("runs") / out.name
        loaded = (
            DispatchTask(open_bank(bank), data_dir=data_dir) if task == "dispatch"
            else get_task(task, data_dir=data_dir, allow_code=allow_code)
        )  # fmt: skip
        options["target_modules"] = read_targets(options["target_modules"])
        options["layers_to_transform"] = read_layers(options["layers_to_transform"])
        dtype = options.pop("dtype")  # recorded by the trainer
        config = make_config(options.pop("preset") or "laptop", task=loaded.name, **options)
        if device_map is not None and (shard or processes.world_size > 1):
            raise ConfigError("--device-map requires a single process", remedy="leave it out, or start one process")

        def claim() -> None:  # until the expert is saved
            held.enter_context(claimed(out))
            check_free(out, replace=resume)

        processes.from_main(claim)
        places = read_device_map(device_map)
        if dtype is None and processes.world_size > 1:  # the default is measured, and may differ between processes
            dtype = processes.from_main(lambda: str(default_dtype(processes.device or "cpu")).removeprefix("torch."))
        device = "cpu" if shard else (processes.device if places is None else None)
        model, tokenizer = load_base(
            config.base, dtype, device, quantization_config=config.quantization, device_map=places
        )
        with contextlib.ExitStack() as shown:
            listener = None
            if processes.is_main:
                progress = TrainingProgress(f"training {name}", config.max_steps, tensorboard)
                shown.enter_context(progress)
                listener = progress.on_entry
            trainer = Trainer(model, tokenizer, loaded, config, run, name, listener, processes, shard)
            expert = trainer.fit(resume)
        figures: dict[str, Any] = {
            "name": name, "task": loaded.name, "run": str(run), "best": trainer.best,
            "seconds": round(trainer.seconds, 1),
        }  # fmt: skip
        if expert is None:
            text = f"policy {config.policy}: validation {trainer.best}; metrics in {trainer.run.metrics}"
        else:
            if test_n:
                expert, measured = trainer.test(expert, test_n)
                figures |= measured

            def save() -> None:
                expert.save_pretrained(out)
                plot_curve(trainer.run.history(), out / CURVE, f"{name}: {loaded.name}")

            processes.from_main(save)
            text = f"{out}: {_summary(figures)}"
        if processes.is_main:
            emit(figures, as_json, text)


def _summary(figures: dict[str, Any]) -> str:
    from sigmix.evals.accuracy import in_part

    best = figures["best"]
    text = f"validation {best['accuracy']:.3f}"
    if "mean_score" in best:
        text += f" (mean score {best['mean_score']:.3f})"
    text += f" at step {best['step']}"
    if "test" in figures:
        test, base = figures["test"], figures["base"]
        constant = figures["best_constant"].get("accuracy", float("nan"))
        text += f"; test {accuracy(test)}, base {accuracy(base)} (n = {test['n']})"
        if in_part(test) or in_part(base):
            text += f", mean score {test['mean_score']:.3f}, base {base['mean_score']:.3f}"
        text += f", p = {figures['paired']['p']:.2g}, best constant {constant:.3f}"
    return text


app.command(
    "train", cls=generated_command(train, lambda: resolve_name("sigmix.train.config:TrainConfig")), help=train.__doc__,
    epilog="Example: sigmix train --task addition --out experts/addition",
)(lambda: None)  # fmt: skip
