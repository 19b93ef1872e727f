"""Decomposition of a checkpoint matrix by matrix: peak memory is a few matrices, whatever the model.

    stream = Stream.open("meta-llama/Meta-Llama-3-70B-Instruct")     # headers and config only, nothing is loaded
    stream.decompose(device="cuda")                                  # resumable; fills the cache of `svf.decompose`

The model is built on the meta device from its config, so that `SVFConfig` chooses the matrices exactly as it will on
the loaded model. Each is then read, cast as `load_base` will cast it, hashed, and decomposed into the cache unless it
is there. `get_peft_model(load_base(...))` finds every decomposition afterwards and computes none.

Resuming: a cache entry appears whole or not at all, and a ledger in the cache keeps the digest of every tensor that was
read, so that what is done is not read again. The ledger is keyed by the files' names, sizes and times of change; it
only ever saves work, since a loaded model looks its decompositions up by its own weights.

What it does not do: matrices that transformers makes of several tensors on loading (they have no tensor of their own in
the checkpoint), and checkpoints that are quantised.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import inject_adapter_in_model

from sigmix.errors import BaseModelError, ConfigError, OutputError
from sigmix.models.digests import weight_digest
from sigmix.models.loading import dtype_of, locate
from sigmix.models.memory import empty_model, entry_bytes
from sigmix.svf.config import SVFConfig
from sigmix.svf.decomposition import METHOD, cache_path, cached_decompose
from sigmix.svf.tuner import svf_layers
from sigmix.utils.cache import cache_dir
from sigmix.utils.io import free_bytes, write_json
from sigmix.utils.logging import quiet
from sigmix.utils.safetensors import Shards

FLOATS = ("F64", "F32", "F16", "BF16")


WHOLE = "load it whole instead: get_peft_model(load_base(…)) decomposes what is not cached"


@dataclass(frozen=True)
class Matrix:
    """An adapted matrix: its module's path, its tensor in the checkpoint, (out, in), whether stored transposed."""

    path: str
    tensor: str
    shape: tuple[int, int]
    transposed: bool

    @property
    def bytes(self) -> int:
        """Of its decomposition on disk."""
        return entry_bytes(min(self.shape))


@dataclass(frozen=True)
class Done:
    """What `Stream.decompose` did: matrices ``computed`` now and ``cached`` before, ``bytes`` written, ``seconds``."""

    computed: int
    cached: int
    bytes: int
    seconds: float


