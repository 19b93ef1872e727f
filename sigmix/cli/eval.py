"""`sigmix eval` and `sigmix tasks`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from sigmix.cli._console import Ticker, accuracy, check_output, emit, note, paired, table, working
from sigmix.cli._loading import LETTERS, open_bank, open_engine, open_mixes, open_strategy
from sigmix.cli._options import BANK, BASE, BASIS, DEVICE_MAP, JSON, QUANTIZATION

DATA = typer.Option(None, help="Local JSONL data instead of the hub.")


CODE = typer.Option(False, "--allow-code", help="Let code tasks run the model's programs.")


MIX = typer.Option([], help="a:0.7+b:0.3, or a .json file; may be repeated.")


EXPERT = typer.Option([], help="An expert alone; may be repeated.")


OUT = typer.Option(None, help="Folder for items (JSONL, one file a mix) and summary.json.")


def add(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("eval", epilog="Example: sigmix eval --task addition --expert addition --n 300")(evaluate)
    app.command(epilog="Example: sigmix tasks addition --validate")(tasks)


STRATEGIES = typer.Option([], help="base, A, B, C, D, each-expert or oracle; may be repeated. Not with --mix.")


def evaluate(
    task: str = typer.Option(None, help="A task's name (sigmix tasks lists them), rg:NAME, or file.py:NAME."),
    mix: list[str] = MIX,
    expert: list[str] = EXPERT,
    strategy: list[str] = STRATEGIES,
    dispatch: bool = typer.Option(False, "--dispatch", help="How often strategies choose the right expert. No --task."),
    shots: int = typer.Option(10, min=1, help="Training items that strategy C searches on."),
    n: int = typer.Option(300, min=1, help="Items; with --dispatch, for each label."),
    split: str = typer.Option("test", help="test, validation or train."),
    seed: int = typer.Option(0, help="Of the drawing of items, sampling and the bootstrap."),
    temperature: float = typer.Option(0.0, min=0.0, help="0 is greedy."),
    max_new_tokens: int = typer.Option(None, min=1, help="Longest answer. Default: the task's."),
    batch: int = typer.Option(64, min=1, help="Items answered at once."),
    out: Path = OUT,
    data_dir: Path = DATA,
    allow_code: bool = CODE,
    base: str = BASE,
    quantization: str = QUANTIZATION,
    basis: str = BASIS,
    device_map: str = DEVICE_MAP,
    bank: Path = BANK,
    as_json: bool = JSON,
) -> None:
    """Accuracy of the base, of mixes or of strategies on the same items, with 95 % intervals and paired tests."""
    from sigmix.cli import eval as adapted
    from sigmix.errors import ConfigError
    from sigmix.tasks.registry import get_task

    if dispatch == (task is not None):
        raise ConfigError("give --task, or --dispatch", remedy="sigmix tasks lists the tasks")
    if (dispatch or strategy) and (mix or expert):
        raise ConfigError("--mix and --expert do not go with --strategy or --dispatch")
    for option, given in (("--quantization", quantization), ("--device-map", device_map)):
        if (dispatch or strategy) and given is not None:
            raise ConfigError(f"{option} goes with --mix and --expert, not with --strategy or --dispatch")
    if dispatch:
        adapted.dispatch(strategy or ["A", "D"], n, seed, split, out, base, bank, data_dir, as_json)
        return
    if strategy:
        made = get_task(task, data_dir=data_dir, allow_code=allow_code)
        adapted.strategies(made, strategy, shots, n, split, seed, batch, out, base, bank, as_json)
        return
    mixes, experts = open_mixes([*expert, *mix], bank)
    made = get_task(task, data_dir=data_dir, allow_code=allow_code)
    first = made.samples(split, n, seed=seed)  # type: ignore[arg-type]
    made.score(first[0], "")  # what a task refuses, such as running programs, it refuses before the work
    if out is not None:
        check_output(out, "summary.json")
    engine = open_engine(base, experts, mixes, quantization, basis, device_map)

    from sigmix.evals.accuracy import run, save

    with Ticker("base", len(first) * len({"base", *(one.id for one in mixes)})) as ticker:
        figures, results = run(
            engine, made, mixes, split=split, n=n, seed=seed, do_sample=temperature > 0,  # type: ignore[arg-type]
            temperature=temperature, max_new_tokens=max_new_tokens, batch_size=batch, progress=ticker.advance,
        )  # fmt: skip
    if out is not None:
        save(out, figures, results)
    if as_json:
        emit(figures, True, "")
        return
    _show(figures)
    if out is not None:
        typer.echo(f"items and summary: {out}")


def _show(figures: dict[str, Any]) -> None:
    rows = []
    for one in figures["results"]:
        rows.append(
            [
                one["mix"], one["n"], accuracy(one), *paired(one["paired"]), f"{one['answer_entropy']:.2f}",
                one["unscorable"], one["no_answer"], one["truncated"],
            ]
        )  # fmt: skip
    columns = ["mix", "n", "accuracy [95 %]", "difference [95 %]", "won/lost", "McNemar p"]
    title = f"{figures['task']}, {figures['split']} split, seed {figures['seed']}, base {figures['base']}"
    table(title, [*columns, "entropy", "unscorable", "no answer", "cut off"], rows)
    if any(abs(one["mean_score"] - one["accuracy"]) > 1e-9 for one in figures["results"]):
        scores = ", ".join(f"{one['mix']} {one['mean_score']:.3f}" for one in figures["results"])
        typer.echo(f"mean score, where a reply may be right in part: {scores}")
    constant = figures["best_constant"]
    if constant:
        typer.echo(f"best constant answer: {constant['accuracy']:.3f} ({constant['reply']!r} every time)")
    else:
        typer.echo("best constant answer: not tried, scoring runs programs")
    for line in figures["notes"]:
        typer.echo(f"note: {line}")


def tasks(
    name: str = typer.Argument(None, help="Show this one: its notes, license and two samples."),
    families: bool = typer.Option(False, "--all", help="List the rg: tasks too."),
    validate: bool = typer.Option(False, "--validate", help="Check the verifier and the splits of NAME."),
    data_dir: Path = DATA,
    allow_code: bool = CODE,
    as_json: bool = JSON,
) -> None:
    """List the tasks, or show and check one."""
    from sigmix.errors import ConfigError, SigmixError, TaskError
    from sigmix.tasks.registry import get_task, task_names

    if name is None:
        if validate:
            raise ConfigError("--validate needs a task's name", remedy="for example: sigmix tasks addition --validate")
        rows = []
        for one in task_names(families):
            try:
                made = get_task(one, data_dir=data_dir, allow_code=allow_code)
                rows.append({"name": one, "domain": made.domain, "description": made.description})
            except SigmixError as error:  # one plug-in that does not load hides no others
                rows.append({"name": one, "domain": None, "description": f"cannot be used: {error}"})
        if as_json:
            emit({"tasks": rows}, True, "")
            return
        table("tasks", ["name", "domain", "description"], [list(row.values()) for row in rows])
        if not families:
            typer.echo("--all lists the rg: tasks too; options go behind a question mark: addition?digits=3")
        return
    made = get_task(name, data_dir=data_dir, allow_code=allow_code)
    figures: dict[str, Any] = {
        "name": made.name, "domain": made.domain, "description": made.description, "license": made.license,
        "splits": list(made.splits()), "max_new_tokens": made.max_new_tokens, "runs_programs": made.costly,
    }  # fmt: skip
    try:
        with working("reading the data"):
            samples = made.samples(made.splits()[0], 2)
        figures["samples"] = [{"prompt": one.prompt, "gold": one.gold, "system": one.system} for one in samples]
    except SigmixError as error:
        if data_dir is not None or validate:
            raise
        figures |= {"samples": [], "problem": str(error)}
    figures["notes"] = list(made.notes)
    report = made.validate() if validate else None
    if report is not None:
        figures["validation"] = {"ok": report.ok, "counts": report.counts, "problems": report.problems}
    emit(figures, as_json, _described(figures))
    if report is not None and not report.ok:
        raise TaskError(f"task {made.name}: {len(report.problems)} problems, such as: {report.problems[0]}")


def _described(figures: dict[str, Any]) -> str:
    lines = [f"{figures['name']}: {figures['description']}"]
    lines += [f"{key}: {figures[key]}" for key in ("domain", "license", "max_new_tokens", "runs_programs")]
    lines.append(f"splits: {', '.join(figures['splits'])}")
    lines += [f"note: {note}" for note in figures["notes"]]
    for sample in figures["samples"]:
        lines += ["", f"prompt: {sample['prompt']}", f"gold: {sample['gold']}"]
    if figures.get("problem"):
        lines.append(f"samples cannot be had: {figures['problem']}")
    if "validation" in figures:
        found = figures["validation"]
        lines += ["", f"validation: {'sound' if found['ok'] else 'NOT SOUND'}"]
        lines += [f"  {key}: {value}" for key, value in found["counts"].items()]
        lines += [f"  problem: {problem}" for problem in found["problems"][:10]]
    return "\n".join(lines)


# --- `sigmix eval --strategy …` and `sigmix eval --dispatch`: what adaptation is worth, and how often it chooses right.


def strategies(
    task: Any, letters: list[str], shots: int, n: int, split: str, seed: int, batch: int, out: Path | None, base: str,
    bank: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Accuracy of strategies on a task, on the same items as the base."""
    from sigmix.adapt import Example, FewShotSearch
    from sigmix.adapt.base import skills
    from sigmix.errors import UnknownNameError
    from sigmix.evals.accuracy import save
    from sigmix.evals.strategies import EACH, NAMES, ORACLE, run_strategies

    for letter in letters:
        if letter not in NAMES:
            raise UnknownNameError("strategy", letter, NAMES)
    task.score(task.samples(split, 1, seed=seed)[0], "")
    if out is not None:
        check_output(out, "summary.json")
    engine = open_engine(base, open_bank(bank))
    chosen = {}
    for letter in letters:
        if letter in LETTERS:
            chosen[letter] = open_strategy(engine, letter)
        elif letter == "C":
            given = [Example(one.prompt, one.gold, one, one.images) for one in task.samples("train", shots, seed=seed)]
            search = FewShotSearch(
                engine, given, lambda example, reply: task.score(example.extra, reply).value or 0.0,
                max_new_tokens=task.max_new_tokens, seed=seed, settings="light",
            )  # fmt: skip
            with working("searching a mixture"):
                search.fit()
            chosen[letter] = search
    alone = bool({EACH, ORACLE} & set(letters))
    runs = 1 + len(chosen) + (len(skills(engine.bank)) if alone else 0)
    with Ticker("base", n * runs) as ticker:
        figures, results = run_strategies(
            engine, task, chosen, each_expert=alone, split=split, n=n, seed=seed,  # type: ignore[arg-type]
            batch_size=batch, progress=lambda count, name: ticker.advance(count, name),
        )  # fmt: skip
    if "C" in chosen:
        figures["few_shot"] = {**chosen["C"].evidence(), "mix": chosen["C"].result.id}
    if out is not None:
        save(out, {**figures, "results": [{**one, "mix": one["strategy"]} for one in figures["results"]]}, results)
    if as_json:
        emit(figures, True, "")
        return
    rows = [
        [one["strategy"], one["n"], accuracy(one), *paired(one["paired"]),
         ", ".join(f"{mix} {count}" for mix, count in list(one["chosen"].items())[:3])]
        for one in figures["results"]
    ]  # fmt: skip
    columns = ["strategy", "n", "accuracy [95 %]", "difference [95 %]", "won/lost", "McNemar p", "mixes chosen"]
    table(f"{task.name}, {split} split, seed {seed}, base {figures['base']}", columns, rows)
    if figures["best_constant"]:
        note(f"best constant answer: {figures['best_constant']['accuracy']:.3f}")


