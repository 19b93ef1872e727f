"""The router on CLINC150 (Larson et al. 2019, arXiv 1909.02027; CC BY 3.0): its ten domains as ten experts.

    python -m benchmarks.clinc --data-dir DATA      # DATA/clinc150/data_full.json and domains.json, as published

Statistics from the training texts, thresholds from the validation texts and the background; the official test set is
read last, with its requests out of scope. Beside it: logistic regression on the same states.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sigmix.adapt.router import Background, request_statistics
from sigmix.engine import Engine
from sigmix.evals.statistics import wilson
from sigmix.models.default import DEFAULT
from sigmix.models.loading import load_base


def measure(engine: Engine, data_dir: Path, depth: int | None = None, limit: int | None = None) -> dict[str, Any]:
    """Return accuracy in scope, AUROC out of scope, and shares with the threshold, of the router and of a regression.

    Args:
        depth: number of layers that run; default: the router's own. limit: texts of a split, for a quick look.
    """
    folder = data_dir / "clinc150"
    data = json.loads((folder / "data_full.json").read_text(encoding="utf-8"))
    domains = json.loads((folder / "domains.json").read_text(encoding="utf-8"))
    of_intent = {intent: domain for domain, intents in domains.items() for intent in intents}

    def split(name: str) -> tuple[list[str], list[str]]:
        rows = data[name][:: max(1, len(data[name]) // limit) if limit else 1]
        return [text for text, _ in rows], [of_intent.get(intent, "") for _, intent in rows]

    background = Background.compute(engine, depth)
    train, validation, test, outside = map(split, ("train", "val", "test", "oos_test"))
    experts = {
        domain: request_statistics(engine, *([t for t, d in zip(*rows, strict=True) if d == domain]
                                             for rows in (train, validation)), background)
        for domain in domains
    }  # fmt: skip
    inside_states, outside_states = (background.states(engine, rows[0]) for rows in (test, outside))

    def margins(states: torch.Tensor) -> np.ndarray:
        return np.stack([one.scores(states).numpy() - one.threshold for one in experts.values()], 1)

    truth = np.array([list(domains).index(domain) for domain in test[1]])
    inside, outside_margins = margins(inside_states), margins(outside_states)
    router = _figures(inside, outside_margins, truth)
    router["routed_right"] = float(((inside.argmax(1) == truth) & (inside.max(1) > 0)).mean())
    router["out_of_scope_to_base"] = float((outside_margins.max(1) <= 0).mean())

    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=0.01, max_iter=300).fit(background.states(engine, train[0]).numpy(), train[1])
    order = [list(model.classes_).index(domain) for domain in domains]
    chances = [model.predict_proba(states.numpy())[:, order] for states in (inside_states, outside_states)]
    return {
        "depth": background.depth, "test_n": len(truth), "out_of_scope_n": len(outside[0]),
        "bytes_per_expert": max(len(one.to_bytes()) for one in experts.values()),
        "router": router, "logistic_regression": _figures(*chances, truth),
    }  # fmt: skip


def _figures(inside: np.ndarray, outside: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Return figures of scores [N, classes], larger for a likelier class."""
    from sklearn.metrics import roc_auc_score

    right, best, other = inside.argmax(1) == truth, inside.max(1), outside.max(1)
    labels = np.r_[np.zeros(len(best)), np.ones(len(other))]
    return {
        "accuracy": float(right.mean()), "interval": list(wilson(int(right.sum()), len(right))),
        "auroc": float(roc_auc_score(labels, -np.r_[best, other])),
    }  # fmt: skip


def main() -> None:
    """Print the figures of each depth as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--base", default=DEFAULT)
    parser.add_argument("--depth", type=int, nargs="*", default=[None], help="numbers of layers that run")
    parser.add_argument("--limit", type=int, help="texts of a split")
    given = parser.parse_args()
    engine = Engine(*load_base(given.base))
    print(json.dumps([measure(engine, given.data_dir, depth, given.limit) for depth in given.depth], indent=2))


if __name__ == "__main__":
    main()
