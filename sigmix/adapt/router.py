"""Strategy D (ours): a router made of statistics that every expert carries about its own training requests.

A request is the mean of the base's hidden states over the tokens of its text, after the first eighth of the layers;
later layers do not run. States are whitened with the mean and covariance of a background of other requests
(``background.txt``), which belongs to the base. Each expert has a density there (`RequestStatistics`) and a threshold.
A request gets the expert for which its relative Mahalanobis distance is farthest below the threshold, or the base if it
is below none. An expert's statistics depend on its requests and the base alone: adding or removing one changes no
other.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sigmix.adapt.base import OTHER, Decision, Label, check_bank, labels, skills
from sigmix.engine import Engine
from sigmix.engine.base import HiddenStatesEngine
from sigmix.engine.scoring import decoder_layers, text_ids
from sigmix.errors import ConfigError, ExpertError, OutputError
from sigmix.experts.bank import Bank
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix
from sigmix.experts.requests import SMOOTHING, RequestStatistics
from sigmix.utils.cache import cache_dir
from sigmix.utils.io import atomic_file

FILE = "background.safetensors"
REMEDY = "sigmix experts statistics --bank FOLDER"

DEPTH = 4 / 30  # share of the layers that run: 4 of the default base's
READ = 256  # tokens of a request that are read
CENTERS, DIRECTIONS = 16, 32  # at most, for an expert
SHRINKAGE = 0.1  # of the background's covariance towards a multiple of I
OWN = 0.3  # weight of an expert's own covariance against the background's
TAIL = 0.02  # share of validation requests that may lie beyond the threshold
GAP = 0.1  # where the threshold lies between the background (0) and the expert's own requests (1), if there is a gap
STRANGERS = 5  # weight of the error rate on the background, since every expert of a bank adds its own errors to it
TRAIN_LIMIT, VALIDATION_LIMIT = 2000, 500  # prompts that are read for statistics


def background_texts() -> list[str]:
    """Return requests of other kinds than any expert's; every fourth is for validation."""
    return Path(__file__).with_name("background.txt").read_text(encoding="utf-8").splitlines()


