"""Strategy D (ours): a linear probe on a hidden state of the base says what a request is about.

The state is that of the request's last token, as the base reads it with its chat template, after a few layers; the
layers above do not run. The probe is a multinomial logistic regression (scikit-learn) over the bank's labels, "other"
among them, fitted on training prompts. Depth, temperature and threshold come from validation prompts: the shallowest
layer that is nearly as right as the best, the temperature that makes probabilities honest, and the threshold under
which the answer is "other" because the probe is not sure.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from scipy.optimize import minimize_scalar

from sigmix.adapt.base import OTHER, Decision, check_bank, decide_those_that_fit, labels
from sigmix.engine.scoring import decoder_layers, hidden
from sigmix.engine.tokenization import context_length
from sigmix.errors import ConfigError, ExpertError, FingerprintError
from sigmix.experts.fingerprint import fingerprint, short
from sigmix.experts.mix import Mix
from sigmix.utils.io import atomic_file

FILE = "probe.safetensors"


FORMAT = "sigmix-probe-1"


@dataclass(frozen=True)
class Probe:
    """A fitted probe.

    Attributes:
        labels: names, in the order of the outputs. depth: layers that are run.
        weight: float32 [L, d]. bias: float32 [L]: logits = (weight · h + bias) / temperature.
        threshold: probability under which the answer is "other".
        base: fingerprint of the base. facts: JSON values about the fit, for people.
    """

    labels: tuple[str, ...]
    depth: int
    weight: torch.Tensor
    bias: torch.Tensor
    temperature: float
    threshold: float
    base: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def probabilities(self, states: torch.Tensor) -> torch.Tensor:
        """float32 [N, L] of hidden states float32 [N, d]."""
        return ((states @ self.weight.T + self.bias) / self.temperature).softmax(-1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically.

        Raises:
            OutputError: it cannot be written.
        """
        about = {
            "format": FORMAT, "labels": list(self.labels), "depth": self.depth, "temperature": self.temperature,
            "threshold": self.threshold, "base": self.base, "facts": dict(self.facts),
        }  # fmt: skip
        tensors = {"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}
        content = save(tensors, {"probe": json.dumps(about, ensure_ascii=False, sort_keys=True)})
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Probe:
        """Read what `save` wrote.

        Raises:
            ExpertError: no such file, or no probe.
        """
        path = Path(path)
        remedy = "fit one: sigmix adapt --fit-probe --bank FOLDER"
        if not path.is_file():
            raise ExpertError(f"there is no probe {path}", remedy=remedy)
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["probe"])
                weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
            made = cls(
                tuple(map(str, about["labels"])), int(about["depth"]), weight.float(), bias.float(),
                float(about["temperature"]), float(about["threshold"]), str(about["base"]), about["facts"],
            )  # fmt: skip
            sound = about["format"] == FORMAT and made.weight.shape == (len(made.labels), made.weight.shape[-1])
            sound = sound and made.bias.shape == (len(made.labels),) and made.temperature > 0 and made.depth > 0
            sound = sound and bool(made.weight.isfinite().all() and made.bias.isfinite().all())
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise ExpertError(f"the probe {path} cannot be read: {error!r}", remedy=remedy) from error
        if not sound:
            raise ExpertError(f"the probe {path} is damaged: its sizes or values cannot be", remedy=remedy)
        return made


class ProbeDispatch:
    """Strategy D: a probe's most probable expert, or the base where it is not sure.

    Args:
        engine: an `Engine`. bank: whose experts can be chosen; None: the engine's.
        probe: a `Probe`, or a file; None: ``probe.safetensors`` in the bank's folder.
        soft: mix all experts by their probabilities instead of taking the most probable one alone.

    Raises:
        ExpertError: no probe, or damaged. FingerprintError: fitted on another base. ConfigError: for other labels.
    """

    name = "D (probe)"

    def __init__(
        self,
        engine: Any,
        bank: Mapping[str, Any] | None = None,
        *,
        probe: Probe | str | os.PathLike[str] | None = None,
        soft: bool = False,
        batch_size: int = 64,
    ) -> None:
        self.engine, self.soft, self.batch_size = engine, soft, batch_size
        bank = engine.bank if bank is None else bank
        self.labels = labels(bank)
        check_bank(engine, bank)
        if probe is None:
            folder = getattr(bank, "folder", None)
            if folder is None:
                raise ConfigError("this bank has no folder to look for a probe in", remedy="give one: probe=…")
            probe = Path(folder) / FILE
        self.probe = probe if isinstance(probe, Probe) else Probe.load(probe)
        names = [label.name for label in self.labels]
        if list(self.probe.labels) != names:
            raise ConfigError(
                f"the probe was fitted for {', '.join(self.probe.labels)}; the bank has {', '.join(names)}",
                remedy="fit it anew: sigmix adapt --fit-probe --bank FOLDER",
            )
        if (found := fingerprint(engine.model)) != self.probe.base:
            raise FingerprintError(
                f"the probe was fitted on the base {short(self.probe.base)} (fingerprint), this one is {short(found)}",
                remedy="fit it anew on this base: sigmix adapt --fit-probe --bank FOLDER",
            )

    def decide(self, prompts: Sequence[str]) -> list[Decision]:
        """A decision for each request; "other", and a request over the context, is the base."""
        rows = [self.engine.encode(prompt) for prompt in prompts]
        limit = context_length(self.engine.model)
        return decide_those_that_fit(rows, None if limit is None else limit - 1, self._decide)

    def _decide(self, rows: list[list[int]]) -> list[Decision]:
        started = time.perf_counter()
        states = hidden(self.engine, rows, [self.probe.depth], self.batch_size)[:, 0]
        chances = self.probe.probabilities(states).tolist()
        seconds = (time.perf_counter() - started) / len(rows)
        return [self._decision(chance, len(row), seconds) for chance, row in zip(chances, rows, strict=True)]

    def _decision(self, chances: list[float], tokens: int, seconds: float) -> Decision:
        probe = self.probe
        best = max(range(len(chances)), key=chances.__getitem__)
        label, chance = self.labels[best], chances[best]
        sure = chance >= probe.threshold
        reason = f"the probe says {label.name} ({chance:.0%})"
        if not sure:
            reason += f", less than the {probe.threshold:.0%} that it takes"
        mix = label.mix if sure else Mix.base()
        if self.soft and sure and label.name != OTHER:
            mix = Mix({name: c for one, c in zip(self.labels, chances, strict=True) for name in one.mix.weights})
        evidence = {
            "probabilities": dict(zip(probe.labels, chances, strict=True)), "threshold": probe.threshold,
            "depth": probe.depth,
        }  # fmt: skip
        return Decision(mix, label.name if sure else OTHER, reason, evidence, tokens, seconds)


