"""Rows of a data set, from local JSONL files or from the Hugging Face hub, each knowing where it came from.

Does not interpret fields; a missing one is a `DataError` that names file and line.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sigmix.errors import DataError
from sigmix.utils.images import Picture


@dataclass(frozen=True)
class Row:
    """One row; ``where`` is "file:line", or the hub's id, split and row number."""

    data: Mapping[str, Any]
    where: str

    def get(self, *names: str, kind: type | tuple[type, ...] = object) -> Any:
        """The first field of ``names`` that is there.

        Raises:
            DataError: none is there, or it is not of ``kind``.
        """
        for name in names:
            if self.data.get(name) is not None:
                value = self.data[name]
                if not isinstance(value, kind) or (isinstance(value, str) and not value.strip()):
                    raise DataError(f"{self.where}: field {name!r} holds {str(value)[:40]!r} ({type(value).__name__})")
                return value
        wanted, there = " or ".join(map(repr, names)), ", ".join(self.data) or "none"
        raise DataError(f"{self.where}: no field {wanted}; it has {there}")

    def bad(self, why: str) -> DataError:
        """The error for a row whose content makes no sense."""
        return DataError(f"{self.where}: {why}")


def local_rows(path: Path) -> list[Row]:
    """All rows of a JSONL file; blank lines are skipped.

    Raises:
        DataError: cannot be read, not UTF-8, a line that is not a JSON object, or no rows.
    """
    rows = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    data = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}:{number}: not JSON in UTF-8: {error}") from error
                if not isinstance(data, dict):
                    raise DataError(f"{path}:{number}: a JSON object is expected, not a {type(data).__name__}")
                rows.append(Row(data, f"{path}:{number}"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


def hub_rows(
    hub_id: str, configs: Sequence[str | None], split: str, remedy: str, image: str | None = None
) -> list[Row]:
    """All rows of one split of a data set on the hub, its configurations one after the other.

    Args:
        image: a column of images: rows hold a `Picture` there, whose bytes stay on disk.

    Raises:
        DataError: no `datasets` library, no network, no such data set, or no rows; carries ``remedy``.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{hub_id} comes from the hub, and the datasets library is not installed",
            remedy=f"pip install 'sigmix[tasks]', or {remedy}",
        ) from error
    rows = []
    for config in configs:
        try:
            table = datasets.load_dataset(hub_id, config, split=split)
        except Exception as error:  # the library raises its own, the hub's, requests' and OS errors
            raise DataError(
                f"cannot get {hub_id} ({split}) from the Hugging Face hub: {str(error)[:200]}", remedy=remedy
            ) from error
        where = f"{hub_id}/{config or 'default'}/{split} row"
        if image is None:
            rows += [Row(dict(data), f"{where} {number}") for number, data in enumerate(table)]
            continue
        if image not in table.column_names:
            raise DataError(f"{hub_id} ({split}) has no column {image!r}; it has {', '.join(table.column_names)}")
        table = table.cast_column(image, datasets.Image(decode=False))
        shown = _Shown(table.select_columns([image]), image)
        for number, data in enumerate(table.remove_columns([image])):
            name = f"{where} {number}"
            rows.append(Row({**data, image: shown.picture(number, name, data.get("image_id"))}, name))
    if not rows:
        raise DataError(f"{hub_id} ({split}) has no rows", remedy=remedy)
    return rows


class _Shown:
    """Images of a table that is on disk, each read once for its digest and not kept."""

    def __init__(self, table: Any, column: str) -> None:
        self.table, self.column = table, column
        self._read: dict[Any, tuple[str, functools.partial[bytes]]] = {}

    def picture(self, number: int, name: str, image_id: Any) -> Picture:
        """The image of a row; rows of one ``image_id`` (None: not known) show the same one."""
        found = self._read.get(image_id) if image_id is not None else None
        if found is None:
            source = functools.partial(self._bytes, number, name)
            found = hashlib.sha256(source()).hexdigest(), source
            if image_id is not None:
                self._read[image_id] = found
        # with the digest the bytes that it is of: another row may have encoded the same image otherwise
        digest, source = found
        return Picture(digest, name, source)

    def _bytes(self, number: int, name: str) -> bytes:
        cell = self.table[number][self.column] or {}
        content = cell.get("bytes")
        if content is None and cell.get("path"):
            content = Path(cell["path"]).read_bytes()
        if content is None:
            raise DataError(f"{name} has no image")
        return content
