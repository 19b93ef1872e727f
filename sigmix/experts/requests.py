"""Statistics of an expert's training requests, by which the router (`sigmix.adapt.router`) recognises similar ones.

Requests are points in the base's whitened hidden states, see `sigmix.adapt.router.Background`: there, other requests
have mean 0 and covariance I. An expert's requests are a mixture of Gaussians around ``centers`` that share a covariance
V = floor · I + directions · diag(excess) · directionsᵀ. Averages only, in 8 bits; no text of a request is stored.
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

FORMAT = "sigmix-requests-2"
MATRICES = ("centers", "directions")
SMOOTHING = 20.0  # distance by which centers blend into one density; also the temperature of class posteriors
FILE = "requests.safetensors"
REMEDY = f"delete {FILE}, and compute it again: sigmix experts statistics NAME"


@dataclass(frozen=True, eq=False)
class RequestStatistics:
    """Density of an expert's requests and the threshold of a request that is none of them.

    Attributes:
        centers: float32 [k, d]. weights: float32 [k], the centers' shares of the requests.
        directions: float32 [d, r], orthonormal. excess: float32 [r], nonnegative. floor: positive.
        threshold: relative distance at and above which a request is not the expert's.
        base: fingerprint of the base model. background: `sigmix.adapt.router.background_key`.
        facts: JSON values: numbers of requests, and shares of validation requests on the right side of the threshold.
    """

    centers: torch.Tensor
    weights: torch.Tensor
    directions: torch.Tensor
    excess: torch.Tensor
    floor: float
    threshold: float
    base: str
    background: str
    facts: Mapping[str, Any]

    def __post_init__(self) -> None:
        k, d = self.centers.shape if self.centers.ndim == 2 else (0, 0)
        shapes = k > 0 and self.weights.shape == (k,) and self.directions.shape == (d, len(self.excess))
        tensors = (self.centers, self.weights, self.directions, self.excess, torch.tensor([self.floor, self.threshold]))
        finite = all(bool(tensor.isfinite().all()) for tensor in tensors)
        if not (shapes and finite and self.floor > 0 and (self.weights > 0).all() and (self.excess >= 0).all()):
            raise ExpertError("request statistics with inconsistent shapes or invalid values", remedy=REMEDY)

    def distances(self, states: torch.Tensor) -> torch.Tensor:
        """Return the relative Mahalanobis distances float32 [N] of whitened states [N, d].

        That is the distance to the expert's requests minus the distance to the background, twice the logarithm of a
        likelihood ratio (Ren et al. 2021, arXiv 2106.09022); negative for requests like the expert's.
        """
        scale = self.excess / (self.floor + self.excess)
        offsets = states[:, None] - self.centers
        inside = (offsets @ self.directions).square() @ scale
        each = (offsets.square().sum(-1) - inside) / self.floor
        nearest = -SMOOTHING * (self.weights.log() - each / SMOOTHING).logsumexp(-1)
        volume = self.centers.shape[1] * torch.tensor(self.floor).log() + (self.excess / self.floor).log1p().sum()
        return nearest + volume - states.square().sum(-1)

    def rounded(self) -> RequestStatistics:
        """Return the statistics with the values that a file has."""
        return self.from_bytes(self.to_bytes(), FILE)

    def to_bytes(self) -> bytes:
        """Return the contents of a safetensors file; equal statistics give equal bytes, also after `from_bytes`."""
        tensors = {
            **_to_int8("centers", self.centers), **_to_int8("directions", self.directions.T),
            "weights": self.weights.half(), "excess": self.excess.half(),
        }  # fmt: skip
        metadata = {
            "format": FORMAT, "sha256": _digest(tensors), "floor": self.floor, "threshold": self.threshold,
            "base": self.base, "background": self.background, "facts": dict(self.facts),
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
            centers, directions = (tensors[name] * tensors[f"{name}.scale"].float() for name in MATRICES)
            return cls(
                centers, tensors["weights"].float(), directions.T, tensors["excess"].float(),
                float(metadata["floor"]), float(metadata["threshold"]), str(metadata["base"]),
                str(metadata["background"]), dict(metadata["facts"]),
            )  # fmt: skip
        except (SafetensorError, ExpertError, ValueError, KeyError, TypeError) as error:
            raise ExpertError(f"{source} is truncated or damaged: {error}", remedy=REMEDY) from error


def _to_int8(name: str, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a matrix in int8, with a scale in half precision for each row."""
    scale = (rows.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.half).tiny).half()
    return {name: (rows / scale.float()).round().to(torch.int8).contiguous(), f"{name}.scale": scale.contiguous()}


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name} {tuple(tensors[name].shape)}".encode() + tensors[name].numpy().tobytes())
    return total.hexdigest()
