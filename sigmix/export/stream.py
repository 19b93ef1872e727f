"""Safetensors written one tensor at a time. The library's own writer wants all tensors of a file in memory at once.

The format: the length of the header (8 bytes, little-endian), the header in JSON, the tensors' bytes one after another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sigmix.errors import ConfigError
from sigmix.files import write_json
from sigmix.shards import INDEX, SINGLE

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
