"""Base checkpoint of an export, with the checks of `Expert.check` on weights that are read one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sigmix.errors import ConfigError, ExpertError, FingerprintError, UnknownNameError
from sigmix.experts.expert import Expert
from sigmix.experts.fingerprint import Sketch, combined, compare, fingerprint, mismatch, sketch
from sigmix.experts.mix import Mix
from sigmix.models.default import DEFAULT
from sigmix.models.loading import load_base
from sigmix.models.weights import shape
from sigmix.svf.checkpoint import Checkpoint
from sigmix.svf.decomposition import Factors
from sigmix.svf.layer import SVFLinear
from sigmix.svf.linears import dtype_and_quantization, factors_of, matrix_of
from sigmix.svf.tuner import target_layers

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
HALF = (torch.bfloat16, torch.float16)


def dtype_of_experts(experts: Iterable[Expert]) -> str | None:
    """Return the dtype that all verified experts recorded of their base, such as "bfloat16" or "bfloat16 in int8"."""
    dtypes = {expert.base.get("dtype") for expert in experts if expert.verified}
    return dtypes.pop() if len(dtypes) == 1 else None


def check_positions(experts: Iterable[Expert]) -> None:
    """Raise `ConfigError` if experts act on prompt tokens only: exported weights hold for every token."""
    experts = list(experts)
    prompt = ", ".join(expert.name for expert in experts if expert.positions == "prompt")
    every = ", ".join(expert.name for expert in experts if expert.positions != "prompt")
    if not prompt:
        return
    kinds = f"positions 'prompt' ({prompt}) and 'all' ({every})" if every else f"positions 'prompt' ({prompt})"
    raise ConfigError(
        f"experts with {kinds} cannot be exported: a merged checkpoint, a LoRA and a GGUF adapter change the weights "
        "for every token, and z of these acts on prompt tokens only",
        remedy="serve the mixture with sigmix serve or Engine, or train with --positions all"
        + (f", or export {every} alone" if every else ""),
    )


class BaseCheckpoint(Checkpoint):
    """A `Checkpoint` that experts are checked against and exported with."""

    def __init__(self, base: str | Path = DEFAULT, dtype: str | None = None) -> None:
        super().__init__(base, dtype)
        self.known_fingerprint: str | None = None  # `fingerprint`, once it was computed

    @property
    def dtype_name(self) -> str:
        """`dtype` as experts and configs write it, such as "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    def adopt_dtype(self, experts: Iterable[Expert]) -> str | None:
        """Read the weights in the dtype of these experts' base from now on.

        Nothing changes with a dtype given, or where the weights are stored in one that loading does not round.

        Returns:
            The dtype, or None where nothing changes.
        """
        name = dtype_of_experts(experts)
        if self.cast is not None or name not in DTYPES:
            return None
        wanted = DTYPES[name]
        lossless = wanted in (self.dtype, torch.float64) or (wanted == torch.float32 and self.dtype in HALF)
        if lossless and self.stored_in(self.dtype):
            return None
        self.cast, self.known_fingerprint = wanted, None
        return name

    def matrix_key(self, path: str) -> str:
        """Return the checkpoint's name of a matrix that an export changes.

        Raises:
            UnknownNameError: no such linear layer. BaseModelError: see `Checkpoint.key`.
            ExpertError: it is tied to another weight, so that it cannot change alone.
        """
        if path not in self.linears:
            raise UnknownNameError("matrix", path, self.linears, remedy=f"name a linear layer of {self.name}")
        key = self.key(f"{path}.weight")
        if others := set(self.tied(f"{path}.weight")) - {f"{path}.weight"}:
            raise ExpertError(
                f"{path} is tied to {min(others)}, so it cannot be exported with a change of its own",
                remedy="export experts without the output head, as sigmix trains them by default",
            )
        return key

    def layer(self, path: str) -> SVFLinear:
        """Load one adapted layer without its bias.

        Raises:
            BaseModelError, UnknownNameError, ExpertError: see `matrix_key`. CacheError: its cached factors are damaged.
        """
        weight = nn.Parameter(self.tensor(self.matrix_key(path)), requires_grad=False)
        rows, columns = shape(self.linears[path])
        with torch.device("meta"):
            conv = isinstance(self.linears[path], Conv1D)
            layer = Conv1D(rows, columns) if conv else nn.Linear(columns, rows, bias=False)
        layer.weight, layer.bias = weight, None
        return SVFLinear(layer, "export", inference_mode=True)

    # ------------------------------------------------------------------ experts

    def z(self, mix: Mix, bank: Mapping[str, Expert]) -> dict[str, torch.Tensor]:
        """Return {path: float32 z [r]} of the matrices that a mix changes, after `check` of its experts.

        Raises:
            UnknownNameError: an expert that the bank lacks. FingerprintError, ExpertError: see `check`.
            ConfigError: weights for other matrices, or an expert with positions "prompt".
        """
        experts = {name: bank[name] for name in mix.weights}
        check_positions(experts.values())
        for expert in experts.values():
            self.check(expert)
        paths = set(target_layers(self.model)).union(*(expert.z for expert in experts.values()))
        ranks = {path: min(shape(layer)) for path, layer in self.linears.items() if path in paths}
        changed = {path: z for path, z in mix.z(experts, ranks).items() if not bool((z == 1).all())}
        for path in changed:
            self.matrix_key(path)
        return changed

    def check(self, expert: Expert) -> None:
        """Raise unless an expert was made on this base and fits its matrices; sketches: see `check_sketches`.

        Raises:
            FingerprintError: another base, or a quantized one. ExpertError: missing matrices, other sizes.
        """
        recorded = expert.base
        dtype, quantization = dtype_and_quantization(recorded.get("dtype"))
        if quantization:
            raise FingerprintError(
                f"expert {expert.name!r} was trained on {recorded.get('name', 'a base')} quantized to {quantization}; "
                "exports are made of unquantized weights",
                remedy=f"use it with sigmix (--quantization {quantization}), or train one on the base in {dtype}",
            )
        if expert.verified and (own := self.fingerprint()) != recorded["fingerprint"]:
            error = mismatch(expert.name, recorded, {"name": self.name, "dtype": self.dtype_name, "fingerprint": own})
            if recorded.get("name") == self.name and dtype not in (None, self.dtype_name):
                error = FingerprintError(error.message, remedy=f"read the base in that dtype: --dtype {dtype}")
            raise error
        expert.layers(self.model)

    @staticmethod
    def check_sketches(experts: Iterable[Expert], path: str, layer: SVFLinear) -> Factors:
        """Return a layer's factors after a comparison with the sketches of verified experts.

        Raises:
            ExpertError: they were trained in another basis.
        """
        factors = factors_of(layer)
        for expert in experts:
            stored = (expert.meta.get("sketches") or {}).get(path)
            if stored is not None and expert.verified and path in expert.z:
                current = sketch(path, matrix_of(layer), factors, expert.z[path])
                compare(expert.name, path, Sketch.from_json(stored), current)
        return factors

    def fingerprint(self) -> str:
        """Return the base's fingerprint; unless `complete`, the base is loaded whole for it."""
        if self.known_fingerprint is None:
            if self.complete:
                self.known_fingerprint = combined(self.digests())
            else:
                self.known_fingerprint = fingerprint(load_base(self.base, self.dtype, "cpu")[0])
        return self.known_fingerprint
