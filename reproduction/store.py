"""Where a reproduction's results lie: plain files, each written once and whole, so that a run can stop anywhere.

    cells/TASK/WHO.jsonl.gz   a test cell: a line of facts, then one line an item (id, reply, answer, score)
    tasks/TASK.jsonl.gz       the items themselves: a line of facts, then id, prompt and gold
    runs/RUN.json             a training run: configuration, metrics, outcome
    facts/NAME.json           what a stage measured beside accuracies

Tables are computed from these files alone (`reproduction.report`). The compressed files carry no time stamp, so
the same content gives the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sigmix.errors import ConfigError
from sigmix.evals.accuracy import Item, Result
from sigmix.utils.io import atomic_file, write_json

LONGEST = 180
"""Characters of a file's name, without its ending."""


@dataclass(frozen=True)
class Cell:
    """Items of one test cell and the facts about it."""

    result: Result
    facts: Mapping[str, Any]


class Store:
    """The folder of one reproduction.

    Args:
        folder: created when something is written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._runs: dict[str, dict[str, Any]] | None = None

    # ------------------------------------------------------------------ cells

    def has(self, task: str, who: str) -> bool:
        """Whether a cell is there."""
        return self._cell(task, who).exists()

    def write(self, result: Result, who: str, facts: Mapping[str, Any]) -> None:
        """Store a cell."""
        rows = [{"id": one.id, "reply": one.reply, "answer": one.answer, "score": one.score} for one in result.items]
        _write(self._cell(result.task, who), {"task": result.task, "who": who, **facts}, rows)

    def cell(self, task: str, who: str) -> Cell | None:
        """A cell, or None if it was not run.

        Raises:
            ConfigError: its file, or that of the task's items, is damaged or missing.
        """
        path = self._cell(task, who)
        if not path.exists():
            return None
        facts, rows = _read(path)
        texts = self._items(task)
        items = [Item(row["id"], *texts[row["id"]], row["reply"], row["answer"], row["score"], "") for row in rows]
        return Cell(Result(task, items), facts)

    def cells(self, task: str) -> list[str]:
        """Who was measured on a task."""
        return sorted(path.name.removesuffix(".jsonl.gz") for path in self._cell(task, "x").parent.glob("*.jsonl.gz"))

    def write_items(self, task: str, samples: Iterable[Any], facts: Mapping[str, Any]) -> None:
        """Store the items of a task, once."""
        path = self._tasks(task)
        if not path.exists():
            _write(path, {"task": task, **facts}, [{"id": s.id, "prompt": s.prompt, "gold": s.gold} for s in samples])

    def about(self, task: str) -> dict[str, Any]:
        """The facts of a task's items, such as the best constant answer; empty if there are none."""
        path = self._tasks(task)
        return _read(path)[0] if path.exists() else {}

    @cache  # noqa: B019 - a store lives as long as the program
    def _items(self, task: str) -> dict[str, tuple[str, str]]:
        path = self._tasks(task)
        if not path.exists():
            raise ConfigError(f"{path} is missing", remedy="restore it from git, or run the stage again")
        return {row["id"]: (row["prompt"], row["gold"]) for row in _read(path)[1]}

    # ------------------------------------------------------------------ runs and facts

    def write_run(self, name: str, run: Mapping[str, Any]) -> None:
        """Store the record of a training run."""
        write_json(self.folder / "runs" / f"{safe(name)}.json", dict(run))
        self._runs = None

    def run(self, name: str) -> dict[str, Any] | None:
        """The record of a training run, or None."""
        return _json(self.folder / "runs" / f"{safe(name)}.json")

    def runs(self) -> dict[str, dict[str, Any]]:
        """All records, by the names of their files."""
        if self._runs is None:  # every choice of a learning rate asks for all of them
            self._runs = {path.stem: _json(path) or {} for path in sorted((self.folder / "runs").glob("*.json"))}
        return self._runs

    def write_fact(self, name: str, fact: Mapping[str, Any]) -> None:
        """Store figures of a stage."""
        write_json(self.folder / "facts" / f"{safe(name)}.json", dict(fact))

    def fact(self, name: str) -> dict[str, Any] | None:
        """Figures of a stage, or None if it was not run."""
        return _json(self.folder / "facts" / f"{safe(name)}.json")

    def seconds(self) -> float:
        """Time that went into everything stored."""
        total = sum(run.get("seconds", 0.0) for run in self.runs().values())
        for path in sorted((self.folder / "cells").glob("*/*.jsonl.gz")):
            with gzip.open(path, "rt", encoding="utf-8") as file:
                total += json.loads(file.readline()).get("seconds", 0.0)
        for path in sorted((self.folder / "facts").glob("*.json")):
            total += (_json(path) or {}).get("seconds", 0.0)
        return total

    def _cell(self, task: str, who: str) -> Path:
        return self.folder / "cells" / safe(task) / f"{safe(who)}.jsonl.gz"

    def _tasks(self, task: str) -> Path:
        return self.folder / "tasks" / f"{safe(task)}.jsonl.gz"


def safe(name: str) -> str:
    """A name that every file system takes; other names give other ones."""
    plain = re.sub(r"[^A-Za-z0-9._+@=,-]+", "-", name)
    if plain == name and len(name) <= LONGEST:
        return name
    return f"{plain[:LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _write(path: Path, facts: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [facts, *rows])
    with atomic_file(path) as temporary:
        temporary.write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            facts, *rows = [json.loads(line) for line in file]
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(f"{path} is damaged: {error}", remedy="remove it; its stage makes it again") from error
    return facts, rows


def _json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}", remedy="remove it; its stage makes it again") from error
    return dict(found)
