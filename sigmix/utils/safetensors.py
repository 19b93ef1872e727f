"""A model folder's safetensors shards, read one tensor at a time, so that a large model never has to be in memory.

    shards = Shards(folder)                        # model.safetensors, or all files of model.safetensors.index.json
    for name in shards:
        weight = shards.tensor(name)               # its file is opened, read and closed again

A file stays open only while one tensor is copied out of it, so mapped pages do not add up over a pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sigmix.errors import BaseModelError, ConfigError, UnknownNameError
from sigmix.utils.io import write_json

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


# --- Safetensors written one tensor at a time. The library's own writer wants all tensors of a file in memory at once.


KINDS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """A tensor to be written; ``kind`` as safetensors writes its dtype; ``bytes`` of its values."""

    name: str
    shape: tuple[int, ...]
    kind: str
    bytes: int


def spec(name: str, shape: Sequence[int], dtype: torch.dtype) -> Spec:
    """Of a tensor of this shape and dtype."""
    count = 1
    for side in shape:
        count *= side
    return Spec(name, tuple(shape), KINDS[dtype], count * dtype.itemsize)


def write_file(path: Path, specs: Sequence[Spec], tensor: Callable[[str], torch.Tensor]) -> None:
    """Write one file.

    Args:
        specs: in the order in which the tensors will lie and are asked for.
        tensor: gives each by its name; nothing is kept of it.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for one in specs:
        header[one.name] = {"dtype": one.kind, "shape": list(one.shape), "data_offsets": [place, place + one.bytes]}
        place += one.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for one in specs:
            value = tensor(one.name).detach().cpu()
            if (tuple(value.shape), KINDS.get(value.dtype)) != (one.shape, one.kind):
                raise ConfigError(f"{one.name} is {tuple(value.shape)} of {value.dtype}, not {one.shape} of {one.kind}")
            file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_shards(
    folder: Path, specs: Iterable[Spec], tensor: Callable[[str], torch.Tensor], shard_bytes: int
) -> list[str]:
    """Write a checkpoint as ``model.safetensors``, or as shards with their index where it is larger than one.

    Args:
        shard_bytes: most bytes of tensors in a file; a tensor that is larger has a file to itself.

    Returns:
        The names of the files.
    """
    groups: list[list[Spec]] = [[]]
    for one in specs:
        if groups[-1] and sum(other.bytes for other in groups[-1]) + one.bytes > shard_bytes:
            groups.append([])
        groups[-1].append(one)
    if len(groups) == 1:
        write_file(folder / SINGLE, groups[0], tensor)
        return [SINGLE]
    names = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    for name, group in zip(names, groups, strict=True):
        write_file(folder / name, group, tensor)
    total = sum(one.bytes for group in groups for one in group)
    where = {one.name: name for name, group in zip(names, groups, strict=True) for one in group}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
    return names
