"""Merged weights kept by mix, within a memory budget, so that a mix that comes back is not composed again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sigmix.engine.modes import merged_weights
from sigmix.engine.packing import Pack, Packing
from sigmix.svf.layer import SVFLinear

BUDGET = 1 << 30
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
