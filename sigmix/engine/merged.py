"""Merged weights kept by mix, within a memory budget, so that a mix that comes back is not composed again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from sigmix.svf.layer import SVFLinear

BUDGET = 1 << 30
"""Bytes of merged weights that an engine keeps by default: four mixes of the default base in bfloat16."""


class MergedWeights:
    """W'(z) of all layers under the mixes used last.

    Args:
        layers: the model's adapted layers. budget: bytes to keep; 0 keeps nothing.
    """

    def __init__(self, layers: Mapping[str, SVFLinear], budget: int = BUDGET) -> None:
        self.layers, self.budget = layers, budget
        self._kept: OrderedDict[Any, dict[str, torch.Tensor]] = OrderedDict()

    @property
    def bytes(self) -> int:
        """Of all that is kept."""
        return sum(_size(weights) for weights in self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Any, z: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """{path: W'(z)} for the layers that z moves, composed unless the key's are kept.

        Args:
            key: names the mix and the experts' values; equal keys mean equal z.
        """
        bases = [(layer.matrix(), layer.get_base_layer().weight._version) for layer in self.layers.values()]
        # a model that was cast, moved or edited in place has other weights
        key = (key, tuple((matrix.data_ptr(), matrix.dtype, version) for matrix, version in bases))
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = {
            path: layer.merged(z[path].detach().to(layer.matrix().device))
            for path, layer in self.layers.items()
            if path in z and not bool((z[path] == 1).all())
        }
        size = _size(made)
        if size <= self.budget:
            while self._kept and self.bytes + size > self.budget:
                self._kept.popitem(last=False)
            self._kept[key] = made
        return made

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()


def _size(weights: Mapping[str, torch.Tensor]) -> int:
    return sum(weight.nbytes for weight in weights.values())
