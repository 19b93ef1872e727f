"""A base on disk: its weights one at a time, by module path, and experts checked against them.

The checks are those of `Expert.check`, fingerprint, sizes and sketches, on weights that are read when they are needed.
A model on the meta device says which modules there are and which weights are tied; the rest of the checkpoint is known
by name, shape and dtype only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sigmix.errors import BaseModelError, ExpertError, FingerprintError, UnknownNameError
from sigmix.experts.base import LINEAR, dtype_and_quantization, factors_of, matrix_of, shape_of
from sigmix.experts.expert import Expert
from sigmix.experts.fingerprint import combined, short
from sigmix.experts.mix import Mix
from sigmix.experts.sketch import Sketch, compare, sketch
from sigmix.export.names import placed
from sigmix.gguf import MANIFEST, quiet, verify
from sigmix.models import load_base, locate
from sigmix.plan import empty_model
from sigmix.shards import Shards
from sigmix.svf.decompose import Factors, weight_digest
from sigmix.svf.layer import SVFLinear
from sigmix.vision import backbone

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
HALF = ("bfloat16", "float16")
ON_DISK = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
OLD = "save it anew: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new folder)"


class Source:
    """A base folder, opened.

    Args:
        base: as `sigmix.models.load_base` takes it.
        dtype: read the weights in this dtype, as `load_base` would; None: as they are stored.

    Attributes:
        name: of the base, as experts record it. folder: where it lies. shards: its tensors.
        model: on the meta device. linears: {path: `nn.Linear` or `Conv1D` on the meta device}, the output head too.
        root: what paths in a vision-language model's language backbone begin with; "" of a text model.
        placed: {parameter path: tensor in ``shards``}, for all that are stored as they are.

    Raises:
        BaseModelError: not found, quantised, not a causal language model. CacheError: a cached conversion is damaged.
    """

    def __init__(self, base: str | Path, dtype: str | None = None) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise UnknownNameError("dtype", dtype, DTYPES)
        self.asked = str(base)
        self.name, self.folder, self.kind = locate(base)
        if (self.folder / MANIFEST).is_file():
            verify(self.folder)
        self.shards = Shards(self.folder)
        self.config, self.model = _meta(self.folder, self.name)
        self.linears = {path: module for path, module in self.model.named_modules() if isinstance(module, LINEAR)}
        head = self.model.get_output_embeddings()
        self.head = next((path for path, module in self.linears.items() if module is head), None)
        inside = backbone(self.model)
        self.root = f"{inside[0]}." if inside is not None else ""
        self.placed = placed(self.model, self.shards)
        self.cast = DTYPES[dtype] if dtype is not None else None
        self._fingerprint: str | None = None
        self._parameters = dict(sorted(self.model.named_parameters(remove_duplicate=False)))
        self._names: dict[int, set[str]] = {}
        for name, parameter in self._parameters.items():
            self._names.setdefault(id(parameter), set()).add(name)

    def adopt(self, experts: Iterable[Expert]) -> str | None:
        """Read the weights in the dtype in which these experts' base was, where they are stored in a wider one: then
        their base is the rounded one. Returns that dtype, or None where nothing changes."""
        made = {(expert.meta.get("base") or {}).get("dtype") for expert in experts if expert.verified}
        if self.cast is None and len(made) == 1:
            (name,) = made
            if name in HALF and self.dtype not in HALF:
                self.cast = DTYPES[name]
                self._fingerprint = None
                return str(name)
        return None

    # ------------------------------------------------------------------ reading

    @property
    def dtype(self) -> str:
        """Of the weights as they are read, such as ``bfloat16``: that of the first linear layer."""
        if self.cast is not None:
            return str(self.cast).removeprefix("torch.")
        keys = [self.placed[f"{path}.weight"] for path in self.linears if f"{path}.weight" in self.placed]
        kind = self.shards.entry(keys[0] if keys else next(iter(self.shards))).dtype
        if kind not in ON_DISK:
            raise BaseModelError(
                f"the weights of {self.name} are stored as {kind}, which is a quantised form",
                remedy="give the original checkpoint in bfloat16, float16 or float32",
            )
        return ON_DISK[kind]

    def tensor(self, key: str) -> torch.Tensor:
        """A tensor of the checkpoint, floats in the dtype that was asked for."""
        tensor = self.shards.tensor(key)
        return tensor.to(self.cast) if self.cast is not None and tensor.is_floating_point() else tensor

    def key(self, path: str) -> str:
        """The checkpoint's name of a matrix.

        Raises:
            UnknownNameError: no such linear layer. BaseModelError: it is not stored as one tensor.
            ExpertError: it is tied to another weight, so that it cannot change alone.
        """
        if path not in self.linears:
            raise UnknownNameError("matrix", path, self.linears, remedy=f"they are those of {self.name}")
        name = f"{path}.weight"
        if name not in self.placed and not self._aliases(name) & set(self.placed):
            near = UnknownNameError("tensor", name, self.shards).message
            raise BaseModelError(
                f"{self.folder} does not store {path} as one tensor under a name that is known here: {near}", remedy=OLD
            )
        if others := self._aliases(name) - {name}:
            raise ExpertError(
                f"{path} is tied to {min(others)}, so it cannot be exported with a change of its own",
                remedy="export experts that leave the output head alone, as sigmix trains them by default",
            )
        return self.placed[name]

    def layer(self, path: str) -> SVFLinear:
        """One matrix as the engine holds it, alone in memory, without its bias.

        Raises:
            BaseModelError, UnknownNameError, ExpertError: see `key`. CacheError: its cached factors are damaged.
        """
        weight = nn.Parameter(self.tensor(self.key(path)), requires_grad=False)
        like = self.linears[path]
        with torch.device("meta"):
            made: Any = Conv1D(like.nf, like.nx) if isinstance(like, Conv1D) else nn.Linear(1, 1, bias=False)
        if not isinstance(like, Conv1D):
            made.in_features, made.out_features = like.in_features, like.out_features
        made.weight, made.bias = weight, None
        return SVFLinear(made, "export", inference_mode=True)

    # ------------------------------------------------------------------ mixtures

    def z(self, mix: Mix, bank: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Effective z of the matrices that a mix moves, {path: float32 [r]}; its experts' fingerprints and sizes are
        checked (sketches: `check_sketches`, where the matrix is at hand).

        Raises:
            UnknownNameError: an expert that the bank does not have. FingerprintError: made on another base.
            ExpertError: it does not fit this base. ConfigError: weights that name other matrices.
        """
        experts = [bank[name] for name in mix.weights]
        for expert in experts:
            self.check(expert)
        every = {
            path: min(shape_of(module))
            for path, module in self.linears.items()
            if (path != self.head and path.startswith(self.root)) or any(path in expert.z for expert in experts)
        }
        found = mix.z(dict(zip(mix.weights, experts, strict=True)), every)
        moved = {path: z for path, z in found.items() if not bool((z == 1).all())}
        for path in moved:
            self.key(path)
        return moved

    def check(self, expert: Expert) -> None:
        """Raise unless an expert was made on this base and its matrices are there.

        Raises:
            FingerprintError, ExpertError: see `z`.
        """
        mine = expert.meta.get("base") or {}
        if mine.get("fingerprint") and (found := self.fingerprint()) != mine["fingerprint"]:
            kind = f" in {mine['dtype']}" if mine.get("dtype") else ""
            remedy = f"give the base that it was made on, --base {mine.get('name')}"
            dtype, quantization = dtype_and_quantization(mine.get("dtype"))
            if quantization is not None:
                remedy = "an export is of weights as they are stored: export experts that were made on these"
            elif mine.get("name") == self.name and dtype not in (None, self.dtype):
                remedy = f"read the base as it was when the expert was made: --dtype {mine['dtype']}"
            raise FingerprintError(
                f"expert {expert.name!r} was made on {mine.get('name', 'an unnamed base')}{kind} (fingerprint "
                f"{short(mine['fingerprint'])}), but this base is {self.name} in {self.dtype} (fingerprint "
                f"{short(found)})",
                remedy=remedy,
            )
        for path, z in expert.z.items():
            if path not in self.linears:
                near = UnknownNameError("matrix", path, self.linears).message
                raise ExpertError(f"expert {expert.name!r} does not fit {self.name}: {near}")
            rows, columns = shape_of(self.linears[path])
            if len(z) != min(rows, columns):
                raise ExpertError(
                    f"expert {expert.name!r} does not fit {self.name}: z of {path} has {len(z)} components, but the "
                    f"matrix is {rows}×{columns} and needs {min(rows, columns)}"
                )

    @staticmethod
    def check_sketches(experts: Iterable[Expert], path: str, layer: SVFLinear) -> Factors:
        """Raise unless the factors of a matrix are those that verified experts were trained in; returns them.

        Raises:
            ExpertError: another basis.
        """
        factors = factors_of(layer)
        for expert in experts:
            stored = (expert.meta.get("sketches") or {}).get(path)
            if stored is not None and expert.verified:
                found = sketch(path, matrix_of(layer), factors, expert.z[path])
                compare(expert.name, path, Sketch.from_json(stored), found)
        return factors

    def fingerprint(self) -> str:
        """As `sigmix.experts.fingerprint.fingerprint` of the loaded base, from one tensor at a time.

        A checkpoint whose tensors are not the model's own (experts of a mixture, fused on loading) is loaded whole.
        """
        if self._fingerprint is None:
            parts, seen = [], set()
            for name, parameter in self._parameters.items():
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                key = next((self.placed[one] for one in self._aliases(name) if one in self.placed), None)
                if key is None:
                    self._fingerprint = self._loaded_fingerprint()
                    break
                parts.append((name, tuple(parameter.shape), weight_digest(self.tensor(key))))
            else:
                self._fingerprint = combined(parts)
        return self._fingerprint

    @property
    def known_fingerprint(self) -> str | None:
        """`fingerprint` where it was worked out already."""
        return self._fingerprint

    def _loaded_fingerprint(self) -> str:
        from sigmix.experts.fingerprint import fingerprint

        return fingerprint(load_base(self.asked, self.dtype, "cpu")[0])

    def _aliases(self, name: str) -> set[str]:
        """All names of one parameter: more than one where weights are tied."""
        return self._names[id(self._parameters[name])] if name in self._parameters else {name}


def _meta(folder: Path, name: str) -> tuple[Any, Any]:
    """Config and model of a folder, without weights."""
    from transformers import AutoConfig

    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            if getattr(config, "quantization_config", None):
                raise BaseModelError(
                    f"{name} is a quantised checkpoint, whose weights cannot be composed",
                    remedy="give the original checkpoint in bfloat16, float16 or float32",
                )
    except BaseModelError:
        raise
    except Exception as error:
        raise BaseModelError(
            f"{name} is not a causal language model that transformers can build: {error}",
            remedy="give the folder of a decoder-only text model, or of a vision-language model",
        ) from error
    return config, empty_model(config)