@functools.cache
def background_key() -> str:
    """Return a digest of `background_texts`; statistics are comparable only if theirs is the same."""
    return hashlib.sha256("\n".join(background_texts()).encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Background:
    """Mean and covariance of requests in general, in the hidden states of one base.

    Attributes:
        mean: float32 [d]. whitening: float32 [d, d], inverse Cholesky factor of the covariance.
        validation: float32 [N, d], whitened states of requests that mean and covariance do not include.
        depth: number of layers that run. base: fingerprint of the base model.
    """

    mean: torch.Tensor
    whitening: torch.Tensor
    validation: torch.Tensor
    depth: int
    base: str

    @classmethod
    def of(cls, engine: HiddenStatesEngine) -> Background:
        """Return the background of an engine's base: the bundled one, a cached one, or one computed now.

        Raises:
            ConfigError: the base has no hidden states after each layer, or they are not finite.
        """
        base, key = engine.base_fingerprint, background_key()
        cached = cache_dir() / "routers" / f"{base[:16]}-{key}.safetensors"
        places = [cached]
        with suppress(ExpertError):
            places.insert(0, Bank.bundled().folder / FILE)
        for path in places:
            with suppress(SafetensorError, OSError, ValueError, KeyError), safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if (about.get("base"), about.get("key")) == (base, key):
                    mean, scale = file.get_tensor("mean"), file.get_tensor("scale")
                    whitening = file.get_tensor("whitening").float() * scale
                    return cls(mean, whitening, file.get_tensor("validation").float(), int(about["depth"]), base)
        computed = cls.compute(engine)
        with suppress(OutputError):  # a read-only cache
            computed.save(cached)
        return computed

    @classmethod
    def compute(cls, engine: HiddenStatesEngine, depth: int | None = None) -> Background:
        """Compute the background of an engine's base; raises as `of`.

        Args:
            depth: default: `DEPTH`.
        """
        depth = depth or max(1, round(DEPTH * len(decoder_layers(engine.model))))
        states = _read(engine, background_texts(), depth).double()
        held_out = torch.arange(len(states)) % 4 == 3
        mean = states[~held_out].mean(0)
        covariance = (states[~held_out] - mean).T.cov()
        if not 0 < float(covariance.trace()) < math.inf:
            raise ConfigError(f"the states after {depth} layers of this base are not finite, or all the same")
        isotropic = covariance.trace() / len(mean) * torch.eye(len(mean), dtype=torch.float64)
        factor = torch.linalg.cholesky((1 - SHRINKAGE) * covariance + SHRINKAGE * isotropic)
        # rounded as `save` does, so that a computed background equals a loaded one
        mean, whitening = mean.float(), torch.linalg.inv(factor).float().contiguous()
        scale = whitening.abs().max()
        whitening = (whitening / scale).half().float() * scale
        validation = ((states[held_out].float() - mean) @ whitening.T).half().float()
        return cls(mean, whitening, validation, depth, engine.base_fingerprint)

    def save(self, path: Path) -> None:
        """Write one safetensors file.

        Raises:
            OutputError: the file cannot be written.
        """
        scale = self.whitening.abs().max()  # half precision for states of any size
        tensors = {
            "mean": self.mean, "whitening": (self.whitening / scale).half().contiguous(), "scale": scale,
            "validation": self.validation.half().contiguous(),
        }  # fmt: skip
        about = {"base": self.base, "key": background_key(), "depth": str(self.depth)}
        with atomic_file(path) as temporary:
            temporary.write_bytes(save(tensors, about))

    def states(self, engine: HiddenStatesEngine, prompts: Sequence[str | Sequence[int]]) -> torch.Tensor:
        """Return the whitened states float32 [N, d] of requests: texts, or rows of `encode`."""
        return (_read(engine, prompts, self.depth) - self.mean) @ self.whitening.T


def encode(engine: HiddenStatesEngine, text: str) -> list[int]:
    """Return the token ids of a request that are read: the first of the text, without the chat template."""
    room = engine.context_length
    return text_ids(engine, text)[: READ if room is None else min(READ, room - 2)]


def _read(engine: HiddenStatesEngine, prompts: Sequence[str | Sequence[int]], depth: int) -> torch.Tensor:
    rows = [encode(engine, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    return engine.hidden_states(rows, [depth])[:, 0]


class RouterDispatch:
    """Strategy D: the expert with the most similar training requests, or the base model.

    Experts without statistics of this base are never chosen, see `unrouted`. The bank may change between calls.

    Args:
        soft: mix all experts by their probabilities in place of the most probable one alone.

    Raises:
        ConfigError: no expert has such statistics. ExpertError, FingerprintError: an expert of another base, or a
        damaged one.
    """

    name = "D (router)"

    def __init__(self, engine: HiddenStatesEngine, *, soft: bool = False) -> None:
        if not hasattr(engine, "hidden_states"):
            raise ConfigError(
                f"strategy D reads hidden states of the base, which {type(engine).__name__} does not return",
                remedy="use strategy A or B, or sigmix's own engine: --engine own",
            )
        self.engine, self.soft = engine, soft
        check_bank(engine)
        if len(unrouted(engine.bank, engine.base_fingerprint)) == len(skills(engine.bank)):
            raise ConfigError("no expert of the bank has request statistics of this base", remedy=REMEDY)
        self.background = Background.of(engine)

    @property
    def labels(self) -> list[Label]:
        """Labels of the bank's experts, then "other"."""
        return labels(self.engine.bank)

    def decide(self, prompts: Sequence[str]) -> list[Decision]:
        """Return one decision per user turn; "other" means the base model."""
        rows = [encode(self.engine, prompt) for prompt in prompts]
        decisions = iter(self._decide([row for row in rows if row]))
        return [next(decisions) if row else Decision(Mix.base(), OTHER, "the request is empty") for row in rows]

    def _decide(self, rows: list[list[int]]) -> list[Decision]:
        if not rows:
            return []
        started = time.perf_counter()
        bank, listed, base = self.engine.bank, self.labels, self.background.base
        routed: dict[str, RequestStatistics] = {}
        for label in listed[:-1]:
            (name,) = label.mix.weights
            if (statistics := statistics_of(bank[name], base)) is not None:
                routed[label.name] = statistics
        states = self.background.states(self.engine, rows)
        # each expert on its own, so that its distances do not depend on the others
        distances = {name: statistics.distances(states).tolist() for name, statistics in routed.items()}
        thresholds = {name: statistics.threshold for name, statistics in routed.items()}
        seconds = (time.perf_counter() - started) / len(rows)
        return [
            self._decision(
                listed, {name: each[number] for name, each in distances.items()}, thresholds, len(row) + 1, seconds
            )
            for number, row in enumerate(rows)
        ]

    def _decision(
        self, listed: Sequence[Label], distances: Mapping[str, float], thresholds: Mapping[str, float], tokens: int,
        seconds: float,
    ) -> Decision:  # fmt: skip
        margins = {name: thresholds[name] - distance for name, distance in distances.items()}
        # "other" is one more class, as likely as an expert at that expert's threshold
        logits = torch.tensor([*margins.values(), 0.0], dtype=torch.float64) / SMOOTHING
        posteriors = dict(zip([*margins, OTHER], logits.softmax(-1).tolist(), strict=True))
        evidence = {
            "probabilities": {label.name: posteriors.get(label.name, 0.0) for label in listed},
            "distances": dict(distances), "thresholds": dict(thresholds), "depth": self.background.depth,
        }  # fmt: skip
        if not margins:
            return Decision(Mix.base(), OTHER, f"no expert has request statistics: {REMEDY}", evidence, tokens, seconds)
        best = max(margins, key=margins.__getitem__)
        reason = f"nearest to the requests of {best}: relative distance {distances[best]:.0f}, "
        if margins[best] <= 0:
            reason += f"not below the threshold of {thresholds[best]:.0f}"
            return Decision(Mix.base(), OTHER, reason, evidence, tokens, seconds)
        reason += f"below the threshold of {thresholds[best]:.0f} ({posteriors[best]:.0%})"
        mixes = {label.name: label.mix for label in listed}
        mix = mixes[best]
        if self.soft:
            mix = Mix({name: posteriors[label] for label in margins for name in mixes[label].weights})
        return Decision(mix, best, reason, evidence, tokens, seconds)


def statistics_of(expert: Expert, base: str) -> RequestStatistics | None:
    """Return an expert's statistics if they are of this base and the current background."""
    statistics = expert.requests
    same = statistics is not None and (statistics.base, statistics.background) == (base, background_key())
    return statistics if same else None


def unrouted(bank: Mapping[str, Expert], base: str) -> list[str]:
    """Return the names of the experts that a router never chooses, because they lack statistics."""
    return [name for name in skills(bank) if statistics_of(bank[name], base) is None]


def request_statistics(
    engine: Engine, train: Sequence[str], validation: Sequence[str], background: Background | None = None
) -> RequestStatistics:
    """Compute the statistics of an expert's requests.

    Args:
        engine: of the expert's base; its bank does not matter.
        train, validation: user turns, disjoint; the first `TRAIN_LIMIT` and `VALIDATION_LIMIT` distinct ones are read.

    Raises:
        ConfigError: no prompts, or as `Background.of`.
    """
    own, held_out = _distinct(train, TRAIN_LIMIT), _distinct(validation, VALIDATION_LIMIT)
    if not own or not held_out:
        raise ConfigError("request statistics need training and validation prompts that are not empty")
    background = background or Background.of(engine)
    states = background.states(engine, own).double().numpy()
    centers, nearest = _k_means(states, min(CENTERS, -(-len(own) // 16)))
    offsets = states - centers[nearest]
    variances, directions = np.linalg.eigh(offsets.T @ offsets / len(own))
    rank = min(DIRECTIONS, len(own) - len(centers), states.shape[1] - 1)
    top, directions = variances[::-1][:rank].clip(0), directions[:, ::-1][:, :rank]
    rest = max(float(variances.sum() - top.sum()), 0.0) / (states.shape[1] - rank)
    facts = {"train_n": len(own), "validation_n": len(held_out)}
    fitted = RequestStatistics(
        _tensor(centers), _tensor(np.bincount(nearest) / len(own)), _tensor(directions),
        _tensor(OWN * (top - rest).clip(0, 6e4)), 1 - OWN + OWN * rest, 0.0, background.base, background_key(), facts,
    ).rounded()  # fmt: skip
    inside = fitted.distances(background.states(engine, held_out)).double().numpy()
    outside = fitted.distances(background.validation).double().numpy()
    threshold = _threshold(inside, outside)
    shares = {"kept": float((inside < threshold).mean()), "refused": float((outside >= threshold).mean())}
    return replace(fitted, threshold=threshold, facts={**facts, **shares})


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))


def _distinct(prompts: Sequence[str], limit: int) -> list[str]:
    return list(dict.fromkeys(prompt for prompt in prompts if prompt.strip()))[:limit]


def _k_means(points: np.ndarray, count: int, rounds: int = 15) -> tuple[np.ndarray, np.ndarray]:
    """Return centers [k, d], none empty, and the index of the nearest one to each of the points [N, d].

    k-means++ seeding with a fixed random seed, then Lloyd's algorithm.
    """
    random = np.random.default_rng(0)
    centers = points[random.integers(len(points))][None]
    gaps = np.square(points - centers[0]).sum(1)
    while len(centers) < count and gaps.sum() > 0:
        centers = np.concatenate([centers, points[random.choice(len(points), p=gaps / gaps.sum())][None]])
        gaps = np.minimum(gaps, np.square(points - centers[-1]).sum(1))
    for _ in range(rounds):
        nearest = (np.square(centers).sum(1) - 2 * points @ centers.T).argmin(1)
        used, nearest = np.unique(nearest, return_inverse=True)
        centers = np.stack([points[nearest == number].mean(0) for number in range(len(used))])
    return centers, nearest


def _threshold(inside: np.ndarray, outside: np.ndarray) -> float:
    """Return the threshold between distances of an expert's validation requests and those of the background.

    Where they do not overlap it lies near the background, since people word requests more freely than training data;
    else where the weighted sum of both error rates is smallest.
    """
    near, far = np.quantile(inside, 1 - TAIL), np.quantile(outside, TAIL)
    if near < far:
        return float(far - GAP * (far - near))
    cuts = np.sort(np.concatenate([inside, outside]))
    errors = (inside[None] >= cuts[:, None]).mean(1) + STRANGERS * (outside[None] < cuts[:, None]).mean(1)
    return float(math.nextafter(cuts[errors.argmin()], math.inf))
