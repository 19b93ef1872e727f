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
from sigmix.experts.expert import Expert
from sigmix.experts.fingerprint import Sketch, combined, compare, short, sketch
from sigmix.experts.mix import Mix
from sigmix.models.digests import weight_digest
from sigmix.models.loading import load_base, locate
from sigmix.models.memory import empty_model
from sigmix.models.multimodal import backbone
from sigmix.svf.checkpoint import DTYPES, ON_DISK, cast_as_loaded, loaded_dtype, placed, widens
from sigmix.svf.decomposition import Factors
from sigmix.svf.layer import SVFLinear
from sigmix.svf.linears import LINEAR, dtype_and_quantization, factors_of, matrix_of, shape_of
from sigmix.utils.cache import MANIFEST, verify
from sigmix.utils.logging import quiet
from sigmix.utils.safetensors import Shards


def dtype_of_experts(experts: Iterable[Expert]) -> str | None:
    """What these experts recorded as the dtype of their base, if they all have the same; of verified ones only.

    An expert of a quantised base names both, such as "bfloat16 in int8".
    """
    made = {(expert.meta.get("base") or {}).get("dtype") for expert in experts if expert.verified}
    return made.pop() if len(made) == 1 else None


OLD = "save it anew: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new folder)"


class Source:
    """A base folder, opened.

    Args:
        base: as `sigmix.models.loading.load_base` takes it.
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
        self._owner = {key: name for name, key in self.placed.items()}
        self._parameters = dict(sorted(self.model.named_parameters(remove_duplicate=False)))
        self._names: dict[int, set[str]] = {}
        for name, parameter in self._parameters.items():
            self._names.setdefault(id(parameter), set()).add(name)

    def adopt(self, experts: Iterable[Expert]) -> str | None:
        """Read the weights in the dtype in which these experts' base was, unless they are stored so that loading rounds
        none of them: their base is the rounded one. A checkpoint in several dtypes is read in one, as it is loaded.

        Returns:
            That dtype, or None where nothing changes.
        """
        name = dtype_of_experts(experts)
        if self.cast is not None or name not in DTYPES or (widens(self.dtype, name) and self._stored_in(self.dtype)):
            return None
        self.cast = DTYPES[name]
        self._fingerprint = None
        return name

    def _stored_in(self, dtype: str) -> bool:
        """Whether loading in this dtype would change no float of the checkpoint."""
        stored = {key: ON_DISK.get(self.shards.entry(key).dtype) for key in self.shards}
        return all(
            kind is None or DTYPES[kind] == loaded_dtype(self.model, self._owner.get(key, key), DTYPES[dtype])
            for key, kind in stored.items()
        )

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
        """A tensor of the checkpoint, floats as loading in the dtype that was asked for makes them."""
        tensor = self.shards.tensor(key)
        return tensor if self.cast is None else cast_as_loaded(self.model, self._owner.get(key, key), tensor, self.cast)

    def read_as(self, key: str) -> torch.dtype | None:
        """The dtype of `tensor`, without reading it; None: as it is stored."""
        if self.cast is None or self.shards.entry(key).dtype not in ON_DISK:
            return None
        return loaded_dtype(self.model, self._owner.get(key, key), self.cast)

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
        check_kind(expert.name, mine)
        if mine.get("fingerprint") and (found := self.fingerprint()) != mine["fingerprint"]:
            raise foreign(expert.name, mine, self.name, self.dtype, found)
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
        """As `sigmix.experts.fingerprint.fingerprint` of the loaded base, from one tensor at a time; `loads_whole`."""
        if self._fingerprint is None:
            own = self._own()
            if None in own.values():
                self._fingerprint = self._loaded_fingerprint()
            else:
                self._fingerprint = combined(
                    (name, tuple(self._parameters[name].shape), weight_digest(self.tensor(str(key))))
                    for name, key in own.items()
                )
        return self._fingerprint

    @property
    def loads_whole(self) -> bool:
        """Whether `fingerprint` has to load the base: a checkpoint's tensors are not all the model's own (experts of a
        mixture are fused on loading)."""
        return None in self._own().values()

    def _own(self) -> dict[str, str | None]:
        """{parameter, tied ones once: its tensor in the checkpoint, None where it has none of its own}."""
        found: dict[str, str | None] = {}
        seen: set[int] = set()
        for name, parameter in self._parameters.items():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[name] = next((self.placed[one] for one in self._aliases(name) if one in self.placed), None)
        return found

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


# --- Why an expert is not one of the base that is exported.


def check_kind(expert: str, mine: Mapping[str, Any]) -> None:
    """Raise `FingerprintError` if the base that an expert recorded was quantised as it was loaded.

    Args:
        expert: its name. mine: ``base`` of its metadata; its dtype is then "bfloat16 in int8", say.
    """
    kind, quantised = dtype_and_quantization(mine.get("dtype"))
    if quantised:
        raise FingerprintError(
            f"expert {expert!r} belongs to {mine.get('name', 'a base')} quantised to {quantised}, whose weights are "
            "others than those that an export is made of, so it cannot be exported",
            remedy=f"use it on that base with sigmix (--quantization {quantised}), or train one on the base in {kind} "
            "to export it",
        )


def foreign(expert: str, mine: Mapping[str, Any], name: str, dtype: str, found: str) -> FingerprintError:
    """Another base.

    Args:
        expert, mine: as in `check_kind`. name, dtype, found: of the base at hand; ``found`` is its fingerprint.
    """
    kind = f" in {mine['dtype']}" if mine.get("dtype") else ""
    remedy = f"give the base that it was made on, --base {mine.get('name')}"
    if mine.get("name") == name and mine.get("dtype") not in (None, dtype):
        remedy = f"read the base as it was when the expert was made: --dtype {mine['dtype']}"
    return FingerprintError(
        f"expert {expert!r} was made on {mine.get('name', 'an unnamed base')}{kind} (fingerprint "
        f"{short(mine['fingerprint'])}), but this base is {name} in {dtype} (fingerprint {short(found)})",
        remedy=remedy,
    )
