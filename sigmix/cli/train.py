"""`sigmix train`: train an expert on a task. The options are the fields of `TrainConfig`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import typer

from sigmix.cli import app
from sigmix.cli._console import TrainingProgress, accuracy, emit
from sigmix.cli._loading import open_bank, open_task, read_device_map, read_layers, read_targets
from sigmix.cli._options import ALLOW_CODE, BANK, DATA_DIR, DEVICE_MAP, JSON, data_config, generated_command
from sigmix.errors import ConfigError

if TYPE_CHECKING:
    from sigmix.train.config import TrainConfig
    from sigmix.train.trainer import Trainer


def train(
    task: str = typer.Option(None, help="Task: a name that sigmix tasks lists, rg:NAME, file.py:NAME, or dispatch."),
    out: Path = typer.Option(..., help="Folder for the expert; its name is the expert's."),
    run: Path = typer.Option(None, help="Folder for checkpoints and metrics. Default: runs/NAME."),
    resume: bool = typer.Option(False, "--resume", help="Continue from the run's checkpoint."),
    objective: str = typer.Option(
        None, help="sft (next token on the answers), reinforce (Eq. 1 of the paper), sft+reinforce (in turn), or auto: "
        "sft where there are answers. Default: auto for --data, reinforce for --task."
    ),
    minutes: float = typer.Option(
        None, min=0.1, help="Time budget of training, from which the steps follow. Default: 5 for --data."
    ),
    test_n: int = typer.Option(300, min=0, help="Test items, of the base and the expert after training; 0: none."),
    device_map: str = DEVICE_MAP,
    shard: bool = typer.Option(False, "--shard", help="Shard the base model over the processes; see docs/scaling.md."),
    data_dir: Path = DATA_DIR, allow_code: bool = ALLOW_CODE, bank: Path = BANK,
    compare: str = typer.Option(
        None, help="lora: train PEFT's LoRA of rank 16 in the same loop and with the same number of steps, for the "
        "report."
    ),
    tensorboard: Path = typer.Option(None, help="Folder for TensorBoard events."),
    as_json: bool = JSON,
    **options: Any,
) -> None:  # fmt: skip
    """Train an expert on your data or on a task, by supervised fine-tuning or reinforcement learning.

    Processes started by `accelerate launch` or `torchrun` share the work (docs/scaling.md).
    """
    from sigmix.evals.dispatch import DispatchTask
    from sigmix.experts.metadata import check_name
    from sigmix.experts.serialization import CURVE, check_free
    from sigmix.models.loading import default_dtype, load_base
    from sigmix.tasks.dataset import DataTask
    from sigmix.train import recipe
    from sigmix.train.checkpointing import resumable
    from sigmix.train.distributed import Processes
    from sigmix.train.trainer import Trainer, plot_curve
    from sigmix.utils.cache import claimed

    processes = Processes.from_environment()
    run = run or Path("runs") / out.name
    with processes.report_once(), resumable(run), contextlib.ExitStack() as held:
        name = check_name(out.name)
        loaded = (
            DispatchTask(open_bank(bank), data_dir=data_dir) if task == "dispatch"
            else open_task(task, options, data_dir, allow_code)
        )  # fmt: skip
        options["target_modules"] = read_targets(options["target_modules"])
        options["layers_to_transform"] = read_layers(options["layers_to_transform"])
        dtype = options.pop("dtype")  # recorded by the trainer
        own_data = isinstance(loaded, DataTask)
        if own_data:
            defaults = {
                "max_train_samples": len(loaded.samples("train")), "early_stopping_patience": recipe.PATIENCE
            }  # fmt: skip
            options |= {key: value for key, value in defaults.items() if options[key] is None}
        options["task"], preset = loaded.name, options.pop("preset") or "laptop"
        parts = recipe.phases(objective or ("auto" if own_data else "reinforce"), loaded, run, preset, options)
        if compare not in (None, "lora"):
            raise ConfigError(f"--compare must be lora, not {compare!r}")
        if compare is not None and not (own_data and test_n):
            raise ConfigError("--compare is for the report on --data", remedy="give --data, and --test-n above 0")
        if options["max_steps"] is not None and minutes is not None:
            raise ConfigError("--max-steps and --minutes exclude each other", remedy="give one of them")
        if minutes is None and own_data and options["max_steps"] is None:
            minutes = recipe.MINUTES
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

        def trainer_of(config: TrainConfig, folder: Path) -> Trainer:
            model, tokenizer = load_base(
                config.base, dtype, device, quantization_config=config.quantization, device_map=places
            )
            if isinstance(loaded, DataTask) and config.max_new_tokens is not None:
                loaded.check_budget(tokenizer, config.max_new_tokens)
            return Trainer(model, tokenizer, loaded, config, folder, name, None, processes, shard)

        def shown(trainer: Trainer) -> contextlib.AbstractContextManager[Any]:
            if not processes.is_main:
                return contextlib.nullcontext()
            title = f"training {name}" if trainer.config.policy == "svf" else f"training {trainer.config.policy}"
            progress = TrainingProgress(title, trainer.config, tensorboard)
            trainer.on_log = progress.on_entry
            return progress

        budget = None if minutes is None else 60 * minutes
        trainer, expert, done = recipe.fit(parts, trainer_of, shown, budget, resume)
        figures: dict[str, Any] = {
            "name": name, "task": loaded.name, "run": str(run), "objectives": list(parts), "best": trainer.best,
            "seconds": round(trainer.seconds, 1), "steps": {phase: one.max_steps for phase, (one, _) in done.items()},
        }  # fmt: skip
        if expert is None:
            text = f"policy {trainer.config.policy}: validation {trainer.best}; metrics in {trainer.run.metrics}"
        else:
            if test_n:
                expert, measured = trainer.test(expert, test_n)
                figures |= measured
            if test_n and own_data:
                peer = None
                if compare is not None:
                    other, *_ = recipe.fit(recipe.lora_phases(done, run), trainer_of, shown, None, resume)
                    other.policy.load(other.run.best)
                    peer = other.evaluate(trainer.test_samples(test_n))
                figures["report"] = processes.from_main(
                    lambda: recipe.write_report(
                        trainer, expert, test_n, measured["best_constant"], peer, run / "report"
                    )
                )

            def save() -> None:
                expert.save_pretrained(out)
                plot_curve(trainer.run.history(), out / CURVE, f"{name}: {loaded.name}")

            processes.from_main(save)
            text = f"{out}: {_summary(figures)}"
            if "report" in figures:
                text = f"{out}: {figures['report']['verdict']}\nreport, curve and mistakes: {run / 'report'}"
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
    "train", cls=generated_command(train, data_config, lambda: resolve_name("sigmix.train.config:TrainConfig")),
    help=train.__doc__, epilog="Example: sigmix train --data tickets.csv --out experts/tickets",
)(lambda: None)  # fmt: skip