class Stream:
    """A checkpoint whose tensors are read one at a time under the names of the loaded model.

    Args:
        folder: with config and safetensors. label: the base's name, for messages. dtype: that it will be loaded in.
        targets, layers: as `SVFConfig.target_modules` and ``layers_to_transform``.

    Attributes:
        model: on the meta device, adapted. matrices: the adapted ones, in the model's order.

    Raises:
        BaseModelError: no such model, a checkpoint that is damaged, quantised, or lacks a matrix of its own for an
            adapted layer. ConfigError: targets that match nothing.
    """

    def __init__(
        self,
        folder: Path,
        label: str,
        dtype: torch.dtype,
        targets: list[str] | str = "all-linear",
        layers: Sequence[int] | str | None = None,
    ) -> None:
        self.folder, self.label, self.dtype = folder, label, dtype
        self.shards = Shards(folder)
        self.model = empty_model(_config(folder, label))
        names = dict(self.model.named_parameters(remove_duplicate=False))
        self._tensors, self._converted = checkpoint_names(self.model, self.shards)
        # sorted, tied ones once, under the first name: as a fingerprint counts them
        self.parameters: dict[str, str] = {}
        seen: set[int] = set()
        aliases: dict[int, list[str]] = {}
        for name, parameter in names.items():
            aliases.setdefault(id(parameter), []).append(name)
        for name in sorted(names):
            if id(names[name]) not in seen:
                seen.add(id(names[name]))
                self.parameters[name] = next((a for a in aliases[id(names[name])] if a in self._tensors), name)
        chosen = list(layers) if layers is not None and not isinstance(layers, str) else layers
        config = SVFConfig(target_modules=targets, layers_to_transform=chosen)
        inject_adapter_in_model(config, self.model, "default")
        self.matrices = [self._matrix(path, layer) for path, layer in svf_layers(self.model).items()]
        self._file = cache_dir() / "svd" / "ledgers" / f"{self._key()}.json"
        self._ledger = _read_ledger(self._file)

    @classmethod
    def open(
        cls,
        base: str | os.PathLike[str],
        dtype: str | torch.dtype | None = None,
        targets: list[str] | str = "all-linear",
        layers: Sequence[int] | str | None = None,
        *,
        device: str | torch.device | None = None,
        revision: str | None = None,
    ) -> Stream:
        """The stream of a base by any name that `load_base` takes; a hub model is downloaded first.

        Args:
            dtype, device: as they will be given to `load_base`: they decide what is decomposed.

        Raises:
            See `Stream` and `sigmix.models.loading.locate`.
        """
        where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
        kind = dtype_of(dtype, where)
        label, folder, _ = locate(base, revision=revision)
        if not (folder / "config.json").is_file():
            raise BaseModelError(f"{label} is no model folder: config.json is missing", remedy="give a model's folder")
        return cls(folder, label, kind, targets, layers)

    # ------------------------------------------------------------------ reading

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter of the model by its name there, cast as `load_base` casts it.

        Raises:
            BaseModelError: the checkpoint has no tensor of its own for it, or keeps it quantised.
        """
        found = self.shards.tensor(self._own(name))
        kept = kept_float(self.model, self.dtype)
        return found.to(torch.float32 if any(part in name.split(".") for part in kept) else self.dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter, as it is stored."""
        return self.shards.entry(self._own(name)).shape

    def read(self, matrix: Matrix) -> torch.Tensor:
        """The weight [out, in] of an adapted matrix, as the loaded layer would have it."""
        weight = self.tensor(f"{matrix.path}.weight")
        return weight.T if matrix.transposed else weight

    def digest(self, matrix: Matrix) -> str | None:
        """The digest of a matrix that was read before, else None."""
        return self._ledger.get(matrix.path)

    def missing(self) -> list[Matrix]:
        """Matrices without a known entry in the cache; some may turn out to be there when they are read."""
        known = [(matrix, self.digest(matrix)) for matrix in self.matrices]
        return [matrix for matrix, digest in known if digest is None or not cache_path(digest).exists()]

    # ------------------------------------------------------------------ work

    def decompose(
        self,
        device: str | torch.device | None = None,
        each: Callable[[Matrix, bool], None] | None = None,
        visit: Callable[[Matrix, torch.Tensor, str], None] | None = None,
    ) -> Done:
        """Decompose what the cache lacks, one matrix at a time.

        Args:
            device: where; default: a GPU if there is one. On another device near-equal singular values may come out
                rotated; an expert's sketches tell.
            each: told of every matrix when it is done, and whether it was computed now.
            visit: given every matrix, its weight and its digest after it is in the cache; then all are read.

        Raises:
            OutputError: the disk has no room for all that is missing (before anything is computed), or fills up.
            BaseModelError: see `tensor`. ConfigError: NaN or infinite values; a device without the memory for it.
        """
        where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
        begun, computed, written = time.monotonic(), 0, 0
        missing = {matrix.path for matrix in self._room()}
        for matrix in self.matrices:
            new = False
            if matrix.path in missing or visit is not None:
                weight = self.read(matrix)
                digest = weight_digest(weight)
                if not cache_path(digest).exists():
                    self._compute(matrix, weight, digest, where)
                    new, computed, written = True, computed + 1, written + cache_path(digest).stat().st_size
                self._note(matrix.path, digest)
                if visit is not None:
                    visit(matrix, weight, digest)
                del weight
            if each is not None:
                each(matrix, new)
        return Done(computed, len(self.matrices) - computed, written, time.monotonic() - begun)

    def _compute(self, matrix: Matrix, weight: torch.Tensor, digest: str, where: torch.device) -> None:
        try:
            cached_decompose(weight.to(where), digest)
        except torch.OutOfMemoryError as error:
            m, n = matrix.shape
            raise ConfigError(
                f"{where} has no memory left to decompose {matrix.path} ({m}×{n}): {str(error)[:200]}",
                remedy="do it on the CPU, with --device cpu; what is done already stays done",
            ) from error

    def _room(self) -> list[Matrix]:
        """What `missing` says, after making sure that the disk has room for it."""
        missing, free = self.missing(), free_bytes(cache_dir())
        if sum(matrix.bytes for matrix in missing) > free:
            # those that were never read here may be there all the same, so they are read before anybody is refused
            for matrix in missing:
                if self.digest(matrix) is None:
                    self._note(matrix.path, weight_digest(self.read(matrix)))
            missing = self.missing()
        wanted = sum(matrix.bytes for matrix in missing)
        if wanted > free:
            raise OutputError(
                f"the decompositions of {self.label} that are missing ({len(missing)} of {len(self.matrices)}) need "
                f"{wanted / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free at {cache_dir()}",
                remedy="set SIGMIX_CACHE to a larger disk, or adapt fewer matrices: --targets attention, --layers half",
            )
        return missing

    # ------------------------------------------------------------------ the checkpoint

    def _matrix(self, path: str, layer: Any) -> Matrix:
        tensor = self._own(f"{path}.weight")
        entry = self.shards.entry(tensor)
        shape = (layer.out_features, layer.in_features)
        if entry.shape != (shape[::-1] if layer.transposed else shape):
            raise BaseModelError(
                f"{entry.file} has {tensor} as {list(entry.shape)}, where the config wants {list(shape)} for {path}",
                remedy="download the model again",
            )
        return Matrix(path, tensor, shape, layer.transposed)

    def _own(self, name: str) -> str:
        """The tensor in the checkpoint of a parameter."""
        tensor = self._tensors.get(self.parameters.get(name, name)) or self._tensors.get(name)
        if tensor is None:
            why = "is made of several of the checkpoint's tensors" if name in self._converted else "is not in it"
            raise BaseModelError(f"{name} of {self.label} {why}, so it cannot be streamed", remedy=WHOLE)
        entry = self.shards.entry(tensor)
        if entry.dtype not in FLOATS:
            raise BaseModelError(
                f"{tensor} of {self.label} is stored as {entry.dtype}: the checkpoint is quantised",
                remedy="stream the original weights; a quantised base takes their basis or its own, "
                "see docs/large-models.md",
            )
        return tensor

    def _key(self) -> str:
        files = [(f.name, (s := f.stat()).st_size, s.st_mtime_ns) for f in self.shards.files]
        parts = (str(self.folder.resolve()), files, str(self.dtype), METHOD)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _note(self, path: str, digest: str) -> None:
        if self._ledger.get(path) != digest:
            self._ledger[path] = digest
            write_json(self._file, self._ledger)


