"""Checkpoint on disk, read one tensor at a time, and its decomposition: peak memory is a few matrices.

    checkpoint = Checkpoint("meta-llama/Meta-Llama-3-70B-Instruct", "bfloat16")     # reads config and headers only
    decompose_checkpoint(checkpoint, device="cuda")                                 # resumable; fills the cache

Parameters have the names of the loaded model, and tensors are cast as `load_base` casts them. `get_peft_model` on the
loaded base then finds every decomposition in the cache of `sigmix.svf.decomposition`.

Not supported: quantized checkpoints, and matrices that transformers builds from several tensors on loading.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from sigmix.errors import BaseModelError, ConfigError, OutputError
from sigmix.models.default import DEFAULT
from sigmix.models.digests import weight_digest
from sigmix.models.loading import dtype_of, locate
from sigmix.models.memory import empty_model, entry_bytes
from sigmix.models.multimodal import backbone
from sigmix.models.weights import shape
from sigmix.svf.config import SVFConfig
from sigmix.svf.decomposition import METHOD, cache_path, cached_decompose
from sigmix.svf.tuner import Linear, linear_layers, target_layers
from sigmix.utils.cache import MANIFEST, cache_dir, verify
from sigmix.utils.io import free_bytes, read_json_object, write_json
from sigmix.utils.logging import quiet
from sigmix.utils.safetensors import Shards

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""Dtypes of unquantized weights, by safetensors' names."""

LOAD_WHOLE = "load it whole instead: get_peft_model(load_base(…)) decomposes what is not in the cache"


@dataclass(frozen=True)
class Matrix:
    """Adapted matrix of a checkpoint: module path, (out, in), and whether it is stored as [in, out] (Conv1D)."""

    path: str
    shape: tuple[int, int]
    transposed: bool


@dataclass(frozen=True)
class DecompositionResult:
    """Matrices ``computed`` now and ``cached`` before, ``bytes`` written to the cache, ``seconds``."""

    computed: int
    cached: int
    bytes: int
    seconds: float


