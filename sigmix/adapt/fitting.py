"""Fitting the probe of strategy D. Needs scikit-learn (``pip install "sigmix[train]"``); using a probe does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar

from sigmix.adapt.decision import OTHER
from sigmix.adapt.labels import labels
from sigmix.adapt.probe import Probe
from sigmix.engine.scoring import decoder_layers, hidden
from sigmix.errors import ConfigError
from sigmix.experts.fingerprint import fingerprint

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
