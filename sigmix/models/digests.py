"""SHA-256 digests of weights, remembered in memory for each parameter and on disk for each unchanged checkpoint.

Fingerprints of base models and the decomposition cache are keyed by the values of every weight. Hashing takes about a
second per GB of float32, so a digest is computed once for each parameter, and parameters that are still as `load_base`
read them take it from a file in the cache folder. That file is keyed by the checkpoint's files (name, size, times of
change) and by everything else that decides the loaded values.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sigmix.errors import OutputError
from sigmix.models import weights
from sigmix.utils.cache import cache_dir
from sigmix.utils.io import read_json_object, write_json

FORMAT = 1  # part of the file's key: raise it when `weight_digest` or `load_base` change what is hashed
SAMPLES = 64
MIN_BYTES = 64 << 20  # checkpoints below this size are hashed in every process, which is faster than it is worth a file


class _Entry(NamedTuple):
    parameter: weakref.ref  # weak, to detect a reused id
    state: tuple
    digest: str


_DIGESTS: dict[int, _Entry] = {}


def weight_digest(weight: torch.Tensor) -> str:
    """Return the hex SHA-256 of a weight's shape and values as float32, so that an exact upcast has the same digest."""
    digest = hashlib.sha256(repr(tuple(weight.shape)).encode())
    flat = weight.detach().reshape(-1)
    step = 1 << 24
    for start in range(0, flat.numel(), step):
        block = flat[start : start + step].to(device="cpu", dtype=torch.float32).contiguous()
        digest.update(block.numpy().data)
    return digest.hexdigest()


def parameter_digest(
    parameter: torch.Tensor, read: Callable[[], torch.Tensor] | None = None, fresh: bool = False
) -> str:
    """Return the `weight_digest` of a parameter, hashed again only after a change.

    A change is an in-place operation, another storage, or other values at 64 places spread over the parameter (edits
    through ``.data``, such as PEFT's merging of a LoRA, leave no other trace).

    Args:
        read: returns the values of a quantized or offloaded parameter.
        fresh: hash in any case.
    """
    state = _state(parameter)
    entry = _DIGESTS.get(id(parameter))
    if not fresh and entry is not None and entry.parameter() is parameter and entry.state == state:
        return entry.digest
    digest = weight_digest(parameter if read is None else read())
    _remember(parameter, state, digest)
    return digest


def layer_digest(layer: nn.Module) -> str | None:
    """Return the `weight_digest` of a linear layer's weight [out, in]; None for a transposed or an offloaded one."""
    parameter: torch.Tensor = layer.weight  # type: ignore[assignment]
    if isinstance(layer, Conv1D) or parameter.is_meta:
        return None
    return parameter_digest(parameter, partial(weights.value, layer) if weights.is_quantized(parameter) else None)


def digests_file(folder: Path, *settings: object) -> Path | None:
    """Return the path of a checkpoint's digests in the cache; None for a small checkpoint.

    Args:
        folder: with config.json and safetensors.
        settings: everything else that decides the loaded values: dtype, device, quantization.
    """
    files = []
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors*")]):
        with contextlib.suppress(OSError):
            stat = file.stat()
            files.append((file.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    if sum(size for _, size, *_ in files) < MIN_BYTES:
        return None
    packages = [(name, _version(name)) for name in ("torch", "transformers", "torchao", "bitsandbytes")]
    key = repr((FORMAT, str(folder.resolve()), files, [str(setting) for setting in settings], packages))
    return cache_dir() / "svd" / "ledgers" / f"weights-{hashlib.sha256(key.encode()).hexdigest()}.json"


def recall_digests(model: nn.Module, file: Path) -> None:
    """Remember the digests in ``file`` for a model that was loaded just now; missing ones are computed and added.

    They are computed here and not on first use, so that no edit of a parameter can come in between.
    """
    stored = read_json_object(file)
    values: dict[str, tuple[torch.Tensor, Callable[[], torch.Tensor] | None]] = {}
    seen: set[int] = set()  # of tied parameters the first name counts
    for path, module in model.named_modules():
        quantized = isinstance(module, (nn.Linear, Conv1D)) and weights.kind(module) == weights.QUANTIZED
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta and id(parameter) not in seen:  # meta: offloaded to files that may change
                seen.add(id(parameter))
                read = partial(weights.value, module) if quantized and name == "weight" else None
                values[f"{path}.{name}"] = parameter, read
    missing = [name for name in values if not isinstance(stored.get(name), str)]
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:  # hashlib releases the GIL
        stored |= zip(missing, pool.map(lambda name: parameter_digest(*values[name]), missing), strict=True)
    for name, (parameter, _) in values.items():
        _remember(parameter, _state(parameter), stored[name])
    if missing:
        with contextlib.suppress(OutputError):  # a read-only cache
            write_json(file, stored)


def _remember(parameter: torch.Tensor, state: tuple, digest: str) -> None:
    key = id(parameter)
    _DIGESTS[key] = _Entry(weakref.ref(parameter, lambda _: _DIGESTS.pop(key, None)), state, digest)


def _state(parameter: torch.Tensor) -> tuple:
    about = parameter._version, parameter.dtype, tuple(parameter.shape)
    if parameter.is_meta:
        return about
    if weights.is_quantized(parameter) and hasattr(parameter, "__tensor_flatten__"):  # torchao's: data in inner tensors
        names = parameter.__tensor_flatten__()[0]
        return *about, *(getattr(parameter, name).data_ptr() for name in names)
    flat = parameter.detach().reshape(-1) if parameter.is_contiguous() else parameter.detach().flatten()
    sample = flat[:: max(1, flat.numel() // SAMPLES)][: SAMPLES + 1].float().cpu().numpy().tobytes()
    return *about, parameter.data_ptr(), sample


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
