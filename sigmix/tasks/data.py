"""Rows of a data set from a JSONL file or the Hugging Face hub; errors name file and line."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sigmix.errors import DataError, reraised
from sigmix.tasks.base import Score
from sigmix.utils.images import Picture
from sigmix.utils.io import read_text
from sigmix.utils.optional import optional


@dataclass(frozen=True)
class Row:
    """One row; ``where`` is "file:line", or the hub's id, split and row number."""

    data: Mapping[str, Any]
    where: str

    def get(self, *names: str, kind: type | tuple[type, ...] = object) -> Any:
        """Return the first field of ``names`` that has a value.

        Raises:
            DataError: there is none, or it is not of type ``kind``, or it is a blank string.
        """
        for name in names:
            if (value := self.data.get(name)) is not None:
                blank = isinstance(value, str) and not value.strip()
                if blank or not isinstance(value, kind) or (isinstance(value, float) and not math.isfinite(value)):
                    raise self.bad(f"field {name!r} holds {str(value)[:40]!r} ({type(value).__name__})")
                return value
        raise self.bad(f"no field {' or '.join(map(repr, names))}; it has {', '.join(self.data) or 'none'}")

    def check_gold(self, gold: str, score: Callable[[str], Score], full: float = 1.0) -> None:
        """Raise `DataError` if the row's gold reply does not score ``full``, or an empty reply does not score 0."""
        scored, empty = score(gold), score("").value
        if scored.value != full or empty:
            why = "an empty reply does" if empty else scored.explanation
            raise self.bad(f"no reply can match the answer {gold[:40]!r}: {why}")

    def bad(self, why: str) -> DataError:
        """Return the error for a row with invalid content."""
        return DataError(f"{self.where}: {why}")


def local_rows(path: Path) -> list[Row]:
    """Read all rows of a JSONL file (see `read_text`); blank lines are skipped.

    Raises:
        DataError: the file cannot be read, a line is not a JSON object, or there are no rows.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        with reraised(DataError, f"{where}: not JSON", "write one JSON object a line", (ValueError, RecursionError)):
            data = json.loads(line)
        if not isinstance(data, dict):
            raise DataError(
                f"{where}: expected a JSON object, not a {type(data).__name__}", remedy="write one JSON object a line"
            )
        rows.append(Row(data, where))
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


def hub_rows(
    hub_id: str, configs: Sequence[str | None], split: str, remedy: str, image: str | None = None
) -> list[Row]:
    """Load all rows of one split of a data set on the hub, with its configurations concatenated.

    Args:
        image: name of an image column; rows hold a `Picture` there, and its bytes stay on disk.

    Raises:
        DataError: no `datasets` library, no network, no such data set, or no rows; has ``remedy``.
    """
    datasets = optional("datasets", f"'sigmix[tasks]', or {remedy}", f"{hub_id}, which is on the hub,", DataError)
    rows = []
    for config in configs:
        with reraised(DataError, f"cannot load {hub_id} ({split}) from the Hugging Face hub", remedy):
            table = datasets.load_dataset(hub_id, config, split=split)
        where = f"{hub_id}/{config or 'default'}/{split} row"
        if image is None:
            rows += [Row(dict(data), f"{where} {number}") for number, data in enumerate(table)]
            continue
        if image not in table.column_names:
            raise DataError(f"{hub_id} ({split}) has no column {image!r}; it has {', '.join(table.column_names)}")
        table = table.cast_column(image, datasets.Image(decode=False))
        images = _ImageColumn(table.select_columns([image]), image)
        for number, data in enumerate(table.remove_columns([image])):
            name = f"{where} {number}"
            rows.append(Row({**data, image: images.picture(number, name, data.get("image_id"))}, name))
    if not rows:
        raise DataError(f"{hub_id} ({split}) has no rows", remedy=remedy)
    return rows


class _ImageColumn:
    """Images of a table on disk, each read once for its digest and not kept in memory."""

    def __init__(self, table: Any, column: str) -> None:
        self.table, self.column = table, column
        self._first: dict[Any, tuple[str, functools.partial[bytes]]] = {}

    def picture(self, number: int, name: str, image_id: Any) -> Picture:
        """Return the image of a row; rows with the same ``image_id`` (None: unknown) share the first one's bytes.

        Another row may have encoded the same image differently, so digest and bytes come from one row.
        """
        if image_id is None or image_id not in self._first:
            source = functools.partial(self._bytes, number, name)
            digest = hashlib.sha256(source()).hexdigest()
            if image_id is None:
                return Picture(digest, name, source)
            self._first[image_id] = digest, source
        digest, source = self._first[image_id]
        return Picture(digest, name, source)

    def _bytes(self, number: int, name: str) -> bytes:
        cell = self.table[number][self.column] or {}
        content = cell.get("bytes")
        if content is None and cell.get("path"):
            content = Path(cell["path"]).read_bytes()
        if content is None:
            raise DataError(f"{name} has no image")
        return content
