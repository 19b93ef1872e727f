"""`sigmix eval`: accuracy of mixtures and strategies on a task; `sigmix tasks`: list, show and check tasks."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sigmix.cli import _options as shared
from sigmix.cli import app
from sigmix.cli._console import Progress, accuracy, check_output, emit, note, paired, table, working
from sigmix.cli._loading import open_bank, open_inference_engine, open_mixes, open_task
from sigmix.cli._options import generated_command
from sigmix.errors import ConfigError, SigmixError, TaskError, UnknownNameError

if TYPE_CHECKING:
    from sigmix.tasks.base import Task


def evaluate(
    task: str = typer.Option(None, help="Task: a name that sigmix tasks lists, rg:NAME, or file.py:NAME."),
    mix: list[str] = typer.Option([], help=f"Mixture: {shared.MIXTURE}; may be repeated."),
    expert: list[str] = typer.Option([], help="Expert; may be repeated."),
    strategy: list[str] = typer.Option(
        [], help="base, A, B, C, D, each-expert or oracle, in place of --mix; may be repeated."
    ),
    dispatch: bool = typer.Option(
        False, "--dispatch", help="Measure how often strategies choose the right expert, in place of --task."
    ),
    requests: Path | None = typer.Option(
        None, help='JSON file {"LABEL": ["request", …]} for --dispatch, in place of the test prompts of the tasks.'
    ),
    shots: int = typer.Option(10, min=1, help="Training items for strategy C."),
    n: int = typer.Option(300, min=1, help="Items; with --dispatch, per label."),
    split: str = typer.Option("test", help="test, validation or train."),
    seed: int = typer.Option(0, help="Random seed of items, sampling and bootstrap."),
    temperature: float = shared.SAMPLING["temperature"],
    max_new_tokens: int = typer.Option(None, min=1, help="Maximum tokens of an answer. Default: the task's."),
    batch: int = typer.Option(64, min=1, help="Batch size."),
    out: Path = typer.Option(None, help="Folder for items (JSONL, a file per mixture) and summary.json."),
    data_dir: Path = shared.DATA_DIR, allow_code: bool = shared.ALLOW_CODE, base: str = shared.BASE,
    quantization: str = shared.QUANTIZATION, basis: str = shared.BASIS, device_map: str = shared.DEVICE_MAP,
    decode_weights: str = shared.DECODE_WEIGHTS, compile: bool = shared.COMPILE, engine: str = shared.ENGINE,
    bank: Path = shared.BANK, as_json: bool = shared.JSON, **data: Any,
) -> None:  # fmt: skip
    """Measure accuracy of the base model, mixtures or strategies on the same items, with intervals and paired tests."""
    if dispatch and (task is not None or data.get("data") is not None):
        raise ConfigError("--dispatch cannot be combined with --task or --data")
    if (dispatch or strategy) and (mix or expert):
        raise ConfigError("--mix and --expert cannot be combined with --strategy or --dispatch")
    unused = {
        "quantization": quantization, "basis": basis != "own", "device-map": device_map, "compile": compile,
        "decode-weights": decode_weights, "temperature": temperature, "max-new-tokens": dispatch and max_new_tokens,
    }  # fmt: skip
    for option in [option for option, given in unused.items() if given and (dispatch or strategy)]:
        raise ConfigError(f"--{option} cannot be combined with {'--dispatch' if dispatch else '--strategy'}")
    if dispatch:
        letters = strategy or (["A"] if engine == "vllm" else ["A", "D"])
        _dispatch(letters, requests, n, seed, split, out, base, bank, data_dir, as_json, engine)
        return
    if requests is not None:
        raise ConfigError("--requests needs --dispatch")
    loaded = open_task(task, data, data_dir, allow_code)
    if strategy:
        _strategies(loaded, strategy, shots, n, split, seed, max_new_tokens, batch, out, base, bank, as_json, engine)
        return
    mixes, experts = open_mixes([*expert, *mix], bank)
    samples = loaded.samples(split, n, seed=seed)  # type: ignore[arg-type]
    loaded.score(samples[0], "")  # fails early if the task must not execute programs
    if out is not None:
        check_output(out, "summary.json")
    opened = open_inference_engine(
        engine, base, experts, mixes, quantization=quantization, basis=basis, device_map=device_map,
        decode_weights=decode_weights, compile=compile,
    )  # fmt: skip

    from sigmix.evals.accuracy import run, save

    with Progress("base", len(samples) * len({"base", *(one.id for one in mixes)})) as progress:
        figures, results = run(
            opened, loaded, mixes, split=split, n=n, seed=seed, do_sample=temperature > 0,  # type: ignore[arg-type]
            temperature=temperature, max_new_tokens=max_new_tokens, batch_size=batch, progress=progress.advance,
        )  # fmt: skip
    if out is not None:
        save(out, figures, results)
    if emit(figures, as_json):
        return
    rows = [
        [one["mix"], one["n"], accuracy(one), *paired(one["paired"]), f"{one['answer_entropy']:.2f}",
         one["unscorable"], one["no_answer"], one["truncated"]]
        for one in figures["results"]
    ]  # fmt: skip
    columns = ["mix", "n", "accuracy [95 %]", "difference [95 %]", "won/lost", "McNemar p"]
    table(_title(figures), [*columns, "entropy", "unscorable", "no answer", "cut off"], rows)
    if any(abs(one["mean_score"] - one["accuracy"]) > 1e-9 for one in figures["results"]):
        scores = ", ".join(f"{one['mix']} {one['mean_score']:.3f}" for one in figures["results"])
        typer.echo(f"mean score, with partial credit: {scores}")
    best = "{accuracy:.3f} ({reply!r})" if figures["best_constant"] else "not measured, since scoring executes programs"
    lines = ["best constant answer: " + best.format(**figures["best_constant"])]
    lines += [f"note: {line}" for line in figures["notes"]]
    typer.echo("\n".join(lines + ([f"items and summary: {out}"] if out is not None else [])))


app.command(
    "eval", cls=generated_command(evaluate, shared.data_config), help=evaluate.__doc__,
    epilog="Example: sigmix eval --task dates --expert dates --n 300",
)(lambda: None)  # fmt: skip


def _known(letters: list[str], names: Collection[str]) -> None:
    for letter in letters:
        if letter not in names:
            raise UnknownNameError("strategy", letter, names)


def _title(figures: dict[str, Any]) -> str:
    return f"{figures['task']}, {figures['split']} split, seed {figures['seed']}, base {figures['base']}"


def _strategies(
    task: Task, letters: list[str], shots: int, n: int, split: str, seed: int, max_new_tokens: int | None, batch: int,
    out: Path | None, base: str, bank: Path | None, as_json: bool, engine: str,
) -> None:  # fmt: skip
    """Measure accuracy of strategies on a task, on the same items as the base model."""
    from sigmix.adapt import FewShotSearch
    from sigmix.adapt.base import skills
    from sigmix.adapt.two_pass import LETTERS, open_strategy
    from sigmix.cli.adapt import task_examples
    from sigmix.evals.accuracy import save
    from sigmix.evals.strategies import EACH, NAMES, ORACLE, run_strategies

    _known(letters, NAMES)
    task.score(task.samples(split, 1, seed=seed)[0], "")  # type: ignore[arg-type]
    if out is not None:
        check_output(out, "summary.json")
    opened = open_inference_engine(engine, base, open_bank(bank))
    chosen: dict[str, Any] = {letter: open_strategy(opened, letter) for letter in letters if letter in LETTERS}
    if "C" in letters:
        examples, score, limit = task_examples(task, shots, seed)
        search = FewShotSearch(opened, examples, score, max_new_tokens=limit, seed=seed, settings="light")
        with working("searching a mixture"):
            search.fit()
        chosen["C"] = search
    chosen = {letter: chosen[letter] for letter in dict.fromkeys(letters) if letter in chosen}  # in the given order
    alone = bool({EACH, ORACLE} & set(letters))
    runs = 1 + len(chosen) + (len(skills(opened.bank)) if alone else 0)
    with Progress("base", n * runs) as progress:
        figures, results = run_strategies(
            opened, task, chosen, each_expert=alone, split=split, n=n, seed=seed,  # type: ignore[arg-type]
            max_new_tokens=max_new_tokens, batch_size=batch, progress=progress.advance,
        )  # fmt: skip
    if "C" in chosen:
        figures["few_shot"] = {**search.evidence(), "mix": search.result.id}  # type: ignore[union-attr]
    if out is not None:
        save(out, {**figures, "results": [{**one, "mix": one["strategy"]} for one in figures["results"]]}, results)
    if emit(figures, as_json):
        return
    rows = [
        [one["strategy"], one["n"], accuracy(one), *paired(one["paired"]),
         ", ".join(f"{mix} {count}" for mix, count in list(one["chosen"].items())[:3])]
        for one in figures["results"]
    ]  # fmt: skip
    columns = ["strategy", "n", "accuracy [95 %]", "difference [95 %]", "won/lost", "McNemar p", "mixtures chosen"]
    table(_title(figures), columns, rows)
    if figures["best_constant"]:
        note(f"best constant answer: {figures['best_constant']['accuracy']:.3f}")


def _dispatch(
    letters: list[str], file: Path | None, n: int, seed: int, split: str, out: Path | None, base: str,
    bank: Path | None, data_dir: Path | None, as_json: bool, engine: str,
) -> None:  # fmt: skip
    """Measure confusion matrices of strategies over the bank's labels, and over requests of unseen domains."""
    from sigmix.adapt.base import labels
    from sigmix.adapt.two_pass import LETTERS, open_strategy
    from sigmix.evals.accuracy import provenance
    from sigmix.evals.dispatch import confusion, plot, read_requests, requests, unseen_tasks, without_data
    from sigmix.utils.io import write_json, write_text

    _known(letters, LETTERS)
    if out is not None:
        check_output(out, "dispatch.json")
    experts = open_bank(bank)
    every = labels(experts)
    names = [label.name for label in every]
    left_out: list[str] = []
    if file is None:
        unseen = unseen_tasks(experts)
        missing = without_data(experts) if data_dir is None else {}
        if len(missing) + 1 == len(every):  # "other" alone measures nothing: the error of the first task is raised
            missing = {}
        samples = requests(
            experts, split, n, seed=seed, unseen=unseen, data_dir=data_dir, without=missing,  # type: ignore[arg-type]
        )  # fmt: skip
        left_out = [label.name for label in every if missing.keys() & label.mix.weights]
        if left_out:
            note(f"left out of the test, since their data is not there: {', '.join(left_out)} -> --data-dir DIR")
    else:
        samples, split = read_requests(file, names), file.name
    opened = open_inference_engine(engine, base, experts)
    figures: dict[str, Any] = {"split": split, "seed": seed, "base": base, "left_out": left_out, "strategies": []}
    for letter in letters:
        strategy: Any = open_strategy(opened, letter)
        with working(f"deciding with {strategy.name}"):
            one = confusion(strategy, samples, names)
        items = one.pop("items")
        figures["strategies"].append(one)
        if out is not None:
            lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
            write_text(out / f"dispatch-{letter}.jsonl", lines)
            plot(one, out / f"dispatch-{letter}.png")
    if out is not None:
        write_json(out / "dispatch.json", {**figures, **provenance()})
    if emit(figures, as_json):
        return
    for one in figures["strategies"]:
        rows = [[row["label"], row["n"], accuracy(row), *row["counts"]] for row in one["rows"]]
        title = f"{one['strategy']}: {accuracy(one)} of {one['n']}, {split}"
        table(title, ["request", "n", "accuracy [95 %]", *one["labels"]], rows)
    if out is not None:
        note(f"matrices, items and summary: {out}")