def dispatch(
    letters: list[str], n: int, seed: int, split: str, out: Path | None, base: str, bank: Path | None,
    data_dir: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Confusion matrices of strategies over the bank's labels, and over domains that nobody trained for."""
    from sigmix.errors import UnknownNameError
    from sigmix.evals.accuracy import provenance
    from sigmix.evals.dispatch import confusion, plot, requests, unseen_tasks
    from sigmix.utils.io import write_json, write_text

    for letter in letters:
        if letter not in LETTERS:
            raise UnknownNameError("strategy for --dispatch", letter, LETTERS)
    if out is not None:
        check_output(out, "dispatch.json")
    experts = open_bank(bank)
    found = requests(experts, split, n, seed=seed, unseen=unseen_tasks(experts), data_dir=data_dir)  # type: ignore[arg-type]
    engine = open_engine(base, experts)
    figures: dict[str, Any] = {"split": split, "seed": seed, "base": base, "strategies": []}
    for letter in letters:
        strategy = open_strategy(engine, letter)
        with working(f"deciding with {strategy.name}"):
            one = confusion(strategy, found, [label.name for label in strategy.labels])
        items = one.pop("items")
        figures["strategies"].append(one)
        if out is not None:
            import json

            lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
            write_text(out / f"dispatch-{letter}.jsonl", lines)
            plot(one, out / f"dispatch-{letter}.png")
    if out is not None:
        write_json(out / "dispatch.json", {**figures, **provenance()})
    if as_json:
        emit(figures, True, "")
        return
    for one in figures["strategies"]:
        rows = [[row["label"], row["n"], accuracy(row), *row["counts"]] for row in one["rows"]]
        title = f"{one['strategy']}: {accuracy(one)} of {one['n']}, {split} split"
        table(title, ["request is", "n", "right [95 %]", *one["labels"]], rows)
    if out is not None:
        note(f"matrices, items and summary: {out}")
