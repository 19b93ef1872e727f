"""`sigmix train`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import typer

from sigmix.cli._console import Progress, emit, interval
from sigmix.cli._loading import read_device_map, read_layers, read_targets
from sigmix.cli._options import BASE, DEVICE_MAP, JSON, QUANTIZATION


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: sigmix train --task addition --out experts/addition")(train)


def train(
    task: str = typer.Option(..., help="What to learn: a name that sigmix tasks lists, rg:NAME, or file.py:NAME."),
    out: Path = typer.Option(..., help="Folder for the expert; its name is the expert's."),
    base: str = BASE,
    dtype: str = typer.Option(None, help="Of the base's weights, such as float32. Default: the faster one here."),
    quantization: str = QUANTIZATION,
    device_map: str = DEVICE_MAP,
    preset: str = typer.Option("laptop", help="laptop (ours, two cores) or paper (Table 6)."),
    run: Path = typer.Option(None, help="Folder for checkpoints and metrics. Default: runs/NAME."),
    resume: bool = typer.Option(False, "--resume", help="Go on from the run's checkpoint."),
    seed: int = typer.Option(None, help="Random seed."),
    objective: str = typer.Option(None, help="reinforce (Eq. 1) or sft (next token on gold replies)."),
    policy: str = typer.Option(None, help="svf, or lora in the same loop for comparison."),
    max_steps: int = typer.Option(None, help="Optimizer steps."),
    generation_batch_size: int = typer.Option(None, help="Completions per optimizer step, over all processes."),
    num_generations: int = typer.Option(None, help="Completions per prompt."),
    per_device_train_batch_size: int = typer.Option(None, help="Rows per pass in each process; bounds memory."),
    learning_rate: float = typer.Option(None, help="Peak learning rate (AdamW)."),
    lr_scheduler_type: str = typer.Option(None, help="cosine or constant."),
    max_grad_norm: float = typer.Option(None, help="Maximum gradient norm."),
    beta: float = typer.Option(None, help="KL coefficient."),
    kl_estimator: str = typer.Option(None, help="exact or k3."),
    baseline: str = typer.Option(None, help="none, mean or leave-one-out."),
    temperature: float = typer.Option(None, help="Sampling temperature of the rollouts; 0 is greedy."),
    max_new_tokens: int = typer.Option(None, help="Maximum tokens of a completion. Default: the task's."),
    eval_steps: int = typer.Option(None, help="Optimizer steps between validations."),
    max_eval_samples: int = typer.Option(None, help="Validation items."),
    early_stopping_patience: int = typer.Option(None, help="Validations without improvement; 0 never stops early."),
    max_train_samples: int = typer.Option(None, help="Distinct training prompts."),
    targets: str = typer.Option(None, help="all-linear, attention, mlp, or comma-separated module names."),
    layers: str = typer.Option(None, help="half, or comma-separated layer numbers."),
    format_reward: float = typer.Option(None, help="Bonus on the reward -1 of a wrong reply of the right form."),
    parametrization: str = typer.Option(None, help="direct (z = 1 + p) or reference (sigmoid)."),
    kl_limit: float = typer.Option(None, help="KL per token that counts as collapse."),
    test_n: int = typer.Option(300, help="Held-out test items at the end, base and expert on the same; 0: none."),
    data_dir: Path = typer.Option(None, help="Local JSONL data instead of the hub."),
    allow_code: bool = typer.Option(False, "--allow-code", help="Let code tasks run the model's programs."),
    bank: Path = typer.Option(None, help="For --task dispatch: whose experts to choose among. Default: the bundled."),
    shard: bool = typer.Option(False, "--shard", help="Spread the base over the processes; see docs/scaling.md."),
    tensorboard: Path = typer.Option(None, help="Also write TensorBoard events to this folder."),
    as_json: bool = JSON,
) -> None:
    """Train an expert by reinforcement learning on a task's correctness reward.

    Several processes that accelerate launch or torchrun start share the work (docs/scaling.md).
    """
    from sigmix.errors import ConfigError
    from sigmix.experts.metadata import check_name
    from sigmix.experts.serialization import check_free
    from sigmix.tasks.registry import get_task
    from sigmix.train.config import make_config
    from sigmix.train.distributed import Processes
    from sigmix.utils.cache import claimed

    processes = Processes.launched()
    with processes.one_voice(), contextlib.ExitStack() as held:
        name = check_name(out.name)
        if task == "dispatch":
            made = _dispatch(bank, data_dir)
        else:
            made = get_task(task, data_dir=data_dir, allow_code=allow_code)
        config = make_config(
            preset, task=made.name, base=base, seed=seed, objective=objective, policy=policy, max_steps=max_steps,
            generation_batch_size=generation_batch_size, num_generations=num_generations,
            per_device_train_batch_size=per_device_train_batch_size, learning_rate=learning_rate,
            lr_scheduler_type=lr_scheduler_type, max_grad_norm=max_grad_norm, beta=beta, kl_estimator=kl_estimator,
            baseline=baseline, temperature=temperature, max_new_tokens=max_new_tokens, eval_steps=eval_steps,
            max_eval_samples=max_eval_samples, early_stopping_patience=early_stopping_patience,
            max_train_samples=max_train_samples, target_modules=read_targets(targets),
            layers_to_transform=read_layers(layers), parametrization=parametrization, format_reward=format_reward,
            kl_limit=kl_limit, quantization=quantization,
        )  # fmt: skip
        placed = read_device_map(device_map)
        if placed is not None and (shard or processes.count > 1):
            raise ConfigError("--device-map is for one process", remedy="leave it out, or start one process")
        run = run or Path("runs") / name

        def claim() -> None:  # until the expert is saved there
            held.enter_context(claimed(out))
            check_free(out, replace=resume)

        processes.from_main(claim)
        figures, text = _run(name, out, run, made, config, dtype, resume, test_n, tensorboard, processes, shard, placed)
        if processes.main:
            emit(figures, as_json, text)


def _dispatch(bank: Path | None, data_dir: Path | None) -> Any:
    from sigmix.cli._loading import open_bank
    from sigmix.evals.dispatch import DispatchTask

    return DispatchTask(open_bank(bank), data_dir=data_dir)


def _run(
    name: str,
    out: Path,
    run: Path,
    task: Any,
    config: Any,
    dtype: str | None,
    resume: bool,
    test_n: int,
    tensorboard: Path | None,
    processes: Any,
    shard: bool,
    device_map: Any = None,
) -> tuple[dict[str, Any], str]:
    """Train, measure, save; returns the figures and the line for people."""
    from sigmix.evals.accuracy import in_part
    from sigmix.experts.serialization import CURVE
    from sigmix.models.loading import default_dtype, load_base
    from sigmix.train.checkpointing import RunDir
    from sigmix.train.trainer import Trainer, curve, held_out

    folder = RunDir(run)
    if dtype is None and processes.count > 1:  # measured, so that processes could differ
        dtype = processes.from_main(lambda: str(default_dtype(processes.device)).removeprefix("torch."))
    place = "cpu" if shard else (processes.device if device_map is None else None)
    model, tokenizer = load_base(
        config.base, dtype, place, quantization_config=config.quantization, device_map=device_map
    )  # fmt: skip
    with contextlib.ExitStack() as shown:
        progress = processes.main and shown.enter_context(Progress(config.max_steps, f"training {name}", tensorboard))
        listener = progress.on_entry if progress else None
        trainer = Trainer(model, tokenizer, task, config, folder, name, listener, processes, shard)
        expert = trainer.fit(resume)
    figures = {"name": name, "task": task.name, "run": str(folder.path), "best": trainer.best}
    figures["seconds"] = round(trainer.seconds, 1)
    if expert is None:
        return figures, f"policy {config.policy}: validation {trainer.best}; metrics in {folder.metrics}"
    if test_n:
        expert, measured = held_out(trainer, expert, test_n)
        figures |= measured

    def save() -> None:
        expert.save_pretrained(out)
        curve(folder.history(), out / CURVE, f"{name}: {task.name}")

    processes.from_main(save)
    text = f"{out}: validation {trainer.best['accuracy']:.3f}"
    if "mean_score" in trainer.best:
        text += f" (mean score {trainer.best['mean_score']:.3f})"
    text += f" at step {trainer.best['step']}"
    if "test" in figures:
        constant = figures["best_constant"].get("accuracy", float("nan"))
        text += f"; test {interval(figures['test'])}, base {interval(figures['base'])}"
        if in_part(figures["test"]) or in_part(figures["base"]):
            text += f", mean score {figures['test']['mean_score']:.3f}, base {figures['base']['mean_score']:.3f}"
        text += f", p = {figures['paired']['p']:.2g}, best constant {constant:.3f}"
    return figures, text