# --- Fitting the probe of strategy D. Needs scikit-learn (``pip install "sigmix[train]"``); using a probe does not.


Prompts = Mapping[str, Sequence[str]]


SLACK = 0.01
"""How much validation accuracy a shallower, cheaper layer may cost."""


STRENGTHS = (0.01, 0.1, 1.0)


def fit_probe(
    engine: Any, train: Prompts, validation: Prompts, *, bank: Any = None, depths: Sequence[int] | None = None
) -> Probe:
    """Fit a probe.

    Args:
        train: requests by label; every label of the bank, "other" among them. validation: the same, other requests.
        depths: layer counts to try; default: 1 to 8 and every fourth after.

    Raises:
        ConfigError: a label without requests, or requests of a label that the bank does not have.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    names = [label.name for label in labels(engine.bank if bank is None else bank)]
    for what, given in (("training", train), ("validation", validation)):
        if set(given) != set(names) or not all(given.values()):
            raise ConfigError(
                f"{what} prompts are needed for exactly the labels {', '.join(names)}; found {', '.join(given)}"
            )
    count = len(decoder_layers(engine.model))
    depths = [d for d in (1, 2, 3, 4, 5, 6, 7, 8, *range(12, 200, 4)) if d <= count] if depths is None else list(depths)
    x, y = _features(engine, train, names, depths)
    xv, yv = _features(engine, validation, names, depths)
    tried, models = [], []
    for place, depth in enumerate(depths):
        scaler = StandardScaler().fit(x[:, place])
        for strength in STRENGTHS:
            model = LogisticRegression(C=strength, max_iter=2000).fit(scaler.transform(x[:, place]), y)
            accuracy = float(model.score(scaler.transform(xv[:, place]), yv))
            tried.append({"depth": depth, "C": strength, "accuracy": accuracy})
            models.append((scaler, model))
    best = max(entry["accuracy"] for entry in tried)
    chosen = min(
        (n for n, entry in enumerate(tried) if entry["accuracy"] >= best - SLACK),
        key=lambda n: (tried[n]["depth"], -tried[n]["accuracy"]),
    )
    depth, (scaler, model) = int(tried[chosen]["depth"]), models[chosen]
    # (h - mean) / scale folded into the weights; a two-class model has one row of logits
    weight = model.coef_ / scaler.scale_
    bias = model.intercept_ - weight @ scaler.mean_
    if len(names) == 2:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    logits = xv[:, depths.index(depth)] @ weight.T + bias
    temperature = _temperature(logits, yv)
    chances = torch.from_numpy(logits / temperature).softmax(-1).numpy()
    threshold = _threshold(chances, yv, names.index(OTHER))
    told = np.where(chances.max(1) >= threshold, chances.argmax(1), names.index(OTHER))
    facts = {
        "train_n": {name: len(train[name]) for name in names},
        "validation_n": {name: len(validation[name]) for name in names},
        "validation_accuracy": float((told == yv).mean()),
        "tried": tried,
        "C": tried[chosen]["C"],
    }
    return Probe(
        tuple(names), depth, torch.from_numpy(weight).float(), torch.from_numpy(bias).float(), temperature, threshold,
        fingerprint(engine.model), facts,
    )  # fmt: skip


def _features(engine: Any, prompts: Prompts, names: Sequence[str], depths: Sequence[int]) -> tuple[Any, Any]:
    texts = [text for name in names for text in prompts[name]]
    targets = [number for number, name in enumerate(names) for _ in prompts[name]]
    return hidden(engine, texts, depths).double().numpy(), np.array(targets)


def _temperature(logits: Any, targets: Any) -> float:
    """The temperature with the smallest negative log-likelihood (Guo et al. 2017, arXiv 1706.04599)."""
    wide, aim = torch.from_numpy(logits), torch.from_numpy(targets)

    def loss(log: float) -> float:
        return float(torch.nn.functional.cross_entropy(wide / float(np.exp(log)), aim))

    # a probe without an error on validation would want temperature 0
    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.25), np.log(20)), method="bounded").x))


def _threshold(chances: Any, targets: Any, other: int) -> float:
    """The threshold with the most right answers on validation; in the middle of equally good ones, at least 0.5."""
    best, told = chances.max(1), chances.argmax(1)
    grid = np.linspace(0.5, 0.99, 50)
    right = np.array([(np.where(best >= cut, told, other) == targets).mean() for cut in grid])
    good = grid[right >= right.max() - 1e-12]
    return float(round(good[len(good) // 2], 4))
