"""Rows of data files (JSONL, JSON, CSV, TSV, Parquet) and of the Hugging Face hub; errors name file and line."""

from __future__ import annotations

import csv
import functools
import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sigmix.errors import DataError, reraised
from sigmix.tasks.base import Score
from sigmix.utils.images import Picture
from sigmix.utils.io import open_text
from sigmix.utils.optional import optional


@dataclass(frozen=True)
class Row:
    """One row; ``where`` is "file:line", or the hub's id, split and row number."""

    data: Mapping[str, Any]
    where: str

    @property
    def file(self) -> str:
        """`where` without the line."""
        return self.where.rsplit(":", 1)[0].split(" row ")[0]

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


FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PICKLES = (".pkl", ".pickle", ".joblib", ".pt", ".pth", ".npy", ".bin")
MAX_ARRAY = 256 << 20  # bytes of a JSON array, which is read as a whole
PARQUET_BATCH = 1024  # rows that are in memory
FIELD = 16 << 20  # maximum characters of a CSV field


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSONL, JSON (an array of objects), CSV, TSV or Parquet file, in UTF-8.

    The fields of CSV files are strings, exactly as written: a library that guesses types would turn the label 007 into
    7 and NA into nothing, and `datasets` turns the dates of JSON files into timestamps. Commas, semicolons, tabs and
    bars separate CSV fields, by the header.

    Raises:
        DataError: the file cannot be read, a row is invalid (names file and line), or there are no rows.
    """
    kind = path.suffix.lower()
    if kind in PICKLES:
        raise DataError(
            f"{path}: {kind} files can run code when they are read, and are refused", remedy="save it as JSONL or CSV"
        )
    if path.exists() and kind not in FORMATS:
        raise DataError(f"{path}: unknown format {kind!r}, not one of {', '.join(FORMATS)}", remedy="convert it to CSV")
    rows = _parquet(path) if kind == ".parquet" else _csv(path) if kind in (".csv", ".tsv") else _json(path)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"{path} has no rows")


ONE_OBJECT = "write one JSON object a line, or one array of objects"


def _json(path: Path) -> Iterator[Row]:
    with open_text(path) as file:
        first = True
        for number, line in enumerate(file, 1):  # ends at \n, \r and \r\n: other separators may be within strings
            if not line.strip():
                continue
            where = f"{path}:{number}"
            if first and line.lstrip().startswith("["):
                yield from _array(path, "\n" * (number - 1) + line, file)
                return
            first = False
            with reraised(DataError, f"{where}: not JSON", ONE_OBJECT, (ValueError, RecursionError)):
                data = json.loads(line)
            yield Row(_object(data, where), where)


def _array(path: Path, start: str, file: IO[str]) -> Iterator[Row]:
    text = start + file.read(MAX_ARRAY)
    if file.read(1):
        raise DataError(f"{path}: an array of more than {MAX_ARRAY >> 20} MB", remedy="write one JSON object a line")
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}", remedy=ONE_OBJECT) from error
    except RecursionError as error:
        raise DataError(f"{path}: nested too deeply", remedy=ONE_OBJECT) from error
    if not isinstance(values, list):
        raise DataError(f"{path}: expected an array, not a {type(values).__name__}", remedy=ONE_OBJECT)
    for number, value in enumerate(values, 1):
        where = f"{path}: element {number}"
        yield Row(_object(value, where), where)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, not a {type(value).__name__}", remedy=ONE_OBJECT)
    return value


def _csv(path: Path) -> Iterator[Row]:
    with open_text(path) as file:
        head = list(itertools.islice(file, 20))
    if not head:
        return
    declared = re.fullmatch(r'"?sep=(.)"?\s*', head[0])  # Excel's line before the header
    delimiter = declared[1] if declared else "\t" if path.suffix.lower() == ".tsv" else _delimiter(head)
    csv.field_size_limit(FIELD)
    with open_text(path) as file:
        started = 1
        if declared:
            next(file)
            started = 2
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        columns: list[str] | None = None
        while True:
            try:
                fields = next(reader, None)
            except csv.Error as error:
                where = f"{path}:{started}"
                raise DataError(f"{where}: not CSV: {error}", remedy='write " as "" within quoted fields') from error
            where, started = f"{path}:{started}", reader.line_num + 1 + bool(declared)
            if fields is None:
                return
            if not any(field.strip() for field in fields):
                continue
            if columns is None:
                columns = [name.strip() for name in fields]
                if repeated := sorted(name for name, count in Counter(columns).items() if count > 1):
                    raise DataError(f"{where}: two columns are named {repeated[0]!r}", remedy="rename one of them")
                continue
            if len(fields) != len(columns):
                raise DataError(
                    f"{where}: {len(fields)} fields, expected {len(columns)} ({', '.join(columns)})",
                    remedy=f"quote fields that contain {delimiter!r}",
                )
            yield Row(dict(zip(columns, fields, strict=True)), where)


def _delimiter(head: Sequence[str]) -> str:
    """Return the delimiter that divides the header into most fields; a comma if there is none."""
    return max(",;\t|", key=lambda delimiter: len(next(csv.reader(head, delimiter=delimiter), [])))


def _parquet(path: Path) -> Iterator[Row]:
    if not path.is_file():
        raise DataError(f"cannot read {path}: No such file or directory")
    # not load_dataset, which logs errors on stderr and fails without rows
    parquet = optional("pyarrow.parquet", "'sigmix[tasks]', or convert it to CSV", f"reading {path}", DataError)
    number = 0
    with reraised(DataError, f"{path} cannot be read as Parquet", "write it again, or as CSV"):
        for batch in parquet.ParquetFile(path).iter_batches(PARQUET_BATCH):
            for data in batch.to_pylist():
                number += 1
                yield Row(data, f"{path} row {number}")


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


def hub_tables(name: str) -> Iterator[tuple[Any, Iterator[Row]]]:
    """Yield (split, rows) of a data set "user/set" or "user/set:config" on the hub; numbers of labels become names.

    Raises:
        DataError: no `datasets` library, no network, or no such data set.
    """
    remedy = "check the name, or download the files and give their folder"
    datasets = optional("datasets", "'sigmix[tasks]'", f"{name}, which is on the hub,", DataError)
    hub_id, _, config = name.partition(":")
    with reraised(DataError, f"cannot load {name} from the Hugging Face hub", remedy):
        tables = datasets.load_dataset(hub_id, config or None, streaming=True)
    for split, table in tables.items():
        labels = {
            column: feature.names for column, feature in (table.features or {}).items() if hasattr(feature, "names")
        }
        yield split, _hub_rows(table, f"{name}/{split} row", labels)


def _hub_rows(table: Any, where: str, labels: Mapping[str, Sequence[str]]) -> Iterator[Row]:
    for number, data in enumerate(table):
        names = {column: own[data[column]] for column, own in labels.items() if isinstance(data.get(column), int)
                 and 0 <= data[column] < len(own)}  # fmt: skip
        yield Row({**data, **names}, f"{where} {number}")


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
