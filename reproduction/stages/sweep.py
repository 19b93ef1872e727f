"""Learning rates: every kind its own sweep on validation, as wide for each baseline as for SVF."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reproduction.lab import Lab
from reproduction.names import accuracies, chosen_lr, kl_coefficient, kl_of, next_rate, sweep_tasks, swept
from reproduction.report import NOT_RUN, Report, table


class Sweep:
    """Three rates a kind, a factor of about three apart; while the best is at an end, the next one beyond."""

    name, title = "sweep", "Learning rates"
    needs: tuple[str, ...] = ()

    def run(self, lab: Lab) -> None:
        """Every kind."""
        for kind in lab.scale.kinds:
            sweep(lab, kind)

    def tables(self, report: Report) -> str:
        """Best validation accuracy by kind and rate, with the KL of that checkpoint; the chosen one in bold."""
        scale, rows = report.scale, []
        for name, kind in scale.kinds.items():
            if kind.like is not None:
                continue
            tried, best = swept(report.store, scale, name), chosen_lr(report.store, scale, name)
            cells = []
            for lr, runs in tried.items():
                text = f"{lr:g}: {', '.join(_best(run) for run in runs)}"
                cells.append(f"**{text}**" if lr == best else text)
            rows.append([kind.label, ", ".join(sweep_tasks(scale, name)), "; ".join(cells) or NOT_RUN])
        told = [
            f"{run['name']}: {run['outcome']}" for run in report.store.runs().values() if run.get("outcome") != "done"
        ]
        text = (
            f"Seed {scale.seeds[0]}, best accuracy on the validation items that choose the checkpoint, and the KL per "
            "token of its rollouts. The rate with the best mean over the tasks is chosen.\n\n"
            + table(["kind", "tasks", "learning rate: accuracy"], rows)
        )
        return text + ("\n\nRuns that ended early:\n\n- " + "\n- ".join(told) if told else "")


def sweep(lab: Lab, kind: str) -> None:
    """Train a kind at every rate on the tasks of its sweep with the scale's first seed."""
    scale = lab.scale
    tried = accuracies(swept(lab.store, scale, kind))
    while (lr := next_rate(tried, scale.kinds[kind].lrs)) is not None:
        for task in sweep_tasks(scale, kind):
            lab.trained(kind, task, scale.seeds[0], lr)
        tried = accuracies(swept(lab.store, scale, kind))


def _best(run: Mapping[str, Any]) -> str:
    text = f"{100 * run['best']['accuracy']:.1f}"
    text += f" (KL {kl_of(run):.2f})" if kl_coefficient(run) else ""
    return text + ("" if run["outcome"] == "done" else ", ended early")