class Checkpoint:
    """The only reader of model checkpoints on disk; holds no tensor.

    Args:
        base: as for `load_base`; a hub model is downloaded first.
        dtype: read tensors as `load_base` loads them in this dtype; "auto": in its default dtype on this machine;
            None: as they are stored.
        name: label of the base in messages; default: the name that `load_base` gives it.

    Attributes:
        name, folder, kind: see `sigmix.models.loading.locate`. config, model: of transformers; the model is on the
            meta device. shards: the tensors under their names in the checkpoint. tensors: {parameter: tensor in
            ``shards``}, for parameters that are stored as they are. cast: the dtype argument.

    Raises:
        BaseModelError: not found, damaged, quantized, or not a causal language model.
        CacheError: a damaged conversion in the cache.
    """

    def __init__(
        self,
        base: str | Path = DEFAULT,
        dtype: str | torch.dtype | None = None,
        *,
        name: str | None = None,
    ) -> None:
        self.base = str(base)
        default, self.folder, self.kind = locate(base)
        self.name = name or default
        if (self.folder / MANIFEST).is_file():
            verify(self.folder)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.cast = None if dtype is None else dtype_of(dtype, device)
        self.shards = Shards(self.folder)
        self.config = self._config()
        self.model = empty_model(self.config)
        self._parameters = dict(sorted(self.model.named_parameters(remove_duplicate=False)))
        names: dict[int, list[str]] = {}
        for path, parameter in self._parameters.items():
            names.setdefault(id(parameter), []).append(path)
        self._tied = {path: tied for tied in names.values() for path in tied}
        self.tensors, self._built = _loaded_names(self.model, self.shards)
        self._names = {tensor: name for name, tensor in self.tensors.items()}

    def _config(self) -> Any:
        from transformers import AutoConfig

        try:
            with quiet():
                config = AutoConfig.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:  # transformers' own classes
            raise BaseModelError(
                f"cannot read config.json of {self.name}: {error}", remedy="give a model's folder, or download it again"
            ) from error
        if getattr(config, "quantization_config", None):
            raise self._quantized("has a quantization_config")
        return config

    def _quantized(self, reason: str) -> BaseModelError:
        return BaseModelError(
            f"{self.name} is a quantized checkpoint: it {reason}",
            remedy="give the original weights in bfloat16, float16 or float32, see docs/large-models.md",
        )

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """All linear layers by path, on the meta device, the output head included."""
        return linear_layers(self.model)

    @cached_property
    def vision(self) -> bool:
        """True if this is a vision-language model."""
        return backbone(self.model) is not None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights as they are read: that of the first linear layer."""
        if self.cast is not None:
            return self.cast
        stored = (self.tensors.get(f"{path}.weight") for path in self.linears)
        tensor = next((name for name in stored if name is not None), next(iter(self.shards)))
        kind = self.shards.entry(tensor).dtype
        if kind not in FLOATS:
            raise self._quantized(f"stores {tensor} as {kind}")
        return FLOATS[kind]

    # ------------------------------------------------------------------ tensors

    def tied(self, parameter: str) -> list[str]:
        """Return all names of a parameter, itself included; several where weights are tied."""
        return self._tied.get(parameter, [parameter])

    def key(self, parameter: str) -> str:
        """Return the name in the checkpoint of a parameter's tensor.

        Raises:
            BaseModelError: it has none of its own, of another shape, or a quantized one.
        """
        tensor = next((self.tensors[name] for name in self.tied(parameter) if name in self.tensors), None)
        if tensor is None:
            reason = "is built from several tensors" if parameter in self._built else "is missing"
            raise BaseModelError(f"{parameter} {reason} in the checkpoint {self.folder}", remedy=LOAD_WHOLE)
        entry = self.shards.entry(tensor)
        if entry.dtype not in FLOATS:
            raise self._quantized(f"stores {tensor} as {entry.dtype}")
        if parameter in self._parameters and entry.shape != (expected := tuple(self._parameters[parameter].shape)):
            raise BaseModelError(
                f"{entry.file} has {tensor} as {list(entry.shape)}, but the config expects {list(expected)}",
                remedy="download the model again",
            )
        return tensor

    def dtype_of(self, key: str) -> torch.dtype | None:
        """Return the dtype of `tensor` without reading it; None: as stored.

        transformers searches names for its patterns of weights that stay in float32 in half precision.
        """
        if self.cast is None or self.shards.entry(key).dtype not in FLOATS:
            return None
        return self._loaded_dtype(key, self.cast)

    def _loaded_dtype(self, key: str, dtype: torch.dtype) -> torch.dtype:
        patterns: set[str] = set()
        if dtype in (torch.float16, torch.bfloat16):
            patterns |= set(getattr(self.model, "_keep_in_fp32_modules_strict", None) or ())
        if dtype == torch.float16:
            patterns |= set(getattr(self.model, "_keep_in_fp32_modules", None) or ())
        name = self._names.get(key, key)
        return torch.float32 if any(re.search(part.replace("*", ".*"), name) for part in patterns) else dtype

    def stored_in(self, dtype: torch.dtype) -> bool:
        """Return whether loading in this dtype changes no float of the checkpoint."""
        entries = {key: self.shards.entry(key).dtype for key in self.shards}
        return all(FLOATS[kind] == self._loaded_dtype(key, dtype) for key, kind in entries.items() if kind in FLOATS)

    def tensor(self, key: str) -> torch.Tensor:
        """Read a tensor of the checkpoint, cast as `load_base` casts it; integers stay as they are."""
        tensor = self.shards.tensor(key)
        dtype = self.dtype_of(key)
        return tensor if dtype is None else tensor.to(dtype)

    def weight(self, path: str) -> torch.Tensor:
        """Read the weight [out, in] of a linear layer.

        Raises:
            BaseModelError: see `key`.
        """
        weight = self.tensor(self.key(f"{path}.weight"))
        return weight.T if isinstance(self.linears[path], Conv1D) else weight

    def matrices(self, config: SVFConfig | None = None) -> list[Matrix]:
        """Return the matrices that a config adapts, in the model's order.

        Raises:
            BaseModelError: see `key`. ConfigError, UnknownNameError: see `sigmix.svf.tuner.target_layers`.
        """
        layers = target_layers(self.model, config)
        for path in layers:
            self.key(f"{path}.weight")
        return [Matrix(path, shape(layer), isinstance(layer, Conv1D)) for path, layer in layers.items()]

    # ------------------------------------------------------------------ fingerprint

    @property
    def parameters(self) -> list[str]:
        """Names of all parameters, sorted, tied ones once."""
        return [name for name in self._parameters if name == self._tied[name][0]]

    @property
    def complete(self) -> bool:
        """True if every parameter has a tensor of its own: fused ones, such as Mixtral's experts, have none."""
        return all(any(name in self.tensors for name in tied) for tied in self._tied.values())

    def digests(self, known: Mapping[str, str] | None = None) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Yield (name, shape, digest) of every parameter, from which a base's fingerprint is computed.

        Args:
            known: digests by parameter, of tensors that need not be read.
        """
        for name in self.parameters:
            digest = (known or {}).get(name) or weight_digest(self.tensor(self.key(name)))
            yield name, tuple(self._parameters[name].shape), digest


def _loaded_names(model: Any, shards: Shards) -> tuple[dict[str, str], set[str]]:
    """{parameter: tensor in the checkpoint} by transformers' rules, and the parameters built from several tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters: list[Any] = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    state = model.state_dict(keep_vars=True)
    tensors: dict[str, str] = {}
    built: set[str] = set()
    for tensor in shards:
        name, converter = rename_source_key(tensor, renamings, converters, model.base_model_prefix, state)
        if converter is not None:
            built.add(name)
        elif name in state or tensor in state:
            tensors[name if name in state else tensor] = tensor
    return tensors, built


