"""Safetensors checkpoints, read and written one tensor at a time.

    shards = Shards(folder)                        # model.safetensors, or all files of model.safetensors.index.json
    for name in shards:
        weight = shards.tensor(name)               # opens, reads and closes its file

Files are closed after every tensor, so that mapped pages do not add up; the library's own writer needs all tensors of
a file in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sigmix.errors import BaseModelError, ConfigError, UnknownNameError, reraised
from sigmix.utils.io import write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
AGAIN = "download the model again"

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Stored tensor: file, shape, dtype in safetensors' spelling such as ``BF16``, size in bytes."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    bytes: int


class Shards:
    """Tensors of a folder of safetensors by name.

    Attributes:
        folder: of the shards. entries: {name: Entry}, in the order of the files and of the tensors in them.

    Raises:
        BaseModelError: no safetensors, an invalid index, a shard that is missing or damaged, or a tensor missing in
            its shard.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        index = _read_index(self.folder)
        self.entries: dict[str, Entry] = {}
        for file in sorted(set(index.values())) if index else [SINGLE]:
            for name, entry in _read_header(self.folder / file).items():
                if index.get(name, file) == file:
                    self.entries[name] = entry
        if missing := sorted(set(index) - set(self.entries)):
            file = index[missing[0]]
            raise BaseModelError(f"{self.folder / file} lacks {missing[0]}, which {INDEX} lists", remedy=AGAIN)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(entry.bytes for entry in self.entries.values())

    @property
    def files(self) -> list[Path]:
        """The shards, in order."""
        return list(dict.fromkeys(entry.file for entry in self.entries.values()))

    def entry(self, name: str) -> Entry:
        """Return the entry of a tensor.

        Raises:
            UnknownNameError: no such tensor.
        """
        if name not in self.entries:
            raise UnknownNameError("tensor", name, self.entries)
        return self.entries[name]

    def tensor(self, name: str) -> torch.Tensor:
        """Return a copy of a tensor on the CPU, in its stored dtype.

        Raises:
            UnknownNameError: no such tensor. BaseModelError: its shard is damaged or gone.
        """
        from safetensors import SafetensorError, safe_open

        file = self.entry(name).file
        damage = reraised(BaseModelError, f"cannot read {name} from {file}", AGAIN, (SafetensorError, OSError))
        with damage, safe_open(file, "pt") as opened:
            return opened.get_tensor(name).clone()  # the mapping ends with the block


def weight_files(folder: Path) -> list[str]:
    """Return the names of the files that hold a model's weights, present or not.

    Raises:
        BaseModelError: neither safetensors nor an index, or an invalid index.
    """
    return sorted(set(_read_index(folder).values())) or [SINGLE]


def _read_index(folder: Path) -> dict[str, str]:
    """Return {tensor: file name}; empty if one file holds everything."""
    if (folder / SINGLE).is_file():
        return {}
    path = folder / INDEX
    if not path.is_file():
        raise BaseModelError(f"{folder} has neither {SINGLE} nor {INDEX}", remedy="give a model's folder")
    with reraised(BaseModelError, f"cannot read {path}", AGAIN):
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        # a name with a folder in it would read files elsewhere
        valid = bool(index) and all(Path(file).name == file for file in index.values())
    if not valid:
        raise BaseModelError(f"{path} has no valid weight_map", remedy=AGAIN)
    return index


def _read_header(file: Path) -> dict[str, Entry]:
    from safetensors import SafetensorError, safe_open

    with reraised(BaseModelError, f"cannot read {file}", AGAIN, (SafetensorError, OSError, ValueError)):
        with safe_open(file, "pt"):  # checks the header against the file's size
            pass
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    header.pop("__metadata__", None)
    return {
        name: Entry(file, tuple(one["shape"]), one["dtype"], one["data_offsets"][1] - one["data_offsets"][0])
        for name, one in header.items()
    }


@dataclass(frozen=True)
class TensorSpec:
    """Tensor to be written: name, shape, dtype in safetensors' spelling, size in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int

    @classmethod
    def of(cls, name: str, shape: Sequence[int], dtype: torch.dtype) -> TensorSpec:
        """Build from a torch dtype."""
        return cls(name, tuple(shape), DTYPES[dtype], math.prod(shape) * dtype.itemsize)


def write_file(path: Path, specs: Sequence[TensorSpec], tensor: Callable[[str], torch.Tensor]) -> None:
    """Write one file.

    Args:
        specs: in the order of the tensors in the file. tensor: returns each by name, in that order.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + spec.bytes
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            value = tensor(spec.name).detach().cpu()
            if (tuple(value.shape), DTYPES.get(value.dtype)) != (spec.shape, spec.dtype):
                raise ConfigError(
                    f"{spec.name} is {tuple(value.shape)} of {value.dtype}, not {spec.shape} of {spec.dtype}"
                )
            file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_shards(
    folder: Path, specs: Iterable[TensorSpec], tensor: Callable[[str], torch.Tensor], shard_bytes: int
) -> list[str]:
    """Write ``model.safetensors``, or shards with their index, and return the file names.

    Args:
        shard_bytes: maximum size of a file's tensors; a larger tensor has a file to itself.
    """
    groups: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if groups[-1] and sum(other.bytes for other in groups[-1]) + spec.bytes > shard_bytes:
            groups.append([])
        groups[-1].append(spec)
    if len(groups) == 1:
        write_file(folder / SINGLE, groups[0], tensor)
        return [SINGLE]
    names = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    for name, group in zip(names, groups, strict=True):
        write_file(folder / name, group, tensor)
    total = sum(spec.bytes for group in groups for spec in group)
    index = {spec.name: name for name, group in zip(names, groups, strict=True) for spec in group}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))})
    return names


def to_int8(name: str, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a matrix in int8 as {name, name.scale}, with a scale in half precision for each row."""
    scale = (rows.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.half).tiny).half()
    return {name: (rows / scale.float()).round().to(torch.int8).contiguous(), f"{name}.scale": scale.contiguous()}


def from_int8(name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return a matrix of `to_int8` in float32."""
    return tensors[name] * tensors[f"{name}.scale"].float()
