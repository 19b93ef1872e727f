"""The bundled bank on wordings that nobody trained on: its experts, the router, and both together.

    python -m reproduction.bank --data-dir DATA --out OUT       # resumable: what OUT holds is not measured again

DATA has clinc150 and snips for the experts `topics` and `commands`. Three sets of requests a skill: training wordings,
unseen templates (the test split), and forty written by hand (``handwritten``). OUT gets the items of every cell,
``bank.md``, ``routed.jsonl``, ``router.json`` and ``router.png``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sigmix.adapt.base import OTHER, Label, labels
from sigmix.adapt.router import RouterDispatch
from sigmix.engine import Engine
from sigmix.errors import ConfigError
from sigmix.evals.accuracy import (
    Item,
    Result,
    answer_samples,
    compare,
    constant_baseline,
    encode_samples,
    provenance,
    training_task,
)
from sigmix.evals.dispatch import confusion, plot
from sigmix.experts.bank import Bank
from sigmix.experts.mix import Mix
from sigmix.models.default import DEFAULT
from sigmix.models.loading import load_base
from sigmix.tasks.base import Sample, Task
from sigmix.utils.io import read_json_object, read_text, write_json, write_text

HANDWRITTEN = Path(__file__).parent / "handwritten"
FILES = {
    "sums": "sums", "compare-numbers": "comparison", "dates": "dates", "times": "times", "durations": "durations",
    "number-words": "numbers-in-words", "units": "units", "payments": "extraction", "yes-no": "passages",
    "topics": "topics", "commands": "commands",
}  # fmt: skip
"""File of handwritten requests by expert."""

SETS = ("training wordings", "unseen templates", "handwritten")

TOGETHER = 100
"""Requests of a skill and set in the table of all skills together."""


def rows_of(name: str) -> list[dict[str, str]]:
    """Return the rows of a file of handwritten requests."""
    return [json.loads(line) for line in read_text(HANDWRITTEN / f"{name}.jsonl").splitlines()]


def claim(out: Path, engine: Engine, n: int) -> None:
    """Write what is measured to ``bank.json``: base, experts and n.

    Raises:
        ConfigError: the folder has cells of something else.
    """
    experts = {
        name: [one.digest, hashlib.sha256(one.requests.to_bytes()).hexdigest() if one.requests else None]
        for name, one in engine.bank.items()
    }
    path, facts = out / "bank.json", {"base": engine.base_fingerprint, "n": n, "experts": experts}
    if path.exists() and read_json_object(path) != facts:
        raise ConfigError(f"{out} has cells of another base, bank or --n", remedy="give another --out")
    write_json(path, facts)


class Study:
    """Cells of the study. A cell is a list of items under one mixture or strategy, kept in a file.

    Args:
        n: requests of a skill, but for the handwritten ones.
    """

    def __init__(self, engine: Engine, tasks: Mapping[str, Task], out: Path, n: int) -> None:
        self.engine, self.tasks, self.out, self.n = engine, tasks, out, n
        self.samples = {(name, one): self._samples(name, one) for name in tasks for one in SETS}

    def _samples(self, name: str, which: str) -> list[Sample]:
        task = self.tasks[name]
        task.prepare(self.engine.tokenizer, self.engine.encode, self.engine.context_length)
        if which == "handwritten":
            return [Sample.make(row["prompt"], row["completion"]) for row in rows_of(FILES[name])]
        return task.samples("train" if which == SETS[0] else "test", self.n, seed=1)

    def cell(self, name: str, which: str, who: str, choice: Mix | RouterDispatch, count: int | None = None) -> Result:
        """Return the items of a skill's requests under a mixture, or under the mixtures that a strategy chooses.

        Args:
            count: only the first requests.
        """
        path = self.out / "cells" / f"{name}.{which.replace(' ', '-')}.{who}.jsonl"
        task, samples = self.tasks[name], self.samples[name, which][:count]
        if not path.exists():
            rows = encode_samples(self.engine, samples)
            result, _, _ = answer_samples(
                self.engine, task, samples, choice, rows=rows, max_new_tokens=task.max_new_tokens
            )
            result.save(path)
            print(f"{name}, {which}, {who}: {percent(result)}", flush=True)
        return Result(task.name, [Item(**json.loads(line)) for line in read_text(path).splitlines()])


def percent(result: Result) -> str:
    """Return accuracy and interval in per cent."""
    low, high = result.summary()["interval"]
    return f"{100 * result.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def experts_table(study: Study) -> list[str]:
    """Return a table of base, expert and best constant reply on each set."""
    lines = ["| expert | requests | n | base | expert | difference | best constant |", "|---|---|---|---|---|---|---|"]
    for name in study.tasks:
        for which in SETS:
            base, own = study.cell(name, which, "base", Mix.base()), study.cell(name, which, "expert", Mix.one(name))
            paired = compare(own, base)
            low, high = (100 * bound for bound in paired["interval"])
            constant = constant_baseline(study.tasks[name], study.samples[name, which])["accuracy"]
            lines.append(
                f"| {name} | {which} | {len(own.items)} | {percent(base)} | {percent(own)} | "
                f"{100 * paired['difference']:+.1f} [{low:+.1f}, {high:+.1f}] | {100 * constant:.1f} |"
            )
    return lines


def end_to_end_table(study: Study, named: Mapping[str, Label], router: RouterDispatch) -> list[str]:
    """Return a table of all skills' requests together under the router and under fixed mixtures."""
    even = Mix({name: 1 / len(study.tasks) for name in study.tasks})
    soft = RouterDispatch(study.engine, soft=True)
    lines = ["| requests | n | base | right expert | `auto` | `auto`, soft | all mixed evenly |", "|" + "---|" * 7]
    for which in SETS[1:]:
        columns = []
        for who in ("base", "expert", "auto", "soft", "even"):
            parts = []
            for name in study.tasks:
                choice = {"base": Mix.base(), "expert": named[name].mix, "auto": router, "soft": soft, "even": even}[
                    who
                ]
                count = None if who in ("base", "expert") else TOGETHER  # those cells are the table's above
                parts += study.cell(name, which, who, choice, count).items[:TOGETHER]
            columns.append(Result("all", parts))
        lines.append(f"| {which} | {len(columns[0].items)} | {' | '.join(map(percent, columns))} |")
    return lines


