"""Strategy D (ours): a router made of statistics that every expert carries about its own training requests.

A request is the mean of the base's hidden states over the tokens of its text, after the first eighth of the layers;
later layers do not run. States are whitened with the mean and covariance of a background of other requests
(``background.txt``), which belongs to the base. Each expert has a density there, a linear classifier against the
background, and a threshold (`RequestStatistics`). A request gets the expert with the score that is furthest above its
threshold, or the base if none is above. An expert's statistics depend on its requests and the base alone: adding or
removing one changes no other.
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
from scipy.optimize import minimize
from scipy.special import expit

from sigmix.adapt.base import OTHER, Decision, Label, check_bank, labels, skills
from sigmix.engine import Engine
from sigmix.engine.base import HiddenStatesEngine
from sigmix.engine.scoring import decoder_layers, text_ids
from sigmix.errors import ConfigError, ExpertError, OutputError
from sigmix.experts.bank import Bank
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix
from sigmix.experts.requests import RequestStatistics
from sigmix.utils.cache import cache_dir
from sigmix.utils.io import atomic_file
from sigmix.utils.safetensors import from_int8, to_int8

FILE = "background.safetensors"
REMEDY = "sigmix experts statistics --bank FOLDER"

DEPTH = 4 / 30  # share of the layers that run: 4 of the default base's
READ = 256  # tokens of a request that are read
DIRECTIONS = 32  # at most, for an expert
SHRINKAGE = 0.1  # of the background's covariance towards a multiple of I
OWN = 0.3  # weight of an expert's own covariance against the background's
PENALTY = 0.03  # weight of the classifier's errors against the square of its weights
TAILS = 0.02, 0.01  # shares of an expert's validation requests and of the background that may lie beyond a threshold
GAP = 0.1  # where the threshold lies between the background (0) and the expert's own requests (1), if there is a gap
STRANGERS = 2  # weight of the error rate on the background, since every expert of a bank adds its own errors to it
TRAIN_LIMIT, VALIDATION_LIMIT = 2000, 500  # prompts that are read for statistics


def background_texts() -> list[str]:
    """Return requests of other kinds than any expert's; every fourth is for validation.

    About 200 are texts out of scope of CLINC150's training and validation splits (Larson et al. 2019, CC BY 3.0).
    """
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
        requests: float32 [N, d], whitened states of the requests that mean and covariance are of.
        validation: float32 [M, d], of other requests.
        depth: number of layers that run. base: fingerprint of the base model.
    """

    mean: torch.Tensor
    whitening: torch.Tensor
    requests: torch.Tensor
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
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
                    whitening = tensors["whitening"].float() * tensors["scale"]
                    requests, validation = (from_int8(name, tensors) for name in ("requests", "validation"))
                    return cls(tensors["mean"], whitening, requests, validation, int(about["depth"]), base)
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
        whitened = (states.float() - mean) @ whitening.T
        whitened = from_int8("", to_int8("", whitened))
        return cls(mean, whitening, whitened[~held_out], whitened[held_out], depth, engine.base_fingerprint)

    def save(self, path: Path) -> None:
        """Write one safetensors file.

        Raises:
            OutputError: the file cannot be written.
        """
        scale = self.whitening.abs().max()  # half precision for states of any size
        tensors = {
            "mean": self.mean, "whitening": (self.whitening / scale).half().contiguous(), "scale": scale,
            **to_int8("requests", self.requests), **to_int8("validation", self.validation),
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
        # each expert on its own, so that its scores do not depend on the others
        scores = {name: statistics.scores(states).tolist() for name, statistics in routed.items()}
        thresholds = {name: statistics.threshold for name, statistics in routed.items()}
        seconds = (time.perf_counter() - started) / len(rows)
        return [
            self._decision(
                listed, {name: each[number] for name, each in scores.items()}, thresholds, len(row) + 1, seconds
            )
            for number, row in enumerate(rows)
        ]

    def _decision(
        self, listed: Sequence[Label], scores: Mapping[str, float], thresholds: Mapping[str, float], tokens: int,
        seconds: float,
    ) -> Decision:  # fmt: skip
        if not scores:
            reason = f"no expert has request statistics: {REMEDY}"
            return Decision(Mix.base(), OTHER, reason, tokens=tokens, seconds=seconds)
        margins = {name: score - thresholds[name] for name, score in scores.items()}
        above = {name: margin for name, margin in margins.items() if margin > 0}
        best = max(margins, key=margins.__getitem__)
        logits = {**(above or margins), OTHER: 0.0}  # "other" is one more class, at the threshold
        chances = torch.tensor([*logits.values()], dtype=torch.float64).softmax(-1).tolist()
        posteriors = dict(zip(logits, chances, strict=True))
        evidence = {
            "probabilities": {label.name: posteriors.get(label.name, 0.0) for label in listed},
            "scores": dict(scores), "thresholds": dict(thresholds), "depth": self.background.depth,
        }  # fmt: skip
        reason = f"most similar to the requests of {best}: score {scores[best]:.1f}, "
        if not above:
            reason += f"not above the threshold of {thresholds[best]:.1f}"
            return Decision(Mix.base(), OTHER, reason, evidence, tokens, seconds)
        reason += f"above the threshold of {thresholds[best]:.1f} ({posteriors[best]:.0%})"
        mixes = {label.name: label.mix for label in listed}
        mix = mixes[best]
        if self.soft:
            mix = Mix({name: posteriors[label] for label in above for name in mixes[label].weights})
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
    mean = states.mean(0)
    offsets = states - mean
    variances, directions = np.linalg.eigh(offsets.T @ offsets / len(own))
    rank = min(DIRECTIONS, len(own) - 1, states.shape[1] - 1)
    top, directions = variances[::-1][:rank].clip(0), directions[:, ::-1][:, :rank]
    rest = max(float(variances.sum() - top.sum()), 0.0) / (states.shape[1] - rank)
    weight, bias = _classifier(states, background.requests.double().numpy())
    facts = {"train_n": len(own), "validation_n": len(held_out)}
    fitted = RequestStatistics(
        _tensor(mean), _tensor(directions), _tensor(OWN * (top - rest).clip(0, 6e4)), 1 - OWN + OWN * rest,
        _tensor(weight), bias, 0.0, background.base, background_key(), facts,
    ).rounded()  # fmt: skip
    inside = fitted.scores(background.states(engine, held_out)).double().numpy()
    outside = fitted.scores(background.validation).double().numpy()
    threshold = _threshold(inside, outside)
    shares = {"kept": float((inside > threshold).mean()), "refused": float((outside <= threshold).mean())}
    return replace(fitted, threshold=threshold, facts={**facts, **shares})


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))