@app.command(epilog="Example: sigmix tasks dates --validate")
def tasks(
    name: str = typer.Argument(None, help="Task to show: notes, license and two samples. Default: list all."),
    families: bool = typer.Option(False, "--all", help="List the rg: tasks too."),
    validate: bool = typer.Option(False, "--validate", help="Check the grader and the splits of NAME."),
    data_dir: Path = shared.DATA_DIR, allow_code: bool = shared.ALLOW_CODE, as_json: bool = shared.JSON,
) -> None:  # fmt: skip
    """List the tasks, or show and check one."""
    from sigmix.tasks.registry import get_task, task_names

    if name is None:
        if validate:
            raise ConfigError("--validate needs a task's name", remedy="for example: sigmix tasks dates --validate")
        rows = []
        for one in task_names(families):
            try:
                task = get_task(one, data_dir=data_dir, allow_code=allow_code)
                rows.append({"name": one, "domain": task.domain, "description": task.description})
            except SigmixError as error:  # a broken plug-in does not hide the other tasks
                rows.append({"name": one, "domain": None, "description": f"unusable: {error}"})
        if emit({"tasks": rows}, as_json):
            return
        table("tasks", ["name", "domain", "description"], [list(row.values()) for row in rows])
        if not families:
            typer.echo("--all lists the rg: tasks too; options follow a question mark: addition?digits=3")
        return
    task = get_task(name, data_dir=data_dir, allow_code=allow_code)
    figures: dict[str, Any] = {
        "name": task.name, "domain": task.domain, "description": task.description, "license": task.license,
        "splits": list(task.splits()), "max_new_tokens": task.max_new_tokens, "runs_programs": task.costly,
        "samples": [], "notes": list(task.notes),
    }  # fmt: skip
    try:
        with working("reading the data"):
            samples = task.samples(task.splits()[0], 2)
        figures["samples"] = [{"prompt": one.prompt, "gold": one.gold, "system": one.system} for one in samples]
    except SigmixError as error:
        if data_dir is not None or validate:
            raise
        figures["problem"] = str(error)
    report = task.validate() if validate else None
    if report is not None:
        figures["validation"] = {"ok": report.ok, "counts": report.counts, "problems": report.problems}
    emit(figures, as_json, _describe(figures))
    if report is not None and not report.ok:
        raise TaskError(f"task {task.name}: {len(report.problems)} problems, such as: {report.problems[0]}")


def _describe(figures: dict[str, Any]) -> str:
    lines = [f"{figures['name']}: {figures['description']}"]
    lines += [f"{key}: {figures[key]}" for key in ("domain", "license", "max_new_tokens", "runs_programs")]
    lines.append(f"splits: {', '.join(figures['splits'])}")
    lines += [f"note: {line}" for line in figures["notes"]]
    for sample in figures["samples"]:
        lines += ["", f"prompt: {sample['prompt']}", f"gold: {sample['gold']}"]
    if "problem" in figures:
        lines.append(f"no samples: {figures['problem']}")
    if "validation" in figures:
        report = figures["validation"]
        lines += ["", f"validation: {'passed' if report['ok'] else 'FAILED'}"]
        lines += [f"  {key}: {value}" for key, value in report["counts"].items()]
        lines += [f"  problem: {problem}" for problem in report["problems"][:10]]
    return "\n".join(lines)