def routing(study: Study, named: Mapping[str, Label], router: RouterDispatch) -> dict[str, Any]:
    """Return `confusion` of the router: unseen templates, then handwritten and foreign requests."""
    names = [label.name for label in labels(study.engine.bank)]
    found = {}
    for which in SETS[1:]:
        requests: dict[str, Sequence[str]] = {
            named[name].name: [sample.prompt for sample in study.samples[name, which]] for name in study.tasks
        }
        if which == "handwritten":
            requests[OTHER] = [row["prompt"] for row in rows_of("foreign")]
        found[which] = confusion(router, requests, names)
    return found


def main() -> None:
    """Measure a bank, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bank", type=Path, help="folder of experts; default: the bundled bank")
    parser.add_argument("--base", default=DEFAULT)
    parser.add_argument("--n", type=int, default=300, help="requests of a skill")
    given = parser.parse_args()
    experts = Bank.bundled() if given.bank is None else Bank(given.bank)
    engine = Engine(*load_base(given.base), experts)
    every = labels(engine.bank)[:-1]
    named = {name: label for label in every for name in label.mix.weights}
    tasks = {name: training_task(experts[name], given.data_dir) for name in FILES if name in named}
    claim(given.out, engine, given.n)
    study, router = Study(engine, tasks, given.out, given.n), RouterDispatch(engine)
    figures = routing(study, named, router)
    items = [json.dumps({"requests": which, **item}) for which in figures for item in figures[which].pop("items")]
    write_text(given.out / "routed.jsonl", "\n".join(items) + "\n")
    write_json(given.out / "router.json", {**figures, **provenance()})
    plot(figures["handwritten"], given.out / "router.png")
    sections = {"Experts": experts_table(study), "End to end": end_to_end_table(study, named, router)}
    lines = [f"# The bank on {given.base}", ""]
    for which, one in figures.items():
        low, high = (100 * bound for bound in one["interval"])
        lines.append(f"Router, {which}: {100 * one['accuracy']:.1f} [{low:.1f}, {high:.1f}] of {one['n']} right.")
    for title, table in sections.items():
        lines += ["", f"## {title}", "", *table]
    write_text(given.out / "bank.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
