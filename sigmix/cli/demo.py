"""`sigmix demo`: what the experts change, measured in front of you. Nothing is trained."""

from __future__ import annotations

import functools
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import typer

from sigmix.cli._console import Ticker, accuracy, emit, note, table
from sigmix.cli._loading import open_bank, open_engine
from sigmix.cli._options import BANK, BASE, JSON

LONGEST = 64  # tokens; a task that reasons at length would take the demo's four minutes alone


SHOWN = 2


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: sigmix demo --quick")(demo)


def demo(
    n: int = typer.Option(100, min=SHOWN, help="Held-out items for each expert."),
    quick: bool = typer.Option(False, "--quick", help="25 items for each expert."),
    seed: int = typer.Option(0, help="Of the drawing of items."),
    base: str = BASE,
    bank: Path = BANK,
    as_json: bool = JSON,
) -> None:
    """The base beside each of its experts on questions that neither was trained on."""
    from sigmix.errors import ExpertError, SigmixError

    started = time.monotonic()
    experts = open_bank(bank)
    if not len(experts):
        raise ExpertError(f"{experts.folder} has no experts", remedy="train one: sigmix train --help")
    tasks, skipped = _tasks(experts)
    note(f"loading {base} (downloaded on the first run)")
    engine = open_engine(base, experts)

    from sigmix.evals.accuracy import compare, constant_baseline, run
    from sigmix.experts.mix import Mix

    wanted = 25 if quick else n
    rows: list[dict[str, Any]] = []
    with Ticker("evaluating", 2 * wanted * len(tasks)) as ticker:
        for name, task in tasks.items():
            if not sys.stderr.isatty():
                note(f"{name}: {wanted} test items of {task.name}, base and expert")
            try:
                figures, results = run(
                    engine, task, [Mix.one(name)], n=wanted, seed=seed,
                    progress=functools.partial(_tick, ticker, name),
                )  # fmt: skip
            except SigmixError as error:  # one expert that does not fit hides no others
                skipped[name] = str(error)
                continue
            before, after = (results[one["mix"]] for one in figures["results"])
            row = {
                "expert": name,
                "domain": experts[name].meta.get("domain") or task.domain,
                "task": task.name,
                "n": figures["n"],
                "base": before.summary(),
                "tuned": after.summary(),
                "best_constant": constant_baseline(task, task.samples("test", wanted, seed=seed)),
                "paired": compare(after, before, seed),
                "no_answer": [one["no_answer"] for one in figures["results"]],
                "examples": [
                    {"prompt": b.prompt, "gold": b.gold, "base": b.reply, "base_right": b.score == 1.0,
                     "expert": a.reply, "expert_right": a.score == 1.0}
                    for b, a in zip(before.items[:SHOWN], after.items[:SHOWN], strict=True)
                ],
            }  # fmt: skip
            rows.append(row)
            if not as_json:
                _examples(row)
    figures = {
        "base": base, "seed": seed, "experts": rows, "skipped": skipped,
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
    if as_json:
        emit(figures, True, "")
        return
    _table(figures)


def _tick(ticker: Ticker, name: str, count: int, mix: str) -> None:
    ticker.advance(count, f"{name} ({mix})")


def _tasks(bank: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The experts' tasks that can be measured here, and for the others why not."""
    from sigmix.adapt.base import DISPATCH
    from sigmix.errors import SigmixError
    from sigmix.tasks.registry import get_task

    found, skipped = {}, {}
    for name in bank.names():
        try:
            if bank[name].meta.get("domain") == DISPATCH:  # it chooses experts and answers nothing
                continue
            spec = bank[name].meta.get("task")
            if not isinstance(spec, str):
                skipped[name] = "it names no task"
                continue
            task = get_task(spec)
            if task.costly or task.max_new_tokens > LONGEST:
                skipped[name] = f"{spec} takes too long for a demo: sigmix eval --task '{spec}' --expert {name}"
                continue
            task.samples("test", 1)
            found[name] = task
        except SigmixError as error:
            skipped[name] = str(error)
        except Exception as error:  # a task of the user's own may fail in any way
            skipped[name] = f"{type(error).__name__}: {error}"
    return found, skipped


def _examples(row: dict[str, Any]) -> None:
    cells = []
    for one in row["examples"]:
        marks = ["right" if one[f"{who}_right"] else "wrong" for who in ("base", "expert")]
        cells.append([one["prompt"], f"{one['base'].strip()}\n({marks[0]})", f"{one['expert'].strip()}\n({marks[1]})"])
    title = f"{row['expert']}: the first {len(cells)} test questions"
    table(title, ["question", "base", row["expert"]], cells)


def _table(figures: dict[str, Any]) -> None:
    rows = []
    for row in figures["experts"]:
        constant = row["best_constant"].get("accuracy")
        rows.append(
            [
                row["expert"], row["domain"], row["n"], accuracy(row["base"]), accuracy(row["tuned"]),
                "-" if constant is None else f"{constant:.3f}", f"{row['paired']['p']:.1g}",
                "{} -> {}".format(*row["no_answer"]),
            ]
        )  # fmt: skip
    columns = ["expert", "domain", "n", "base [95 %]", "expert [95 %]", "best constant", "McNemar p", "no answer"]
    if rows:
        table("accuracy on held-out test items", columns, rows)
        typer.echo("no answer: replies, of the base -> of the expert, without an answer in the form that was asked for")
    for name, why in figures["skipped"].items():
        typer.echo(f"not shown: {name}: {why}")
    typer.echo(f"{figures['seconds']:.0f} s, nothing was trained. Try next:")
    best = max(figures["experts"], key=lambda row: row["paired"]["difference"], default=None)
    if best is None:
        typer.echo("  sigmix experts list\n  sigmix doctor\n  sigmix chat")
        return
    question = " ".join(best["examples"][0]["prompt"].split())
    typer.echo(f"  sigmix generate {shlex.quote(question)} --mix {best['expert']}")
    typer.echo("  sigmix chat --single-turn")
    typer.echo(f"  sigmix eval --task {shlex.quote(best['task'])} --expert {best['expert']} --n 300")