def _config(folder: Path, label: str) -> Any:
    from transformers import AutoConfig

    try:
        with quiet():
            return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers' own classes
        raise BaseModelError(f"the config of {label} cannot be read: {error}", remedy="download it again") from error


def _read_ledger(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()) else {}


# --- What transformers does to a checkpoint's tensors when it loads them: under which names, and in which dtype.


def checkpoint_names(model: Any, shards: Shards) -> tuple[dict[str, str], set[str]]:
    """{parameter of the model: tensor in the checkpoint}, and the parameters that are made of several tensors.

    transformers renames many checkpoints' tensors when it loads them; its own rules are applied here.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters: list[Any] = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    state = model.state_dict()
    tensors: dict[str, str] = {}
    converted: set[str] = set()
    for name in shards:
        found, by = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if by is None:
            tensors[found] = name
        else:
            converted.add(found)
    return tensors, converted


def kept_float(model: Any, dtype: torch.dtype) -> set[str]:
    """Parts of names that transformers keeps in float32 whatever dtype is asked for."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return kept


# --- What a checkpoint calls the parameters of the model that transformers makes of it.


def placed(model: Any, shards: Shards) -> dict[str, str]:
    """{parameter of ``model`` (on the meta device): tensor of ``shards``}, for those that are stored as they are."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict(keep_vars=True).items()}
    rename = _rules(model, shapes)
    found: dict[str, str] = {}
    for key in shards:
        name = key if key in shapes else rename(key)
        if name is not None and shapes.get(name) == shards.entry(key).shape:
            found[name] = key
    return found


def _rules(model: Any, shapes: dict[str, Any]) -> Callable[[str], str | None]:
    prefix = model.base_model_prefix

    def prefixed(key: str) -> str | None:
        for name in (f"{prefix}.{key}", key.removeprefix(f"{prefix}.")):
            if name in shapes:
                return name
        return None

    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # older and, who knows, newer transformers have other places for them
        return prefixed
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = model.state_dict(keep_vars=True)

    def renamed(key: str) -> str | None:
        name, converted = rename_source_key(key, renamings, converters, prefix, state)
        return None if converted is not None else name

    return renamed


# --- Stored tensors in the dtype that they have once the model is loaded: what `load_base` does, one tensor at a time.


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


HALF = ("bfloat16", "float16")


ON_DISK = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def loaded_dtype(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """That of the float parameter ``name`` in a model loaded in ``dtype``: transformers keeps some in float32.

    Its rules (``_keep_in_fp32_modules`` and ``…_strict``) are patterns that are searched for in the name, and they
    hold for half precision only.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return dtype
    kept = any(re.search(part.replace("*", ".*"), name) for part in kept_float(model, dtype))
    return torch.float32 if kept else dtype


def cast_as_loaded(model: Any, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of the checkpoint as the model loaded in ``dtype`` has it; what is no float stays as it is."""
    return tensor.to(loaded_dtype(model, name, dtype)) if tensor.is_floating_point() else tensor


def widens(narrow: str, wide: str) -> bool:
    """Whether every value of one dtype is one of the other."""
    return narrow == wide or wide == "float64" or (wide == "float32" and narrow in HALF)
