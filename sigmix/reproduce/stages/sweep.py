"""Learning rates: every kind its own sweep on validation, as wide for each baseline as for SVF."""

from __future__ import annotations

from sigmix.reproduce.lab import Lab
from sigmix.reproduce.names import chosen_lr, kl_of, run_name, swept
from sigmix.reproduce.report import NOT_RUN, Report, table

BEYOND = 2
"""How many rates a sweep may add beyond the ends that it began with."""


class Sweep:
    """Three rates a kind, a factor of about three apart; while the best is at an end, the next one beyond."""

    name, title = "sweep", "Learning rates"
    needs: tuple[str, ...] = ()

    def run(self, lab: Lab) -> None:
        """Train every kind at every rate on the scale's sweep task with its first seed."""
        scale = lab.scale
        for name, kind in scale.kinds.items():
            for lr in kind.lrs:
                self._one(lab, name, lr)
            # counted from the stored runs, so that a sweep that is run again does not go on
            while len(kind.lrs) > 1 and len(tried := list(swept(lab.store, scale, name))) < len(kind.lrs) + BEYOND:
                best, ratio = chosen_lr(lab.store, scale, name), kind.lrs[1] / kind.lrs[0]
                if best not in (tried[0], tried[-1]):
                    break
                # two digits, so that the rate reads well and its name is stable
                self._one(lab, name, float(f"{best * ratio if best == tried[-1] else best / ratio:.2g}"))

    def _one(self, lab: Lab, kind: str, lr: float) -> None:
        scale = lab.scale
        # a record is enough: an adapter that nobody needs is not trained again on another machine
        if lab.store.run(run_name(kind, lr, scale.sweep, scale.seeds[0])) is None:
            lab.trained(kind, scale.sweep, scale.seeds[0], lr)

    def tables(self, report: Report) -> str:
        """Best validation accuracy by kind and rate, with the KL of that checkpoint; the chosen one in bold."""
        scale, rows = report.scale, []
        for name, kind in scale.kinds.items():
            if kind.like is not None:
                continue
            tried, best = swept(report.store, scale, name), chosen_lr(report.store, scale, name)
            cells = []
            for lr, run in tried.items():
                text = f"{lr:g}: {100 * run['best']['accuracy']:.1f}"
                text += f" (KL {kl_of(run):.2f})" if run["config"]["kl_weight"] else ""
                text += "" if run["outcome"] == "done" else ", ended early"
                cells.append(f"**{text}**" if lr == best else text)
            rows.append([kind.label, "; ".join(cells) or NOT_RUN])
        told = [
            f"{run['name']}: {run['outcome']}" for run in report.store.runs().values() if run.get("outcome") != "done"
        ]
        text = (
            f"Task {scale.sweep}, seed {scale.seeds[0]}, best accuracy on the validation items that choose the "
            "checkpoint, and the KL per token of its rollouts.\n\n" + table(["kind", "learning rate: accuracy"], rows)
        )
        return text + ("\n\nRuns that ended early:\n\n- " + "\n- ".join(told) if told else "")
