"""Results of a reproduction: plain files, each written once and atomically, so that a run can stop anywhere.

    cells/TASK/WHO.jsonl   a test cell: a line of facts, then one line per item (id, reply, answer, score)
    tasks/TASK.jsonl       the items: a line of facts, then id, prompt and gold
    runs/RUN.json          a training run: configuration, metrics, outcome
    facts/NAME.json        figures of a stage other than accuracies

Tables are computed from these files alone (`reproduction.report`). A finished reproduction is one archive
(`reproduction.archive`), which a store reads where there is no folder and unpacks before its first write.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from reproduction.archive import SUFFIX, read_archive, unpack
from sigmix.errors import ConfigError
from sigmix.evals.accuracy import Item, Result
from sigmix.tasks.base import Sample
from sigmix.utils.io import write_json, write_text

LONGEST = 180
"""Maximum length of a file's name, without its ending."""


@dataclass(frozen=True)
class Cell:
    """Items of one test cell and facts about it."""

    result: Result
    facts: Mapping[str, Any]


class Store:
    """Results in a folder, or in ``FOLDER.tar.xz`` while there is no such folder.

    Args:
        folder: created by the first write.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.archive = self.folder.with_name(self.folder.name + SUFFIX)
        packed = not self.folder.exists() and self.archive.exists()
        self._packed: dict[str, bytes] | None = read_archive(self.archive) if packed else None
        self._runs: dict[str, dict[str, Any]] = {}

    def unpack(self) -> None:
        """Unpack the archive into the folder, if there is no folder yet."""
        if self._packed is not None:
            unpack(self.archive, self.folder)
            self._packed = None

    # ------------------------------------------------------------------ cells

    def has(self, task: str, who: str) -> bool:
        """Return whether a cell is stored."""
        return self._exists(_cell(task, who))

    def write(self, result: Result, who: str, facts: Mapping[str, Any]) -> None:
        """Store a cell."""
        rows = [{"id": one.id, "reply": one.reply, "answer": one.answer, "score": one.score} for one in result.items]
        self._write_lines(_cell(result.task, who), {"task": result.task, "who": who, **facts}, rows)

    def cell(self, task: str, who: str) -> Cell | None:
        """Return a cell, or None if it was not run.

        Raises:
            ConfigError: the file of the cell or of the task's items is damaged or missing.
        """
        name = _cell(task, who)
        if not self._exists(name):
            return None
        facts, rows = self._lines(name)
        texts = self._items(task)
        items = [Item(row["id"], *texts[row["id"]], row["reply"], row["answer"], row["score"], "") for row in rows]
        return Cell(Result(task, items), facts)

    def cells(self, task: str) -> list[str]:
        """Return the names of the cells of a task."""
        return [Path(name).name.removesuffix(".jsonl") for name in self._names(f"cells/{safe(task)}/*.jsonl")]

    def write_items(self, task: str, samples: Iterable[Sample], facts: Mapping[str, Any]) -> None:
        """Store the items of a task, once."""
        if not self._exists(_task(task)):
            rows = [{"id": s.id, "prompt": s.prompt, "gold": s.gold} for s in samples]
            self._write_lines(_task(task), {"task": task, **facts}, rows)

    def about(self, task: str) -> dict[str, Any]:
        """Return the facts of a task's items, such as the best constant answer; {} if there are none."""
        return self._lines(_task(task))[0] if self._exists(_task(task)) else {}

    @cache  # noqa: B019 - a store lives as long as the program
    def _items(self, task: str) -> dict[str, tuple[str, str]]:
        if not self._exists(_task(task)):
            raise ConfigError(f"{self.folder / _task(task)} is missing", remedy="run the stage again")
        return {row["id"]: (row["prompt"], row["gold"]) for row in self._lines(_task(task))[1]}

    # ------------------------------------------------------------------ runs and facts

    def write_run(self, name: str, run: Mapping[str, Any]) -> None:
        """Store the record of a training run."""
        self.unpack()
        write_json(self.folder / f"runs/{safe(name)}.json", dict(run))
        self._runs.pop(safe(name), None)

    def run(self, name: str) -> dict[str, Any] | None:
        """Return the record of a training run, or None."""
        return self._json(f"runs/{safe(name)}.json")

    def runs(self) -> dict[str, dict[str, Any]]:
        """Return {file name: record} of all training runs, those of other processes included."""
        for name in self._names("runs/*.json"):
            if Path(name).stem not in self._runs:  # every choice of a learning rate reads all of them
                self._runs[Path(name).stem] = self._json(name) or {}
        return dict(sorted(self._runs.items()))

    def write_fact(self, name: str, fact: Mapping[str, Any]) -> None:
        """Store figures of a stage."""
        self.unpack()
        write_json(self.folder / f"facts/{safe(name)}.json", dict(fact))

    def fact(self, name: str) -> dict[str, Any] | None:
        """Return figures of a stage, or None if it was not run."""
        return self._json(f"facts/{safe(name)}.json")

    def seconds(self) -> float:
        """Return the computing time of everything stored."""
        return sum(one.get("seconds", 0.0) for one in self._records())

    def commits(self) -> list[str]:
        """Return the commits on which everything stored was computed."""
        return sorted({one["commit"] for one in self._records() if "commit" in one})

    def _records(self) -> list[dict[str, Any]]:
        cells = [self._lines(name)[0] for name in self._names("cells/*/*.jsonl")]
        return [*self.runs().values(), *cells, *(self._json(name) or {} for name in self._names("facts/*.json"))]

    # ------------------------------------------------------------------ files

    def _exists(self, name: str) -> bool:
        return name in self._packed if self._packed is not None else (self.folder / name).exists()

    def _names(self, pattern: str) -> list[str]:
        if self._packed is not None:
            return sorted(name for name in self._packed if Path(name).match(pattern))
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.glob(pattern))

    def _text(self, name: str) -> str:
        content = self._packed[name] if self._packed is not None else (self.folder / name).read_bytes()
        return content.decode("utf-8")

    def _json(self, name: str) -> dict[str, Any] | None:
        if not self._exists(name):
            return None
        try:
            return dict(json.loads(self._text(name)))
        except ValueError as error:
            raise self._damaged(name, error) from error

    def _lines(self, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        try:
            facts, *rows = [json.loads(line) for line in self._text(name).split("\n") if line]
        except ValueError as error:
            raise self._damaged(name, error) from error
        return facts, rows

    def _write_lines(self, name: str, facts: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
        self.unpack()
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [facts, *rows])
        write_text(self.folder / name, text)

    def _damaged(self, name: str, error: Exception) -> ConfigError:
        path = self.folder / name
        return ConfigError(f"{path} is damaged: {error}", remedy=f"rm {path}; its stage writes it again")


def safe(name: str) -> str:
    """Return a distinct file name that every file system accepts."""
    plain = re.sub(r"[^A-Za-z0-9._+@=,-]+", "-", name)
    if plain == name and len(name) <= LONGEST:
        return name
    return f"{plain[:LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _cell(task: str, who: str) -> str:
    return f"cells/{safe(task)}/{safe(who)}.jsonl"


def _task(task: str) -> str:
    return f"tasks/{safe(task)}.jsonl"
