"""`sigmix demo`: accuracy of the base model and of each expert on held-out items. Nothing is trained."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sigmix.cli import app
from sigmix.cli._console import Progress, accuracy, emit, note, table
from sigmix.cli._loading import open_bank, open_engine
from sigmix.cli._options import BANK, BASE, JSON
from sigmix.errors import ExpertError, SigmixError

if TYPE_CHECKING:
    from sigmix.experts.bank import Bank
    from sigmix.tasks.base import Task

MAX_NEW_TOKENS = 64  # tasks with longer answers are skipped: one would take several minutes
EXAMPLES = 2


@app.command(epilog="Example: sigmix demo --quick")
def demo(
    n: int = typer.Option(100, min=EXAMPLES, help="Held-out items per expert."),
    quick: bool = typer.Option(False, "--quick", help="25 items per expert."),
    seed: int = typer.Option(0, help="Random seed of the items."),
    base: str = BASE, bank: Path = BANK, as_json: bool = JSON,
) -> None:  # fmt: skip
    """Compare the base model with each of its experts on questions that neither was trained on."""
    started = time.monotonic()
    experts = open_bank(bank)
    if not len(experts):
        raise ExpertError(f"{experts.folder} has no experts", remedy="train one: sigmix train --help")
    tasks, skipped = _tasks(experts)
    note(f"loading {base} (downloaded on the first run)")
    engine = open_engine(base, experts)

    from sigmix.evals.accuracy import run
    from sigmix.experts.mix import Mix

    n = 25 if quick else n
    rows: list[dict[str, Any]] = []
    with Progress("evaluating", 2 * n * len(tasks)) as progress:
        for name, task in tasks.items():
            if not sys.stderr.isatty():
                note(f"{name}: {n} test items of {task.name}, base model and expert")

            def advance(count: int, mix: str, name: str = name) -> None:
                progress.advance(count, f"{name} ({mix})")

            try:
                figures, results = run(engine, task, [Mix.one(name)], n=n, seed=seed, progress=advance)
            except SigmixError as error:  # an expert that does not fit does not hide the others
                skipped[name] = str(error)
                continue
            untuned, tuned = figures["results"]
            before, after = results[untuned["mix"]], results[name]
            row = {
                "expert": name, "domain": experts[name].meta.get("domain") or task.domain, "task": task.name,
                "n": figures["n"], "base": untuned, "tuned": tuned, "best_constant": figures["best_constant"],
                "paired": tuned["paired"], "no_answer": [untuned["no_answer"], tuned["no_answer"]],
                "examples": [
                    {"prompt": b.prompt, "gold": b.gold, "base": b.reply, "base_right": b.score == 1.0,
                     "expert": a.reply, "expert_right": a.score == 1.0}
                    for b, a in zip(before.items[:EXAMPLES], after.items[:EXAMPLES], strict=True)
                ],
            }  # fmt: skip
            rows.append(row)
            if not as_json:
                _print_examples(row)
    seconds = round(time.monotonic() - started, 1)
    if not emit({"base": base, "seed": seed, "experts": rows, "skipped": skipped, "seconds": seconds}, as_json):
        _print_table(rows, skipped, seconds)


def _tasks(bank: Bank) -> tuple[dict[str, Task], dict[str, str]]:
    """Return the experts' tasks that can be measured quickly, and for the others the reason."""
    from sigmix.adapt.base import DISPATCH
    from sigmix.evals.accuracy import training_task

    tasks: dict[str, Task] = {}
    skipped: dict[str, str] = {}
    for name in bank.names():
        try:
            if bank[name].meta.get("domain") == DISPATCH:  # chooses experts and answers nothing
                continue
            task = training_task(bank[name])
            if task.costly or task.max_new_tokens > MAX_NEW_TOKENS:
                command = f"sigmix eval --task {shlex.quote(task.name)} --expert {name}"
                skipped[name] = f"{task.name} takes too long for a demo: {command}"
                continue
            task.samples("test", 1)
            tasks[name] = task
        except SigmixError as error:
            skipped[name] = str(error)
        except Exception as error:  # of a user's own task
            skipped[name] = f"{type(error).__name__}: {error}"
    return tasks, skipped


def _print_examples(row: Mapping[str, Any]) -> None:
    cells = [
        [one["prompt"], *(f"{one[kind].strip()}\n({'right' if one[f'{kind}_right'] else 'wrong'})"
                          for kind in ("base", "expert"))]
        for one in row["examples"]
    ]  # fmt: skip
    table(f"{row['expert']}: the first {len(cells)} test questions", ["question", "base", row["expert"]], cells)


def _print_table(rows: list[dict[str, Any]], skipped: Mapping[str, str], seconds: float) -> None:
    cells = [
        [row["expert"], row["domain"], row["n"], accuracy(row["base"]), accuracy(row["tuned"]),
         "{accuracy:.3f}".format(**row["best_constant"]) if row["best_constant"] else "-",
         f"{row['paired']['p']:.1g}", "{} -> {}".format(*row["no_answer"])]
        for row in rows
    ]  # fmt: skip
    columns = ["expert", "domain", "n", "base [95 %]", "expert [95 %]", "best constant", "McNemar p", "no answer"]
    if rows:
        table("accuracy on held-out test items", columns, cells)
        typer.echo("no answer: replies (base -> expert) from which no answer in the requested form can be read")
    for name, why in skipped.items():
        typer.echo(f"not shown: {name}: {why}")
    typer.echo(f"{seconds:.0f} s, nothing was trained. Try next:")
    best = max(rows, key=lambda row: row["paired"]["difference"], default=None)
    if best is None:
        typer.echo("  sigmix experts list\n  sigmix doctor\n  sigmix chat")
        return
    question = " ".join(best["examples"][0]["prompt"].split())
    typer.echo(f"  sigmix generate {shlex.quote(question)} --mix {best['expert']}")
    typer.echo("  sigmix chat --single-turn")
    typer.echo(f"  sigmix eval --task {shlex.quote(best['task'])} --expert {best['expert']} --n 300")
