"""Statistics of an expert's training requests, by which the router (`sigmix.adapt.router`) recognises similar ones.

Requests are points in the base's whitened hidden states, see `sigmix.adapt.router.Background`: there, other requests
have mean 0 and covariance I. An expert's requests are a Gaussian with a mean and the covariance
V = floor · I + directions · diag(excess) · directionsᵀ, and a linear classifier separates them from the background.
Averages and weights only, the directions in 8 bits; no text of a request is stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from sigmix.errors import ExpertError
from sigmix.utils.safetensors import from_int8, to_int8

FORMAT = "sigmix-requests-3"
UNIT = 20.0  # distance that counts as much as one unit of the classifier's logit
FILE = "requests.safetensors"
REMEDY = f"delete {FILE}, and compute it again: sigmix experts statistics NAME"


@dataclass(frozen=True, eq=False)
class RequestStatistics:
    """Density of an expert's requests, classifier of them against others, and the least score of one of them.

    Attributes:
        mean: float32 [d]. directions: float32 [d, r], orthonormal. excess: float32 [r], nonnegative. floor: positive.
        weight: float32 [d], of the classifier. bias: its intercept.
        threshold: score at and below which a request is not the expert's.
        base: fingerprint of the base model. background: `sigmix.adapt.router.background_key`.
        facts: JSON values: numbers of requests, and shares of validation requests on the right side of the threshold.
    """

    mean: torch.Tensor
    directions: torch.Tensor
    excess: torch.Tensor
    floor: float
    weight: torch.Tensor
    bias: float
    threshold: float
    base: str
    background: str
    facts: Mapping[str, Any]

    def __post_init__(self) -> None:
        (d, r) = self.directions.shape if self.directions.ndim == 2 else (0, 0)
        shapes = d > 0 and self.mean.shape == self.weight.shape == (d,) and self.excess.shape == (r,)
        numbers = torch.tensor([self.floor, self.bias, self.threshold])
        tensors = (self.mean, self.directions, self.excess, self.weight, numbers)
        finite = all(bool(tensor.isfinite().all()) for tensor in tensors)
        if not (shapes and finite and self.floor > 0 and (self.excess >= 0).all()):
            raise ExpertError("request statistics with inconsistent shapes or invalid values", remedy=REMEDY)

    def scores(self, states: torch.Tensor) -> torch.Tensor:
        """Return the scores float32 [N] of whitened states [N, d], larger for requests like the expert's.

        That is the classifier's logit minus the relative Mahalanobis distance (Ren et al. 2021, arXiv 2106.09022): the
        distance to the expert's requests minus the distance to the background, twice the logarithm of a likelihood
        ratio, in units of `UNIT`.
        """
        offsets = states - self.mean
        inside = (offsets @ self.directions).square() @ (self.excess / (self.floor + self.excess))
        volume = len(self.mean) * torch.tensor(self.floor).log() + (self.excess / self.floor).log1p().sum()
        distances = (offsets.square().sum(-1) - inside) / self.floor + volume - states.square().sum(-1)
        return states @ self.weight + self.bias - distances / UNIT

    def rounded(self) -> RequestStatistics:
        """Return the statistics with the values that a file has."""
        return self.from_bytes(self.to_bytes(), FILE)

    def to_bytes(self) -> bytes:
        """Return the contents of a safetensors file; equal statistics give equal bytes, also after `from_bytes`."""
        tensors = {
            **to_int8("directions", self.directions.T), "mean": self.mean.half(), "weight": self.weight.half(),
            "excess": self.excess.half(),
        }  # fmt: skip
        metadata = {
            "format": FORMAT, "sha256": _digest(tensors), "floor": self.floor, "bias": self.bias,
            "threshold": self.threshold, "base": self.base, "background": self.background, "facts": dict(self.facts),
        }  # fmt: skip
        return save(tensors, {"requests": json.dumps(metadata, ensure_ascii=False, sort_keys=True)})

    @classmethod
    def from_bytes(cls, content: bytes, source: str) -> RequestStatistics:
        """Parse `to_bytes`.

        Raises:
            ExpertError: damaged; names ``source``.
        """
        try:
            tensors = load(content)
            length = int.from_bytes(content[:8], "little")
            metadata = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["requests"])
            if metadata["format"] != FORMAT:
                raise ValueError(f"unknown format {metadata['format']!r}")
            if metadata["sha256"] != _digest(tensors):
                raise ValueError("the checksum differs")
            return cls(
                tensors["mean"].float(), from_int8("directions", tensors).T, tensors["excess"].float(),
                float(metadata["floor"]), tensors["weight"].float(), float(metadata["bias"]),
                float(metadata["threshold"]), str(metadata["base"]), str(metadata["background"]),
                dict(metadata["facts"]),
            )  # fmt: skip
        except (SafetensorError, ExpertError, ValueError, KeyError, TypeError) as error:
            raise ExpertError(f"{source} is truncated or damaged: {error}", remedy=REMEDY) from error


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name} {tuple(tensors[name].shape)}".encode() + tensors[name].numpy().tobytes())
    return total.hexdigest()
