"""Execution of mixtures: the choice between forms, and the switching of adapted layers.

Forms (exact ones differ by rounding only):

    base       W x, bit for bit
    merged     W'(z) x, one mixture for all rows: no cost per token, but W'(z) is composed first
    factored   U ((s⊙z_b) ⊙ (Vᵀx)), a mixture per row
    gain       the same on top of W x, for bases that are quantized or offloaded

The base weights are never written to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel, inject_adapter_in_model
from torch import nn

from sigmix.engine.cpu.kernels import Pack, Packing
from sigmix.engine.cpu.native import WITHOUT, check_decode_weights
from sigmix.engine.prefix_cache import Select
from sigmix.errors import ConfigError, UnknownNameError
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Flat, Layout, Mix
from sigmix.models.weights import weights_key
from sigmix.svf.config import SVFConfig
from sigmix.svf.layer import SVFLinear, prompt_only, set_state
from sigmix.svf.tuner import svf_layers
from sigmix.utils.lru import LRUCache

FORMS = ("merged", "factored", "gain")
"""Forms that can be requested."""

MERGED_BYTES = 1 << 30
"""Default budget of merged weights: five mixtures of the default base, two with packed copies."""

Z_BYTES = 64 << 20
"""Budget of the experts' vectors, and of the mixtures'."""

ROWS_PER_MIX = 24
"""Rows from which a mixture runs merged in a batch of its own. Measured on two cores, 64 rows, cached weights: two
mixtures take 0.77 of the factored form's time, three 0.94, six 1.23."""

BREAK_EVEN = 32
"""Forward passes of up to `PASS_TOKENS` tokens under one mixture after which its weights are merged: by then the
factored form has cost about as much extra as merging takes (0.5 s on two cores, default base). A short answer never
pays for merging, and a long one pays at most twice."""

PASS_TOKENS = 8
"""Tokens of a forward pass below which its time is that of reading the weights."""

MAX_COUNTED = 1000
"""Mixtures with a count of passes."""


@dataclass(frozen=True)
class Merged:
    """W'(z) by path of the layers that z changes, and their packed copies, see `Packing.merged`."""

    weights: Mapping[str, torch.Tensor]
    packs: Mapping[str, Pack] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        # a packed copy has the size of its source, but does not report it
        return sum(weight.nbytes * (2 if self.packs else 1) for weight in self.weights.values())


