"""Strategy D (ours): a linear probe on a hidden state of the base model classifies the request.

The state is that of the last token of the request under the chat template, after the first ``depth`` layers; later
layers do not run. The probe is a multinomial logistic regression over the bank's labels and "other", fitted on training
prompts. Validation prompts choose the depth (the shallowest nearly as accurate as the best), the temperature
(calibration) and the probability threshold below which the label is "other".
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

from sigmix.adapt.base import OTHER, Decision, check_bank, decide_readable, labels
from sigmix.engine import Engine
from sigmix.engine.base import HiddenStatesEngine
from sigmix.engine.scoring import decoder_layers, hidden_states
from sigmix.errors import ConfigError, ExpertError, FingerprintError, SigmixError
from sigmix.experts.fingerprint import short
from sigmix.experts.mix import Mix
from sigmix.utils.io import atomic_file

FILE = "probe.safetensors"
FORMAT = "sigmix-probe-1"
REMEDY = "fit one: sigmix adapt --fit-probe --bank FOLDER"
SLACK = 0.01  # validation accuracy given up for a shallower, cheaper layer
STRENGTHS = (0.01, 0.1, 1.0)  # values of the regression's C that are tried


@dataclass(frozen=True)
class Probe:
    """Fitted probe.

    Attributes:
        labels: names, in the order of the outputs. depth: number of layers that run.
        weight: float32 [L, d]. bias: float32 [L]: logits = (weight · h + bias) / temperature.
        threshold: probability below which the label is "other".
        base: fingerprint of the base model. facts: JSON values about the fit.
    """

    labels: tuple[str, ...]
    depth: int
    weight: torch.Tensor
    bias: torch.Tensor
    temperature: float
    threshold: float
    base: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.labels)
        shapes = self.weight.ndim == 2 and len(self.weight) == count and self.bias.shape == (count,)
        finite = bool(self.weight.isfinite().all() and self.bias.isfinite().all())
        if not (shapes and finite and self.temperature > 0 and self.depth > 0):
            raise ExpertError("a probe has inconsistent shapes or invalid values", remedy=REMEDY)

    def probabilities(self, states: torch.Tensor) -> torch.Tensor:
        """Return float32 [N, L] for hidden states float32 [N, d]."""
        return ((states @ self.weight.T + self.bias) / self.temperature).softmax(-1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically.

        Raises:
            OutputError: the file cannot be written.
        """
        metadata = {
            "format": FORMAT, "labels": list(self.labels), "depth": self.depth, "temperature": self.temperature,
            "threshold": self.threshold, "base": self.base, "facts": dict(self.facts),
        }  # fmt: skip
        tensors = {"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}
        content = save(tensors, {"probe": json.dumps(metadata, ensure_ascii=False, sort_keys=True)})
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Probe:
        """Read a file written by `save`.

        Raises:
            ExpertError: missing or damaged file.
        """
        path = Path(path)
        if not path.is_file():
            raise ExpertError(f"no probe at {path}", remedy=REMEDY)
        try:
            with safe_open(path, "pt") as file:
                metadata = json.loads((file.metadata() or {})["probe"])
                weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
            if metadata["format"] != FORMAT:
                raise ValueError(f"unknown format {metadata['format']!r}")
            return cls(
                tuple(map(str, metadata["labels"])), int(metadata["depth"]), weight.float(), bias.float(),
                float(metadata["temperature"]), float(metadata["threshold"]), str(metadata["base"]), metadata["facts"],
            )  # fmt: skip
        except (SafetensorError, SigmixError, OSError, ValueError, KeyError, TypeError) as error:
            raise ExpertError(f"cannot read the probe {path}: {error}", remedy=REMEDY) from error


class ProbeDispatch:
    """Strategy D: the probe's most probable expert, or the base model below the threshold.

    Args:
        probe: a `Probe` or its file; default: ``probe.safetensors`` in the bank's folder.
        soft: mix all experts by their probabilities in place of the most probable one alone.

    Raises:
        ExpertError: missing or damaged probe. FingerprintError: probe of another base. ConfigError: other labels.
    """

    name = "D (probe)"

    def __init__(
        self, engine: HiddenStatesEngine, *, probe: Probe | str | os.PathLike[str] | None = None, soft: bool = False
    ) -> None:
        self.engine, self.soft = engine, soft
        self.labels = labels(engine.bank)
        check_bank(engine)
        if probe is None:
            folder = getattr(engine.bank, "folder", None)
            if folder is None:
                raise ConfigError("the bank has no folder to read a probe from", remedy="pass one: probe=…")
            probe = Path(folder) / FILE
        self.probe = probe if isinstance(probe, Probe) else Probe.load(probe)
        names = [label.name for label in self.labels]
        if list(self.probe.labels) != names:
            raise ConfigError(
                f"the probe was fitted for {', '.join(self.probe.labels)}; the bank has {', '.join(names)}",
                remedy=REMEDY,
            )
        if (own := engine.base_fingerprint) != self.probe.base:
            raise FingerprintError(
                f"the probe was fitted on the base {short(self.probe.base)} (fingerprint), this one is {short(own)}",
                remedy=REMEDY,
            )

    def decide(self, prompts: Sequence[str]) -> list[Decision]:
        """Return one decision per user turn; "other" and a request over the context length mean the base model."""
        rows = [self.engine.encode(prompt) for prompt in prompts]
        return decide_readable(self.engine, rows, 1, self._decide)

    def _decide(self, rows: list[list[int]]) -> list[Decision]:
        started = time.perf_counter()
        states = self.engine.hidden_states(rows, [self.probe.depth])[:, 0]
        probabilities = self.probe.probabilities(states).tolist()
        seconds = (time.perf_counter() - started) / len(rows)
        return [self._decision(row, len(ids), seconds) for row, ids in zip(probabilities, rows, strict=True)]

    def _decision(self, probabilities: list[float], tokens: int, seconds: float) -> Decision:
        probe = self.probe
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        label, probability = self.labels[best], probabilities[best]
        reason = f"the probe calls it {label.name} ({probability:.0%})"
        evidence = {
            "probabilities": dict(zip(probe.labels, probabilities, strict=True)), "threshold": probe.threshold,
            "depth": probe.depth,
        }  # fmt: skip
        if probability < probe.threshold:
            reason += f", below the threshold of {probe.threshold:.0%}"
            return Decision(Mix.base(), OTHER, reason, evidence, tokens, seconds)
        mix = label.mix
        if self.soft and label.name != OTHER:
            pairs = zip(self.labels, probabilities, strict=True)
            mix = Mix({name: value for one, value in pairs for name in one.mix.weights})
        return Decision(mix, label.name, reason, evidence, tokens, seconds)


def fit_probe(engine: Engine, train: Mapping[str, Sequence[str]], validation: Mapping[str, Sequence[str]]) -> Probe:
    """Fit a probe. Needs scikit-learn (``pip install "sigmix[train]"``); using a probe does not.

    Args:
        train, validation: {label: user turns} for every label of the bank, "other" included; disjoint.

    Raises:
        ConfigError: a label without prompts, or prompts for a label that the bank does not have.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    names = [label.name for label in labels(engine.bank)]
    for split, prompts in (("training", train), ("validation", validation)):
        if set(prompts) != set(names) or not all(prompts.values()):
            raise ConfigError(f"expected {split} prompts for the labels {', '.join(names)}, not {', '.join(prompts)}")
    count = len(decoder_layers(engine.model))
    depths = [depth for depth in (*range(1, 9), *range(12, 200, 4)) if depth <= count]
    x, y = _features(engine, train, names, depths)
    xv, yv = _features(engine, validation, names, depths)
    tried, models = [], []
    for column, depth in enumerate(depths):
        for strength in STRENGTHS:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000)).fit(x[:, column], y)
            tried.append({"depth": depth, "C": strength, "accuracy": float(model.score(xv[:, column], yv))})
            models.append(model)
    best = max(entry["accuracy"] for entry in tried)
    chosen = min(
        (n for n, entry in enumerate(tried) if entry["accuracy"] >= best - SLACK),
        key=lambda n: (tried[n]["depth"], -tried[n]["accuracy"]),
    )
    depth, (scaler, model) = int(tried[chosen]["depth"]), models[chosen]
    # fold the standardisation (h - mean) / scale into the weights; a two-class model has one row of logits
    weight = model.coef_ / scaler.scale_
    bias = model.intercept_ - weight @ scaler.mean_
    if len(names) == 2:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    logits = xv[:, depths.index(depth)] @ weight.T + bias
    temperature = _temperature(logits, yv)
    probabilities = torch.from_numpy(logits / temperature).softmax(-1).numpy()
    threshold = _threshold(probabilities, yv, names.index(OTHER))
    predicted = np.where(probabilities.max(1) >= threshold, probabilities.argmax(1), names.index(OTHER))
    facts = {
        "train_n": {name: len(train[name]) for name in names},
        "validation_n": {name: len(validation[name]) for name in names},
        "validation_accuracy": float((predicted == yv).mean()), "tried": tried, "C": tried[chosen]["C"],
    }  # fmt: skip
    return Probe(
        tuple(names), depth, torch.from_numpy(weight).float(), torch.from_numpy(bias).float(), temperature, threshold,
        engine.base_fingerprint, facts,
    )  # fmt: skip


def _features(
    engine: Engine, prompts: Mapping[str, Sequence[str]], names: Sequence[str], depths: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return hidden states float64 [N, D, d] and label indices [N]."""
    texts = [text for name in names for text in prompts[name]]
    targets = [number for number, name in enumerate(names) for _ in prompts[name]]
    return hidden_states(engine, texts, depths).double().numpy(), np.array(targets)


def _temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the temperature of least negative log-likelihood (Guo et al. 2017, arXiv 1706.04599)."""
    x, y = torch.from_numpy(logits), torch.from_numpy(targets)

    def loss(log: float) -> float:
        return float(torch.nn.functional.cross_entropy(x / float(np.exp(log)), y))

    # bounded: without a validation error the optimum is temperature 0
    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.25), np.log(20)), method="bounded").x))


def _threshold(probabilities: np.ndarray, targets: np.ndarray, other: int) -> float:
    """Return the most accurate threshold from 0.5 to 0.99, the middle one of equally accurate ones."""
    top, predicted = probabilities.max(1), probabilities.argmax(1)
    grid = np.linspace(0.5, 0.99, 50)
    accuracy = np.array([(np.where(top >= cut, predicted, other) == targets).mean() for cut in grid])
    best = grid[accuracy >= accuracy.max() - 1e-12]
    return float(round(best[len(best) // 2], 4))