# ---------------------------------------------------------------------- decomposition


@torch.no_grad()
def decompose_checkpoint(
    checkpoint: Checkpoint,
    matrices: Sequence[Matrix] | None = None,
    device: str | torch.device | None = None,
    *,
    progress: Callable[[Matrix, bool], None] | None = None,
    visit: Callable[[Matrix, torch.Tensor, str], None] | None = None,
) -> DecompositionResult:
    """Decompose the matrices that the cache lacks, one at a time.

    Interrupted runs resume: a cache entry is written atomically, and a ledger keeps the digest of every matrix that
    was read, so that it is not read again. The ledger is keyed by the files' names, sizes and modification times.

    Args:
        matrices: default: those of ``SVFConfig()``.
        device: default: a GPU if there is one. Another device may rotate singular vectors of near-equal values.
        progress: called after every matrix with True if it was computed now.
        visit: called with every matrix, its weight [out, in] and its digest; all are read then.

    Raises:
        OutputError: no room on the disk (checked before anything is computed).
        BaseModelError: see `Checkpoint.key`. ConfigError: NaN or infinite values; not enough memory on the device.
    """
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    matrices = checkpoint.matrices() if matrices is None else matrices
    start, computed, written = time.monotonic(), 0, 0
    ledger = _Ledger(checkpoint)
    missing = {matrix.path for matrix in _check_room(checkpoint, matrices, ledger)}
    for matrix in matrices:
        new = False
        if matrix.path in missing or visit is not None:
            weight = checkpoint.weight(matrix.path)
            digest = weight_digest(weight)
            if not cache_path(digest).exists():
                _decompose(matrix, weight, digest, where)
                new, computed, written = True, computed + 1, written + cache_path(digest).stat().st_size
            ledger.add(matrix, digest)
            if visit is not None:
                visit(matrix, weight, digest)
            del weight
        if progress is not None:
            progress(matrix, new)
    return DecompositionResult(computed, len(matrices) - computed, written, time.monotonic() - start)


def _decompose(matrix: Matrix, weight: torch.Tensor, digest: str, device: torch.device) -> None:
    try:
        cached_decompose(weight.to(device), digest)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"not enough memory on {device} to decompose {matrix.path} {list(matrix.shape)}: {error}",
            remedy="use another device: --device cpu",
        ) from error


def _check_room(checkpoint: Checkpoint, matrices: Sequence[Matrix], ledger: _Ledger) -> list[Matrix]:
    """Return the matrices without a cache entry on record, after a check that the disk has room for them."""
    free = free_bytes(cache_dir())

    def needed() -> int:
        return sum(entry_bytes(min(matrix.shape)) for matrix in missing)

    missing = ledger.missing(matrices)
    if needed() > free:
        for matrix in missing:  # some may be in the cache without an entry in the ledger
            if matrix.path not in ledger.digests:
                ledger.add(matrix, weight_digest(checkpoint.weight(matrix.path)))
        missing = ledger.missing(matrices)
    if needed() > free:
        raise OutputError(
            f"{len(missing)} of {len(matrices)} decompositions of {checkpoint.name} are missing and need "
            f"{needed() / 1e9:.1f} GB, but {cache_dir()} has {free / 1e9:.1f} GB free",
            remedy="set SIGMIX_CACHE to a larger disk, or adapt fewer matrices: --targets attention, --layers half",
        )
    return missing


class _Ledger:
    """Digests of the matrices of a checkpoint that were read, by path."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        files = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in checkpoint.shards.files]
        key = (str(checkpoint.folder.resolve()), files, str(checkpoint.dtype), METHOD)
        self._file = cache_dir() / "svd" / "ledgers" / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.json"
        stored = read_json_object(self._file)
        self.digests = {path: digest for path, digest in stored.items() if isinstance(digest, str)}

    def missing(self, matrices: Sequence[Matrix]) -> list[Matrix]:
        digests = [(matrix, self.digests.get(matrix.path)) for matrix in matrices]
        return [matrix for matrix, digest in digests if digest is None or not cache_path(digest).exists()]

    def add(self, matrix: Matrix, digest: str) -> None:
        if self.digests.get(matrix.path) != digest:
            self.digests[matrix.path] = digest
            write_json(self._file, self.digests)