class Execution:
    """Adapted layers of a model under mixtures of a bank's experts.

    Args:
        model: a base model, or a PEFT model with SVF layers. bank: {name: Expert}.
        keep_merged, keep_packed: memory budgets in bytes, see `Engine`.
        decode_weights: see `Engine`. native: see `Packing`.

    Attributes:
        exact: form of mixed batches: "factored", or "gain" on a quantized or offloaded base, where nothing can be
            merged.
    """

    def __init__(
        self, model: Any, bank: Mapping[str, Expert], keep_merged: int, keep_packed: int,
        decode_weights: str | None = None, native: bool = False,
    ) -> None:  # fmt: skip
        check_decode_weights(decode_weights)
        self.model, self.bank, self.decode_weights = model, bank, decode_weights
        self.layers = adapted_layers(model)
        self.exact = "gain" if gain_only(self.layers) else "factored"
        if decode_weights:
            self._check_plain(decode_weights)
        with as_base(self.layers):  # a forward pass of the base finds the layers that share their input
            self.packing = Packing(model, self.layers, keep_packed, bool(decode_weights), native)
        self.layout = Layout({path: layer.r for path, layer in self.layers.items()})
        self.merged: LRUCache[tuple[Any, ...], Merged] = LRUCache(keep_merged)
        self._flats: LRUCache[str, tuple[Expert, Flat]] = LRUCache(Z_BYTES)
        self._mixed: LRUCache[Mix, tuple[dict[str, Flat], torch.Tensor]] = LRUCache(Z_BYTES)
        self._passes: dict[Mix, float] = {}  # unmerged passes under one mixture alone
        self._unmerged: Mix | None = None  # the mixture of the present state, if merging it may pay
        # going through the modules on every request would take longer than comparing the parameters
        self._parameters = [(module._parameters, name) for module in model.modules() for name in module._parameters]
        self._seen: tuple[Any, ...] = ()
        self._version = 0

    def _check_plain(self, decode_weights: str) -> None:
        """Raise `ConfigError` unless the base's own weights are in memory, on the CPU."""
        devices = {parameter.device.type for parameter in self.model.parameters()} - {"cpu"}
        if self.exact == "gain":
            what = "a base that is quantized or offloaded"
        elif devices:
            what = f"a base on {', '.join(sorted(devices))}"
        else:
            return
        raise ConfigError(
            f"{decode_weights} decode weights cannot be made of {what}",
            remedy=f"load the base on the CPU without quantization and offloading, or {WITHOUT}",
        )

    # ------------------------------------------------------------------ mixtures and weights

    def z(self, mix: Mix) -> torch.Tensor:
        """Return the effective z, float32 [R] over all layers in order.

        Raises:
            UnknownNameError: no such expert. FingerprintError, ExpertError: an expert that does not fit this base.
        """
        flats = {name: self._flat(name) for name in mix.weights}
        cached = self._mixed.get(mix)
        if cached is not None and all(cached[0][name] is flat for name, flat in flats.items()):
            return cached[1]
        z = mix.flat_z(self.layout, flats)
        self._mixed.put(mix, (flats, z), z.nbytes)
        return z

    def decoding(self, mix: Mix) -> Mix:
        """Return the mixture under which answer tokens are computed: its experts with positions "all".

        Raises:
            UnknownNameError: no such expert.
        """
        kept = {name: alpha for name, alpha in mix.weights.items() if self._expert(name).positions == "all"}
        return mix if len(kept) == len(mix.weights) else Mix(kept)

    def decodes_alike(self, mix: Mix) -> bool:
        """Return True if answer tokens are computed with the weights of prompt tokens."""
        answer = self.decoding(mix)
        return answer == mix and (self.decode_weights is None or answer != Mix.base())

    def _expert(self, name: str) -> Expert:
        if name not in self.bank:
            raise UnknownNameError("expert", name, self.bank, remedy="`sigmix experts list` shows what there is")
        return self.bank[name]

    def _flat(self, name: str) -> Flat:
        expert = self._expert(name)
        cached = self._flats.get(name)
        if cached is None or cached[0] is not expert:
            expert.check(self.model)
            cached = (expert, self.layout.flat(name, expert.z))
            self._flats.put(name, cached, cached[1].z.nbytes)
        return cached[1]

    def _weight_key(self, mix: Mix) -> tuple[Any, ...]:
        """Key of the model's weights under a mixture: base version, mixture and digests of its experts."""
        return self._version, mix.id, *(self.bank[name].digest for name in mix.weights)

    def prefix_key(self, mix: Mix) -> tuple[Any, ...]:
        """Key of the prefix cache for a sequence alone, outside `under`."""
        self._refresh()
        return self._weight_key(mix)

    def prefix_keys(self, mixes: Sequence[Mix]) -> list[tuple[Any, ...]]:
        """Keys of the prefix cache for the rows of the present batch, inside `under`."""
        keys = {mix: self._weight_key(mix) for mix in dict.fromkeys(mixes)}
        return [keys[mix] for mix in mixes]

    def _refresh(self) -> None:
        """Advance the version of the base if any parameter was replaced, cast, moved or edited in place."""
        present = (parameters[name] for parameters, name in self._parameters)
        seen = weights_key(parameter for parameter in present if parameter is not None)
        if seen != self._seen:
            self._seen = seen
            self._version += 1

    # ------------------------------------------------------------------ the choice of a form

    def choose(self, mixes: Sequence[Mix], form: str | None = None) -> str:
        """Return the form in which a batch under these mixtures runs.

        Args:
            form: a requested form; None: the base for the base, merged for one mixture where its weights are cached or
                merging them pays, else the mixed form.

        Raises:
            ConfigError: an unknown form, or the merged form for several mixtures.
        """
        unique = set(mixes)
        if form is not None:
            if form not in FORMS:
                raise ConfigError(f"unknown form {form!r}; one of {', '.join(FORMS)}")
            if form == "merged" and len(unique) > 1:
                raise ConfigError("the merged form holds one mixture at a time", remedy="form='factored' or 'gain'")
            return "base" if form == "merged" and unique == {Mix.base()} else form
        if len(unique) == 1:
            (mix,) = unique
            if mix == Mix.base() or bool((self.z(mix) == 1).all()):
                return "base"
            due = self._passes.get(mix, 0) >= BREAK_EVEN
            if self.exact == "factored" and (due or self._weight_key(mix) in self.merged):
                return "merged"
        return self.exact

    def batches(
        self, rows: Sequence[int], mixes: Sequence[Mix], batch_size: int, form: str | None = None
    ) -> Iterator[list[int]]:
        """Split rows into batches; unless a form is requested, mixtures that decode many rows get batches of their own.

        Args:
            rows: row numbers. mixes: of all rows, by number.
        """
        for start in range(0, len(rows), batch_size):
            part = list(rows[start : start + batch_size])
            decoding = {row: self.decoding(mixes[row]) for row in part}
            distinct = dict.fromkeys(decoding.values())
            if form is None and self.exact == "factored" and 1 < len(distinct) <= len(part) / ROWS_PER_MIX:
                for mix in distinct:
                    yield [row for row in part if decoding[row] == mix]
            else:
                yield part

    def _count(self, mix: Mix, tokens: int) -> None:
        if len(self._passes) > MAX_COUNTED:
            self._passes.clear()
        self._passes[mix] = self._passes.get(mix, 0) + max(tokens / PASS_TOKENS, 1)

    def count_step(self, tokens: int) -> bool:
        """Count a forward pass in the present state; return True if merging its mixture now pays."""
        if self._unmerged is None:
            return False
        self._count(self._unmerged, tokens)
        return self._passes[self._unmerged] >= BREAK_EVEN

    # ------------------------------------------------------------------ switching

    @contextmanager
    def under(
        self, mixes: Sequence[Mix], form: str | None = None, tokens: int = 0, decoding: bool = False
    ) -> Iterator[Select | None]:
        """Compute row b of a batch under ``mixes[b]`` inside this context.

        Args:
            form: see `choose`. tokens: prompt tokens about to be read, which may make merging pay.
            decoding: answer tokens are decoded: with the `decode_weights`, if all rows are under the base.

        Yields:
            A function that restricts the state to some rows; None if all rows have the same weights.
        """
        self._refresh()
        z = {mix: self.z(mix) for mix in dict.fromkeys(mixes)}
        only = mixes[0] if len(z) == 1 and form is None and self.exact == "factored" else None
        if only is not None and only != Mix.base() and tokens:
            self._count(only, tokens)
        chosen = self.choose(mixes, form)
        before, self._unmerged = self._unmerged, only if chosen == "factored" else None
        try:
            with self._state(chosen, mixes, z, decoding) as select:
                yield select
        finally:
            self._unmerged = before

    @contextmanager
    def other_base(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Replace weights of the base inside this context, outside `under`; its own are put back afterwards.

        Args:
            weights: by path of an adapted layer, in the layout of its base layer.
        """
        parameters = {path: self.layers[path].get_base_layer().weight for path in weights}
        own = {path: parameter.data for path, parameter in parameters.items()}
        # `_refresh` would take a tensor at the address of one that was freed for the same weights
        self._version += 1
        try:
            for path, parameter in parameters.items():
                parameter.data = weights[path]
            yield
        finally:
            for path, parameter in parameters.items():
                parameter.data = own[path]
            self._version += 1

    @contextmanager
    def one_pass(self, mixes: Sequence[Mix], is_prompt: torch.Tensor | bool = True) -> Iterator[Select | None]:
        """Compute row b of a pass over a prompt and its answer under ``mixes[b]``, and `decoding` on answer tokens.

        Args:
            is_prompt: tokens of the prompts, bool [B, T].

        Yields:
            See `under`.
        """
        answers = [self.decoding(mix) for mix in mixes]
        if answers == list(mixes):
            with self.under(mixes) as select:
                yield select
            return
        self._refresh()
        table, answer_table = (torch.stack([self.z(mix) for mix in part]) for part in (mixes, answers))
        with (
            as_rows(self.layers, table, self.exact, answer_table) as select,
            self.packing.using(None, self.exact),
            prompt_only(self.layers, is_prompt),
        ):
            yield select

    @contextmanager
    def _state(
        self, form: str, mixes: Sequence[Mix], z: Mapping[Mix, torch.Tensor], decoding: bool
    ) -> Iterator[Select | None]:
        if form == "base":
            int8 = decoding and self.decode_weights is not None and set(z) == {Mix.base()}
            with as_base(self.layers), self.packing.using(None, None, int8):
                yield None
        elif form == "merged":
            merged = self._merge(mixes[0], z[mixes[0]])
            with as_merged(self.layers, merged.weights), self.packing.using(merged.packs, None):
                yield None
        else:
            table = torch.stack([z[mix] for mix in mixes])
            with as_rows(self.layers, table, form) as select, self.packing.using(None, form):
                yield select

    def _merge(self, mix: Mix, z: torch.Tensor) -> Merged:
        key = self._weight_key(mix)
        merged = self.merged.get(key)
        if merged is None:
            weights = merged_weights(self.layers, self.layout.split(z))
            merged = Merged(weights, self.packing.merged(weights))
            self.merged.put(key, merged, merged.nbytes)
            self._passes.pop(mix, None)
        return merged


# ------------------------------------------------------------------ states of adapted layers


ENGINE_ADAPTER = "sigmix"


def adapted_layers(model: nn.Module) -> dict[str, SVFLinear]:
    """Return the model's SVF layers by base path; inject them if it has none."""
    layers = svf_layers(model)
    if not layers and not isinstance(model, PeftModel):
        inject_adapter_in_model(SVFConfig(target_modules="all-linear", inference_mode=True), model, ENGINE_ADAPTER)
        layers = svf_layers(model)
        for layer in layers.values():  # without an adapter, the model's own forward pass is exactly the base's
            layer.delete_adapter(ENGINE_ADAPTER)
    return layers


def gain_only(layers: Mapping[str, SVFLinear]) -> bool:
    """Return True if any layer is quantized or offloaded, so that nothing can be merged or factored."""
    return any(layer.gain_only for layer in layers.values())


def merging_pays(layers: Mapping[str, SVFLinear], tokens: int) -> bool:
    """Return True if reading ``tokens`` tokens in the factored form adds more multiply-adds than W'(z) takes."""
    sizes = [(layer.r, layer.out_features, layer.in_features) for layer in layers.values()]
    return tokens * sum(r * (m + n) - m * n for r, m, n in sizes) > sum(r * m * n for r, m, n in sizes)


def merged_weights(layers: Mapping[str, SVFLinear], z: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Compose W'(z) by path, for the layers where z [r] differs from 1."""
    return {
        path: layer.merged_weight(z[path].detach().to(layer.device))
        for path, layer in layers.items()
        if path in z and not bool((z[path] == 1).all())
    }


@contextmanager
def as_base(layers: Mapping[str, SVFLinear]) -> Iterator[None]:
    """Compute the base's W x inside this context, bit for bit."""
    with _restored(layers):
        for layer in layers.values():
            layer.unmerge()
            set_state(layer, _disable_adapters=True)
        yield


@contextmanager
def as_merged(layers: Mapping[str, SVFLinear], weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Compute with given weights W'(z) by path inside this context, with the base's where there are none."""
    with _restored(layers):
        for path, layer in layers.items():
            layer.row_z = None
            if path in weights:
                layer._disable_adapters = False
                layer.place(weights[path])
            else:
                layer.unmerge()
                layer._disable_adapters = True
        yield


@contextmanager
def as_expert(layers: Mapping[str, SVFLinear], z: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Compute all rows under z [r] by path inside this context: merged, or in the gain form if need be."""
    if not gain_only(layers):
        with as_merged(layers, merged_weights(layers, z)):
            yield
        return
    one = [z[path].detach().cpu() if path in z else torch.ones(layer.r) for path, layer in layers.items()]
    with as_rows(layers, torch.cat(one)[None], "gain"):
        yield


@contextmanager
def as_rows(
    layers: Mapping[str, SVFLinear], table: torch.Tensor, form: str, answer_table: torch.Tensor | None = None
) -> Iterator[Select]:
    """Compute row b of a batch under z = table[b] inside this context.

    Args:
        table: float32 [B, R], z over all layers in order.
        answer_table: z of answer tokens, see `prompt_only`.
    """
    with _restored(layers):
        gains = (table - 1).to(next(iter(layers.values())).dtype)
        sizes = [layer.r for layer in layers.values()]
        for layer in layers.values():
            layer.unmerge()
            set_state(layer, _disable_adapters=False, form=form)

        def select(rows: list[int] | None) -> None:
            z, gain = (table, gains) if rows is None else (table[rows], gains[rows])
            for layer, own, shift in zip(layers.values(), z.split(sizes, 1), gain.split(sizes, 1), strict=True):
                layer.set_rows(own.to(layer.device), shift.to(layer.device, layer.dtype))
            if answer_table is not None:
                part = answer_table if rows is None else answer_table[rows]
                for layer, own in zip(layers.values(), part.split(sizes, 1), strict=True):
                    own = own.to(layer.device)
                    layer.answer_row_z = own if layer.row_z is None or not torch.equal(own, layer.row_z) else None

        select(None)
        yield select


@contextmanager
def _restored(layers: Mapping[str, SVFLinear]) -> Iterator[None]:
    names = ("_disable_adapters", "form", "row_z", "answer_row_z")
    before = {path: {name: getattr(layer, name) for name in names} for path, layer in layers.items()}
    merged = {path: layer.get_base_layer().weight.data for path, layer in layers.items() if layer._kept is not None}
    try:
        yield
    finally:
        for path, layer in layers.items():
            layer.unmerge()
            set_state(layer, **before[path])
            if path in merged:
                layer.place(merged[path])
