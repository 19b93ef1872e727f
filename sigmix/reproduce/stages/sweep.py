"""Learning rates: every kind its own sweep on validation, as wide for each baseline as for SVF."""

from __future__ import annotations

from sigmix.reproduce.lab import Lab
from sigmix.reproduce.names import chosen_lr, run_name, swept

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
            for _ in range(BEYOND if len(kind.lrs) > 1 else 0):
                tried = list(swept(lab.store, scale, name))
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
