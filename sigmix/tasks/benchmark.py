"""`BenchmarkTask`: a published data set, local or from the hub, with splits that are disjoint by content.

A subclass says where the rows are and turns one into a `Sample`. A sample that is in two splits stays in the one that
is measured on (test before validation before train), and `notes` counts what was dropped. Content means the prompt
as shown: near duplicates (SVAMP's variations of one story) are not found.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from sigmix.errors import DataError
from sigmix.tasks.base import Sample, Split, Task, check_request, hash_split, shuffled
from sigmix.tasks.rows import Row, hub_rows, local_rows

PRIORITY = ("test", "validation", "train")


class BenchmarkTask(Task):
    """A subclass sets the class attributes and writes `sample`.

    Attributes:
        files: split to path below the data folder. A split that is missing is made from "train" by content hash.
        hub: the data set's id on the hub.
        hub_configs: its configurations, joined.
        hub_splits: split to the hub's name for it.
        image_column: the column that holds images, if there is one; see `hub_rows`.
        only_test: the benchmark has no training data at all.

    `notes` is complete after the first call of `samples`.
    """

    files: ClassVar[Mapping[str, str]] = {}
    hub: ClassVar[str] = ""
    hub_configs: ClassVar[Sequence[str | None]] = (None,)
    hub_splits: ClassVar[Mapping[str, str]] = {"train": "train", "test": "test"}
    image_column: ClassVar[str | None] = None
    only_test: ClassVar[bool] = False

    def __init__(self, data_dir: Path | None = None) -> None:
        super().__init__()
        self.data_dir = data_dir

    @abstractmethod
    def sample(self, row: Row) -> Sample | None:
        """The row as a sample; None leaves it out (say why in the class's docstring)."""

    def splits(self) -> tuple[Split, ...]:
        return ("test",) if self.only_test else super().splits()

    def samples(self, split: Split, n: int | None = None, seed: int = 0) -> list[Sample]:
        check_request(self, split, n)
        return shuffled(self.tables[split], self.name, split, seed)[:n]

    @functools.cached_property
    def tables(self) -> dict[str, list[Sample]]:
        """Split to samples in the file's order, checked and without shared content."""
        tables = self.divide({split: self._convert(rows) for split, rows in self._rows().items()})
        seen: dict[str, str] = {}
        for split in (name for name in PRIORITY if name in tables):
            kept = []
            dropped: dict[str, int] = {}
            for sample in tables[split]:
                if sample.id in seen:
                    dropped[seen[sample.id]] = dropped.get(seen[sample.id], 0) + 1
                if sample.id not in seen or split == "test":  # a test set stays as published, repeats and all
                    kept.append(sample)
                seen.setdefault(sample.id, split)
            tables[split] = kept
            for other, count in dropped.items():
                again = "repeats within it" if other == split else f"also in {other}"
                done = "kept in" if split == "test" else "dropped from"
                self.notes.append(f"{count} samples {done} {split}: {again}")
            if not kept:
                raise DataError(f"task {self.name}: split {split!r} is empty")
        return tables

    def divide(self, tables: dict[str, list[Sample]]) -> dict[str, list[Sample]]:
        """Make the splits that the source lacks, by content hash; override for a benchmark's own rule."""
        if self.only_test:
            return tables
        if set(tables) == {"all"}:
            return self._by_hash(
                tables["all"],
                (0.6, 0.2, 0.2),
                "the source has one split only: 60 % train, 20 % validation, 20 % test by content hash",
            )
        if "validation" not in tables:
            # The training share alone is cut, so samples shared with test are still seen, and dropped, afterwards.
            made = self._by_hash(
                tables["train"], (0.9, 0.1, 0.0), "no official validation split: 10 % of train by content hash"
            )
            tables = {"train": made["train"], "validation": made["validation"], "test": tables["test"]}
        return tables

    def _by_hash(self, samples: list[Sample], shares: tuple[float, float, float], note: str) -> dict[str, list[Sample]]:
        self.notes.append(note)
        tables: dict[str, list[Sample]] = {"train": [], "validation": [], "test": []}
        for sample in samples:
            # "key" is the question without its instruction: another style must not move an item to another split
            tables[hash_split(sample.meta.get("key", sample.id), shares)].append(sample)
        return tables

    def _convert(self, rows: list[Row]) -> list[Sample]:
        return [sample for row in rows if (sample := self.sample(row)) is not None]

    def _rows(self) -> dict[str, list[Row]]:
        wanted = ", ".join(dict.fromkeys(self.files.values()))
        remedy = f"put {wanted} into a folder (one JSON object a line) and give it with --data-dir"
        if self.data_dir is None:
            if not self.hub:
                raise DataError(f"task {self.name} is not on the hub", remedy=remedy)
            return {
                split: hub_rows(self.hub, self.hub_configs, theirs, remedy, self.image_column)
                for split, theirs in self.hub_splits.items()
            }
        files = self.local_files(self.data_dir)
        missing = [str(path) for path in files.values() if not path.is_file()]
        if missing:
            there = sorted(path.name for path in self.data_dir.iterdir())[:20] if self.data_dir.is_dir() else []
            raise DataError(
                f"{self.name or self.hub}: {', '.join(missing)} not found; {self.data_dir} has "
                f"{', '.join(there) or 'nothing'}",
                remedy=f"{remedy}, or leave it out to use {self.hub}" if self.hub else remedy,
            )
        return {split: local_rows(path) for split, path in files.items()}

    def local_files(self, folder: Path) -> dict[str, Path]:
        """Split to file; override where the layout depends on what is there."""
        return {split: folder / name for split, name in self.files.items()}
