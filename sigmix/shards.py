"""A model folder's safetensors shards, read one tensor at a time, so that a large model never has to be in memory.

    shards = Shards(folder)                        # model.safetensors, or all files of model.safetensors.index.json
    for name in shards:
        weight = shards.tensor(name)               # its file is opened, read and closed again

A file stays open only while one tensor is copied out of it, so mapped pages do not add up over a pass.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sigmix.errors import BaseModelError, UnknownNameError

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
AGAIN = "download the model again"


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies and what it is; ``dtype`` as safetensors writes it, such as ``BF16``; ``bytes`` on disk."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    bytes: int


class Shards:
    """The tensors of a folder of safetensors, by their names in the checkpoint.

    Attributes:
        folder: where the shards are. entries: {name: Entry}, in the order of the files and of the tensors within them.

    Raises:
        BaseModelError: no safetensors there, an index that cannot be read, a shard that is missing or damaged, or one
            that lacks a tensor which the index places in it.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        placed = self._index()
        self.entries: dict[str, Entry] = {}
        for file in sorted(set(placed.values())) if placed else [SINGLE]:
            for name, entry in _header(self.folder / file).items():
                if placed.get(name, file) == file:
                    self.entries[name] = entry
        if missing := sorted(set(placed) - set(self.entries)):
            where = self.folder / placed[missing[0]]
            raise BaseModelError(f"{where} lacks {missing[0]}, which the index places in it", remedy=AGAIN)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def bytes(self) -> int:
        """Of all tensors together, on disk."""
        return sum(entry.bytes for entry in self.entries.values())

    @property
    def files(self) -> list[Path]:
        """The shards, in order."""
        return list(dict.fromkeys(entry.file for entry in self.entries.values()))

    def entry(self, name: str) -> Entry:
        """What ``name`` is and where.

        Raises:
            UnknownNameError: the checkpoint has no such tensor.
        """
        if name not in self.entries:
            raise UnknownNameError("tensor", name, self.entries)
        return self.entries[name]

    def tensor(self, name: str) -> torch.Tensor:
        """A copy of one tensor, on the CPU, in its dtype on disk.

        Raises:
            UnknownNameError: no such tensor. BaseModelError: its shard is damaged or gone.
        """
        from safetensors import SafetensorError, safe_open

        file = self.entry(name).file
        try:
            with safe_open(file, "pt") as opened:
                return opened.get_tensor(name).clone()  # the mapping ends with the block
        except (SafetensorError, OSError) as error:
            raise BaseModelError(f"{name} cannot be read from {file}: {error}", remedy=AGAIN) from error

    def _index(self) -> dict[str, str]:
        """{tensor: file name}, empty where one file holds everything."""
        if (self.folder / SINGLE).is_file():
            return {}
        index = self.folder / INDEX
        if not index.is_file():
            raise BaseModelError(f"{self.folder} has no {SINGLE} nor an index of it", remedy="give a model's folder")
        try:
            placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            # a name with a folder in it would read files elsewhere
            good = isinstance(placed, dict) and all(Path(file).name == file for file in placed.values())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BaseModelError(f"{index} cannot be read: {error}", remedy=AGAIN) from error
        if not good or not placed:
            raise BaseModelError(f"{index} does not say which file holds which tensor", remedy=AGAIN)
        return placed


def _header(file: Path) -> dict[str, Entry]:
    """The entries of one shard, from its header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt"):  # checks the header against the file's size
            pass
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    except (SafetensorError, OSError, ValueError) as error:
        raise BaseModelError(f"{file} cannot be read: {error}", remedy=AGAIN) from error
    found = {}
    for name, about in header.items():
        if name != "__metadata__":
            start, end = about["data_offsets"]
            found[name] = Entry(file, tuple(about["shape"]), about["dtype"], end - start)
    return found
