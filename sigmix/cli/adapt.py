"""`sigmix adapt`: search a mixture on labelled examples (strategy C)."""

from __future__ import annotations

import tempfile
from collections import ChainMap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from sigmix.cli import app
from sigmix.cli._console import Progress, TrainingProgress, accuracy, emit, paired, table
from sigmix.cli._loading import open_bank, open_inference_engine, open_task
from sigmix.cli._options import ALLOW_CODE, BANK, BASE, DATA_DIR, ENGINE, JSON, data_config, generated_command
from sigmix.errors import ConfigError

if TYPE_CHECKING:
    from sigmix.adapt import Example, FewShotSearch
    from sigmix.engine import Engine
    from sigmix.tasks.base import Task
    from sigmix.tasks.dataset import DataTask
    from sigmix.train.trainer import Trainer

    Labelled = tuple[list[Example], Callable[[Example, str], float], int]

TEST_ROWS = 300  # maximum rows on which --compare measures


def adapt(
    task: str = typer.Option(None, help="Task that gives training items and their grader."),
    shots: int = typer.Option(None, min=1, help="Number of examples. Default: 10 of --task, all rows of --data."),
    out: Path = typer.Option(None, help="JSON file for the mixture; for --granularity z the new expert's folder."),
    expert: list[str] = typer.Option([], help="Expert to mix; may be repeated. Default: all of the bank."),
    method: str = typer.Option("cem", help="Search method: cem, cma-es or swarm."),
    settings: str = typer.Option("full", help="full (up to 100 rounds of 32) or light (8 rounds of 16)."),
    granularity: str = typer.Option("model", help="α per model, layer or matrix; z: a swarm moves z itself."),
    normalised: bool = typer.Option(False, "--normalised", help="α of each layer or matrix sums to 1."),
    low: float = typer.Option(0.0, help="Minimum α."),
    high: float = typer.Option(1.0, help="Maximum α."),
    population: int = typer.Option(None, help="Mixtures per round."),
    iterations: int = typer.Option(None, help="Maximum rounds."),
    patience: int = typer.Option(None, help="Rounds without improvement before the search stops."),
    max_new_tokens: int = typer.Option(
        None, min=1, help="Maximum tokens of a reply. Default: the task's; with --data the longest answer's."
    ),
    seed: int = typer.Option(0, help="Random seed of the search and of the items."),
    compare: str = typer.Option(
        None, help="train: also train an expert on the same rows of --data (default: 10), save it beside --out, and "
        "measure both on the other rows."
    ),
    data_dir: Path = DATA_DIR, allow_code: bool = ALLOW_CODE, base: str = BASE, engine: str = ENGINE, bank: Path = BANK,
    as_json: bool = JSON, **options: Any,
) -> None:  # fmt: skip
    """Search a mixture on labelled examples."""
    from sigmix.adapt import FewShotSearch
    from sigmix.adapt.few_shot import SETTINGS
    from sigmix.evals.accuracy import provenance
    from sigmix.experts.metadata import check_name
    from sigmix.experts.mix import answer_note
    from sigmix.utils.io import check_new, check_writable, write_json

    if granularity == "z":
        if out is None or out.suffix == ".json":
            raise ConfigError("--out must be a folder for the new expert", remedy="for example --out experts/mine")
        check_name(out.name)
    elif out is None or out.suffix != ".json":
        raise ConfigError("--out must be a .json file for the mixture", remedy="for example --out mix.json")
    check_new(out)
    check_writable(out)
    if compare not in (None, "train"):
        raise ConfigError(f"--compare must be train, not {compare!r}")
    if compare and (task is not None or granularity == "z"):
        raise ConfigError("--compare needs rows and a mixture", remedy="give --data, and leave --granularity z out")
    if engine == "vllm" and (compare or granularity == "z"):
        raise ConfigError("--compare and --granularity z change experts in memory", remedy="use --engine own")
    loaded = open_task(task, options, data_dir, allow_code)
    if compare:
        check_name(out.stem)
        check_new(out.with_suffix(""))
        loaded = cast("DataTask", loaded).few_shot(shots or 10, seed)
        shots = len(loaded.samples("train"))
    labelled, grade, longest = task_examples(loaded, shots, seed)
    opened = open_inference_engine(engine, base, open_bank(bank))
    if compare and out.stem in opened.bank:
        raise ConfigError(f"the bank has an expert {out.stem} already", remedy="give another --out")
    if task is None:  # a reply as long as the longest answer, and its end token
        longest = max(len(opened.tokenizer(one.gold)["input_ids"]) + 1 for one in labelled)
    with Progress("searching", iterations or SETTINGS.get(settings, {}).get("iterations", 1)) as progress:
        search = FewShotSearch(
            opened, labelled, grade, experts=expert or None, granularity=granularity, normalised=normalised, low=low,
            high=high, method=method, settings=settings, population=population, iterations=iterations,
            patience=patience, max_new_tokens=max_new_tokens or longest, seed=seed,
            progress=lambda entry: progress.advance(1, f"best {entry['best']:.2f}"),
        )  # fmt: skip
        mix = search.fit()
    evidence = search.evidence()
    figures = {
        "name": out.stem, **mix.to_json(), "mix": mix.id, "base": base, "search": evidence, "trace": search.trace,
        "examples": [one.prompt for one in search.examples], **provenance(),
    }  # fmt: skip
    compared = _compare(search, cast("DataTask", loaded), base, out.with_suffix("")) if compare else None
    if compared is not None:
        figures["compared"] = compared
    if granularity == "z":
        description = _save_expert(search, out, task, figures)
    else:
        write_json(out, figures)
        description = mix.id
    text = f"{out}: {description}\naccuracy on the {len(labelled)} examples {evidence['accuracy']:.2f}"
    text += f", {evidence['candidates']} mixtures in {evidence['rounds']} rounds"
    if granularity != "z" and (both := answer_note(mix, opened.bank)):
        text += f"\n{both}"
    if "warning" in evidence:
        text += f"\nnote: {evidence['warning']}"
    if emit(figures, as_json, text) or compared is None:
        return
    rows = [
        [name, f"{one['on_shots']:.3f}", one["n"], accuracy(one), *paired(one["paired"]), one["adapt_seconds"]]
        for name, one in zip(("base", "mixture", "trained expert"), compared["results"], strict=True)
    ]
    columns = ["", f"on the {len(labelled)}", "n", "accuracy [95 %]", "difference [95 %]", "won/lost", "McNemar p", "s"]
    table("rows that neither was adapted to", columns, rows)
    typer.echo(f"{compared['verdict']}\nthe trained expert: {compared['expert']}")


