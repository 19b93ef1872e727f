"""The states that an engine puts its model in: the base, one merged mix, or a mix for each row of a batch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, inject_adapter_in_model
from torch import nn

from sigmix.engine.cpu_kernels import Pack, Packing
from sigmix.errors import ConfigError, UnknownNameError
from sigmix.experts.mix import Flat, Layout, Mix
from sigmix.svf.config import SVFConfig
from sigmix.svf.layer import FORMS, SVFLinear
from sigmix.svf.tuner import svf_layers

if TYPE_CHECKING:
    from sigmix.engine.truncation import Truncation

FLATS = 128
"""Experts whose vectors are kept; a search that moves z makes new ones all the time."""


MIXED = 64
"""Mixes whose z is kept, float32 [R] each: a batch is put together anew whenever a request joins it."""


class States:
    """A model's adapted layers under mixes of a bank's experts.

    Args:
        model: a base, or a PEFT model with SVF layers. bank: {name: Expert}.
        keep_merged, keep_packed: memory budgets, see `Engine`.

    Attributes:
        truncation: what the truncated form computes by; None: all components of every matrix.
        mixed: the exact form of mixed batches, "factored", or "gain" where the base is quantised or offloaded; then
            nothing is merged either.
    """

    def __init__(self, model: Any, bank: Mapping[str, Any], keep_merged: int, keep_packed: int) -> None:
        self.model, self.bank = model, bank
        self.layers = adapted_layers(model)
        self.mixed = "gain" if gain_only(self.layers) else "factored"
        with as_base(self.layers):  # looking for layers with one input runs a pass of the base
            self.packing = Packing(model, self.layers, keep_packed)
        self.merged = MergedWeights(self.layers, keep_merged, self.packing)
        self.layout = Layout({path: layer.r for path, layer in self.layers.items()})
        self.truncation: Truncation | None = None
        self._mixed: OrderedDict[Mix, tuple[dict[str, Flat], torch.Tensor]] = OrderedDict()
        self._flats: dict[str, tuple[Any, Flat]] = {}  # by name, with the expert that it is of

    def z(self, mix: Mix) -> torch.Tensor:
        """Effective z, float32 [R] over all layers in their order.

        Raises:
            UnknownNameError: no such expert. FingerprintError, ExpertError: an expert that does not fit this base.
        """
        flats = {name: self._flat(name) for name in mix.weights}
        known = self._mixed.get(mix)
        if known is not None and all(known[0][name] is flat for name, flat in flats.items()):
            self._mixed.move_to_end(mix)
            return known[1]
        made = mix.flat_z(self.layout, flats)
        self._mixed[mix] = flats, made
        if len(self._mixed) > MIXED:
            self._mixed.popitem(last=False)
        return made

    def _flat(self, name: str) -> Flat:
        if name not in self.bank:
            raise UnknownNameError("expert", name, self.bank, remedy="`sigmix experts list` shows what there is")
        expert = self.bank[name]
        known = self._flats.get(name)
        if known is None or known[0] is not expert:
            expert.check(self.model)
            known = (expert, self.layout.flat(name, expert.z))
            self._flats.pop(name, None)
            while len(self._flats) >= FLATS:
                self._flats.pop(next(iter(self._flats)))
            self._flats[name] = known
        return known[1]

    def truncates(self, mix: Mix) -> bool:
        """Whether the truncated form can compute a mix: its plan was fitted for these experts as they are."""
        plan = self.truncation
        return plan is None or all(plan.experts.get(name) == self.bank[name].digest for name in mix.weights)

    def key(self, mix: Mix) -> tuple[str, ...]:
        """The mix's id and its experts' digests."""
        return mix.id, *(self.bank[name].digest for name in mix.weights)

    @contextmanager
    def under(self, mixes: list[Mix], form: str | None) -> Iterator[Any]:
        """Inside, the model computes row b of a batch under ``mixes[b]``; see `Engine.under`.

        One mix is merged, which costs nothing per token. Several are factored: with few rows to a mix, a pass for each
        mix costs more than the factored form's extra work (`Engine.generate` takes mixes with many rows apart).
        """
        if form is not None and form not in FORMS:
            raise ConfigError(f"unknown form {form!r}; one of {', '.join(FORMS)}")
        if form is None and self.mixed == "gain" and set(mixes) != {Mix.base()}:
            form = "gain"
        if len(set(mixes)) == 1 and form in (None, "merged"):
            if mixes[0] == Mix.base():
                with as_base(self.layers), self.packing.using(None, None):
                    yield None
                return
            z = self.layout.split(self.z(mixes[0]))  # first, because it checks the experts' names
            made = self.merged.get(self.key(mixes[0]), z)
            with as_merged(self.layers, made.weights), self.packing.using(made.packs, None):
                yield None
            return
        if form == "merged":
            raise ConfigError("the merged form holds one mix at a time", remedy="use form='factored' or 'gain'")
        unique = {mix: self.z(mix) for mix in dict.fromkeys(mixes)}  # the truncated form needs the checks only
        form = form or self.mixed
        if form == "truncated" and self.truncation is not None:
            alphas = self._alphas(self.truncation, list(unique))
            places = [list(unique).index(mix) for mix in mixes]
            with (
                as_base(self.layers),
                self.packing.using(None, None),
                self.truncation.using(self.packing, alphas, places) as keep,
            ):
                yield keep
            return
        table = torch.stack([unique[mix] for mix in mixes])
        with as_rows(self.layers, table, form) as keep, self.packing.using(None, form):
            yield keep

    def _alphas(self, plan: Truncation, mixes: list[Mix]) -> torch.Tensor:
        """[D, K, M], weights of mixes over a plan's experts."""
        names = list(plan.experts)
        found = torch.zeros(len(mixes), len(names), len(self.layers), dtype=torch.float64)
        for number, mix in enumerate(mixes):
            for name, row in zip(mix.weights, self.layout.alphas(mix.weights, mix.alpha), strict=True):
                if plan.experts.get(name) != self.bank[name].digest:
                    raise ConfigError(
                        f"the truncation was fitted for {', '.join(names)}, not for the expert {name} as it is now",
                        remedy="fit it anew with all experts that are mixed",
                    )
                found[number, names.index(name)] = row
        return found