def _distinct(prompts: Sequence[str], limit: int) -> list[str]:
    return list(dict.fromkeys(prompt for prompt in prompts if prompt.strip()))[:limit]


def _classifier(own: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, float]:
    """Return weight [d] and intercept of a logistic regression between points [N, d] and others [M, d]."""
    points = np.concatenate([own, others])
    points = np.concatenate([points, np.ones((len(points), 1))], 1)
    signs = np.repeat([1.0, -1.0], [len(own), len(others)])

    def loss(weight: np.ndarray) -> tuple[float, np.ndarray]:
        margins = signs * (points @ weight)
        free = np.append(weight[:-1], 0.0)  # no penalty on the intercept
        gradient = free - PENALTY * points.T @ (signs * expit(-margins))
        return 0.5 * free @ free + PENALTY * np.logaddexp(0, -margins).sum(), gradient

    found = minimize(loss, np.zeros(points.shape[1]), jac=True, method="L-BFGS-B").x
    return found[:-1], float(found[-1])


def _threshold(inside: np.ndarray, outside: np.ndarray) -> float:
    """Return the threshold between scores of an expert's validation requests and those of the background.

    Where they do not overlap it lies near the background, since people word requests more freely than training data;
    else where the weighted sum of both error rates is smallest.
    """
    near, far = np.quantile(inside, TAILS[0]), np.quantile(outside, 1 - TAILS[1])
    if near > far:
        return float(far + GAP * (near - far))
    cuts = np.sort(np.concatenate([inside, outside]))
    errors = (inside[None] < cuts[:, None]).mean(1) + STRANGERS * (outside[None] >= cuts[:, None]).mean(1)
    place = int(errors.argmin())  # scores from here on are the expert's
    return float(cuts[place] + cuts[max(place - 1, 0)]) / 2
