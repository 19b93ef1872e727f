"""Experts and mixtures as one vector over all adapted matrices of a model, so that mixing costs a few vector sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sigmix.errors import ConfigError, ExpertError, UnknownNameError
from sigmix.svf.gains import mix_z

Tensor = torch.Tensor


@dataclass(frozen=True)
class Flat:
    """z of one expert: float32 [R], 1 where it adapts nothing, and which of the M matrices it adapts."""

    z: Tensor
    adapted: tuple[bool, ...]


class Layout:
    """Where each matrix's z lies in the vector [R] of a whole model, R = Σ r.

    Args:
        layers: {matrix path: r}, all that the model has adapted.
    """

    def __init__(self, layers: Mapping[str, int]) -> None:
        self.layers = dict(layers)
        self.sizes = list(self.layers.values())

    def flat(self, name: str, z: Mapping[str, Tensor]) -> Flat:
        """An expert's z as one vector.

        Raises:
            ExpertError: it adapts what the model has not adapted, or with another size.
        """
        for path, value in z.items():
            if path not in self.layers:
                raise ExpertError(
                    f"expert {name!r} adapts {path}, which this model has not adapted",
                    remedy="adapt all matrices of the bank's experts, or load the base that the expert was made on",
                )
            if len(value) != self.layers[path]:
                raise ExpertError(
                    f"expert {name!r} has {len(value)} components for {path}, where this model has {self.layers[path]}",
                    remedy="load the base that the expert was made on",
                )
        parts = [z[path].cpu() if path in z else torch.ones(r) for path, r in self.layers.items()]
        return Flat(torch.cat(parts) if parts else torch.ones(0), tuple(path in z for path in self.layers))

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """{path: [..., r]} of a vector [..., R]; views."""
        return dict(zip(self.layers, flat.split(self.sizes, -1), strict=True))

    def mix(self, weights: Mapping[str, Any], alpha: Callable[[str, str], float], flats: Mapping[str, Flat]) -> Tensor:
        """Effective z [R] of a mixture of experts, z' = 1 + Σₖ αₖ (zₖ - 1).

        One expert alone at weight 1 comes back bit for bit, at every matrix where that is so; where nothing acts z is
        exactly 1.

        Args:
            weights: {expert: α}, a float for the whole model or anything else for finer ones.
            alpha: (expert, matrix path) -> α, asked for the finer ones.
            flats: of all those experts.
        """
        if not weights:
            return torch.ones(sum(self.sizes))
        if all(isinstance(a, float) for a in weights.values()) and all(all(flats[name].adapted) for name in weights):
            return mix_z([flats[name].z for name in weights], list(weights.values()))
        parts = {name: flats[name].z.split(self.sizes) for name in weights}
        made = []
        for place, (path, r) in enumerate(self.layers.items()):
            acting = [name for name in weights if flats[name].adapted[place]]
            zs = [parts[name][place] for name in acting]
            made.append(mix_z(zs, [alpha(name, path) for name in acting]) if acting else torch.ones(r))
        return torch.cat(made)

    def alphas(self, weights: Mapping[str, Any], alpha: Callable[[str, str], float]) -> Tensor:
        """float64 [K, M], α of every expert of a mixture at every matrix; see `mix`."""
        rows = [
            [a] * len(self.sizes) if isinstance(a, float) else [alpha(name, path) for path in self.layers]
            for name, a in weights.items()
        ]
        return torch.tensor(rows, dtype=torch.float64).view(len(rows), len(self.sizes))


def check_matrices(name: str, alpha: Any, layers: Mapping[str, int]) -> None:
    """Refuse weights per matrix that name other matrices.

    Raises:
        ConfigError: names the first one and the nearest that there are.
    """
    if isinstance(alpha, Mapping) and (odd := [path for path in alpha if path not in layers]):
        near = UnknownNameError("matrix", odd[0], layers).message
        raise ConfigError(f"the weights of {name}: {near}", remedy="use the model's module paths")