# --- Switching the adapted layers of a model between the base, one merged z, and a z per row; nothing is ever rewritte


ENGINE_ADAPTER = "sigmix"


def adapted_layers(model: nn.Module, targets: list[str] | str = "all-linear") -> dict[str, SVFLinear]:
    """The model's SVF layers by base path, injected if it has none."""
    layers = svf_layers(model)
    if not layers and not isinstance(model, PeftModel):
        inject_adapter_in_model(SVFConfig(target_modules=targets, inference_mode=True), model, ENGINE_ADAPTER)
        layers = svf_layers(model)
    return layers


@contextmanager
def as_base(layers: Mapping[str, SVFLinear]) -> Iterator[None]:
    """Inside, the layers compute the base's W x, bit for bit."""
    with _restored(layers):
        for layer in layers.values():
            layer.unmerge()
            layer._disable_adapters = True
        yield


def merged_weights(layers: Mapping[str, SVFLinear], z: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """W'(z) by path, for the layers that z [r] moves at all."""
    return {
        path: layer.merged_weight(z[path].detach().to(layer.device))
        for path, layer in layers.items()
        if path in z and not bool((z[path] == 1).all())
    }


@contextmanager
def as_merged(layers: Mapping[str, SVFLinear], weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, the layers hold given weights W'(z), and the base where there is none. The base comes back after."""
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


def gain_only(layers: Mapping[str, SVFLinear]) -> bool:
    """Whether any layer is quantised or offloaded, so that nothing can be merged or factored."""
    return any(layer.gain_only for layer in layers.values())


@contextmanager
def as_expert(layers: Mapping[str, SVFLinear], z: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, all rows are computed under z [r] by path: merged, or in the gain form where nothing can be merged."""
    if not gain_only(layers):
        with as_merged(layers, merged_weights(layers, z)):
            yield
        return
    one = [z[path].detach().cpu() if path in z else torch.ones(layer.r) for path, layer in layers.items()]
    with as_rows(layers, torch.cat(one)[None], "gain"):
        yield


@contextmanager
def as_rows(layers: Mapping[str, SVFLinear], table: torch.Tensor, form: str) -> Iterator[Any]:
    """Inside, row b of a batch is computed under z = table[b].

    Args:
        table: float32 [B, R], z over all layers in their order.

    Yields:
        A function that keeps only the rows with given indices; None: all again.
    """
    with _restored(layers):
        gains = (table - 1).to(next(iter(layers.values())).dtype)
        for layer in layers.values():
            layer.unmerge()
            layer._disable_adapters = False
            layer.form = form

        def keep(indices: list[int] | None) -> None:
            z, gain = (table, gains) if indices is None else (table[indices], gains[indices])
            sizes = [layer.r for layer in layers.values()]
            for layer, own, shift in zip(layers.values(), z.split(sizes, 1), gain.split(sizes, 1), strict=True):
                layer.set_rows(own.to(layer.device), shift.to(layer.device, layer.dtype))

        keep(None)
        yield keep


@contextmanager
def _restored(layers: Mapping[str, SVFLinear]) -> Iterator[None]:
    before = {path: (layer._disable_adapters, layer.form, layer.row_z) for path, layer in layers.items()}
    try:
        yield
    finally:
        for path, layer in layers.items():
            layer.unmerge()
            layer._disable_adapters, layer.form, layer.row_z = before[path]


# --- Merged weights kept by mix, within a memory budget, so that a mix that comes back is not composed again.


MERGED_BYTES = 1 << 30
"""Bytes of merged weights that an engine keeps by default: five mixes of the default base, two with packed copies."""


@dataclass(frozen=True)
class Merged:
    """W'(z) of the layers that z moves, and packed copies where these are used, see `Packing.merged`."""

    weights: Mapping[str, torch.Tensor]
    packs: Mapping[str, Pack] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        # a packed copy is as large as what it was made of, but does not say so
        return sum(weight.nbytes * (2 if self.packs else 1) for weight in self.weights.values())


class MergedWeights:
    """W'(z) of all layers under the mixes used last.

    Args:
        layers: the model's adapted layers. budget: bytes to keep; 0 keeps nothing. packing: of the same model.
    """

    def __init__(self, layers: Mapping[str, SVFLinear], budget: int, packing: Packing) -> None:
        self.layers, self.budget, self.packing = layers, budget, packing
        self._kept: OrderedDict[Any, Merged] = OrderedDict()

    @property
    def bytes(self) -> int:
        """Of all that is kept."""
        return sum(made.bytes for made in self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Any, z: Mapping[str, torch.Tensor]) -> Merged:
        """What z makes of the layers, composed unless it is kept under this key.

        Args:
            key: names the mix and the experts' values; equal keys mean equal z.
        """
        key = self._full(key)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        weights = merged_weights(self.layers, z)
        made = Merged(weights, self.packing.merged(weights))
        if made.bytes <= self.budget:
            while self._kept and self.bytes + made.bytes > self.budget:
                self._kept.popitem(last=False)
            self._kept[key] = made
        return made

    def has(self, key: Any) -> bool:
        """Whether `get` has it at hand."""
        return bool(self._kept) and self._full(key) in self._kept

    def _full(self, key: Any) -> Any:
        # a model that was cast, moved or edited in place has other weights
        bases = [(layer.matrix(), layer.get_base_layer().weight._version) for layer in self.layers.values()]
        return key, tuple((matrix.data_ptr(), matrix.dtype, version) for matrix, version in bases)

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
