"""The states that an engine puts its model in: the base, one merged mix, or a mix for each row of a batch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from sigmix.engine.merged import MergedWeights
from sigmix.engine.modes import adapted_layers, as_base, as_merged, as_rows, gain_only
from sigmix.engine.packing import Packing
from sigmix.engine.truncation import Truncation
from sigmix.errors import ConfigError, UnknownNameError
from sigmix.experts.layout import Flat, Layout
from sigmix.experts.mix import Mix
from sigmix.svf.layer import FORMS

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