def _compare(search: FewShotSearch, task: DataTask, base: str, out: Path) -> dict[str, Any]:
    """Train an expert on the examples of a search, save it, and measure it beside the mixture on the task's test rows.

    Returns:
        JSON figures: verdict, folder of the expert, and as results those of the base, the mixture and the expert.
    """
    from sigmix.evals.accuracy import held_out_metric, run
    from sigmix.evals.report import adaptation_verdict
    from sigmix.experts.mix import Mix
    from sigmix.models.loading import load_base
    from sigmix.train import recipe
    from sigmix.train.trainer import Trainer

    def shown(trainer: Trainer) -> TrainingProgress:
        progress = TrainingProgress(f"training {out.name}", trainer.config)
        trainer.on_log = progress.on_entry
        return progress

    engine: Any = search.engine  # an `Engine`, of which the bank can be set
    mix, count = search.result, len(search.examples)
    assert mix is not None
    options = {
        "base": base, "seed": search.seed, "task": task.name, "max_train_samples": count,
        "generation_batch_size": min(max(count, 2), 64), "early_stopping_patience": recipe.PATIENCE,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer, expert, _ = recipe.fit(
            recipe.phases("sft", task, Path(folder) / out.name, "laptop", options),
            lambda config, run: Trainer(*load_base(config.base), task, config, run, out.name),
            shown, 60 * recipe.MINUTES,
        )  # fmt: skip
    assert expert is not None
    engine.bank = ChainMap({out.name: expert}, engine.bank)
    base_mix, trained = Mix.base(), Mix.one(out.name)
    with Progress("measuring", len(task.samples("test", TEST_ROWS)) * len({base_mix, mix, trained})) as progress:
        figures, results = run(engine, task, [mix, trained], n=TEST_ROWS, progress=progress.advance)
    entries = {one["mix"]: one for one in figures["results"]}
    before, mixed, after = (entries[one.id] for one in (base_mix, mix, trained))
    metric = held_out_metric(after, before, after["paired"], figures["best_constant"])
    expert.with_meta(metrics=[metric]).save_pretrained(out)
    return {
        "verdict": adaptation_verdict(results[mix.id], results[trained.id], results[base_mix.id]),
        "expert": str(out), "best_constant": figures["best_constant"],
        "results": [
            {**before, "on_shots": search.evaluate([base_mix])[0][0], "adapt_seconds": 0.0},
            {**mixed, "on_shots": search.values[mix.id][0], "adapt_seconds": round(search.trace[-1]["seconds"], 1)},
            {**after, "on_shots": trainer.best["accuracy"], "adapt_seconds": round(trainer.seconds, 1)},
        ],
    }  # fmt: skip


def _save_expert(search: FewShotSearch, out: Path, task: str | None, figures: dict[str, Any]) -> str:
    """Save the z that a swarm found as an expert.

    Raises:
        ConfigError: no z is better than the best mixture.
    """
    from sigmix.experts.expert import Expert

    if search.expert is None:
        raise ConfigError(
            f"no z is better on the examples than the mixture {figures['mix']}, so there is no new expert",
            remedy="use that mixture, or search longer",
        )
    space: Any = search.space
    names = ", ".join(space.starts)
    meta = {
        "description": f"Found by a particle swarm between {names} on {len(search.examples)} examples.",
        "objective": "few-shot swarm", "seed": search.seed, "license": "Apache-2.0",
        "training": {"search": figures["search"], "started_from": list(space.starts)},
        **({"task": task} if task else {}),
    }  # fmt: skip
    found = Expert(out.name, search.expert.z, {"positions": search.expert.positions})
    found.with_meta(**meta).sealed(cast("Engine", search.engine).model).save_pretrained(out)
    return f"a new expert between {names}"


app.command(
    "adapt", cls=generated_command(adapt, data_config), help=adapt.__doc__,
    epilog="Example: sigmix adapt --data my.jsonl --out mix.json; sigmix chat --mix mix.json",
)(lambda: None)  # fmt: skip


def task_examples(task: Task, shots: int | None, seed: int) -> Labelled:
    """Return labelled examples, their scorer, and the tokens of a reply.

    Args:
        shots: items of the training split. Default: 10, or all rows of a user's data.
    """
    from sigmix.adapt import Example
    from sigmix.tasks.dataset import DataTask

    if isinstance(task, DataTask) and shots is None:
        samples = [task.sample(entry) for entry in task.entries]
    else:
        samples = task.samples("train", shots or 10, seed=seed)
    examples = [Example(one.turns, one.gold, one, one.images, one.system) for one in samples]
    return examples, lambda example, reply: task.score(example.extra, reply).value or 0.0, task.max_new_tokens
