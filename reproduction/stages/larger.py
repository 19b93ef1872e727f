"""A larger model: an ARC-Easy expert, and unseen questions of other collections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from reproduction.lab import Lab
from reproduction.names import BASE, chosen_lr, runs_of
from reproduction.report import NOT_RUN, Report, table
from reproduction.scale import Scale

KINDS = ("svf-rl", "lora-rl")

RETREATS = 2
"""Lower rates that are tried where training gave nothing better than the base on validation items."""

TASK, UNSEEN = "arc-easy", ("arc-challenge", "openbookqa")


def inner(scale: Scale) -> Scale:
    """The same scale on the larger model."""
    return replace(scale, base=scale.larger or "", training={**scale.training, **scale.larger_training})


class Larger:
    """The larger model."""

    name, title = "larger", "A larger model"
    needs = ("sweep",)

    def run(self, lab: Lab) -> None:
        """One seed, beginning with the rate of the small model's sweep. Without the model the rows stay "not run"."""
        if not lab.scale.larger:
            lab.say("no larger model was named (--larger): its rows stay as they are")
            return
        own = Lab(inner(lab.scale), lab.store, lab.work, lab.data_dir, lab.allow_code, lab.say)
        lab.store.write_fact("larger", {"base": Path(lab.scale.larger).name, **own.scale.larger_training})
        own.base_cells([TASK, *UNSEEN])
        for kind in KINDS:
            own.single_cells(kind, TASK, lab.scale.seeds[0], on=[TASK, *UNSEEN], lr=rate_for(own, kind))

    def tables(self, report: Report) -> str:
        """Accuracy and paired difference to the base."""
        rows = [
            ["base", "", *(report.base(task) for task in (TASK, *UNSEEN))],
            ["best constant answer", "", *(report.constant(task) for task in (TASK, *UNSEEN))],
        ]
        last: dict[str, str | None] = {}
        for kind in KINDS:
            label = report.scale.kinds[kind].label
            tried = list(runs_of(report.store, kind, TASK, report.scale.seeds[0]).values())[::-1]
            rows += [[label, f"{run['lr']:g}", *_cells(report, run, last=run is tried[-1])] for run in tried]
            if not tried:
                rows.append([label, report.lr(kind), *[NOT_RUN] * (1 + len(UNSEEN))])
            last[kind] = tried[-1]["name"] if tried else None
        pair = [report.against(task, last[KINDS[0]], last[KINDS[1]]) for task in (TASK, *UNSEEN)]
        rows.append(["the former against the latter", "", *pair])
        head = ["", "lr", TASK, *(f"{task}, unseen" for task in UNSEEN)]
        return table(head, rows) + f"\n\nBase: {(report.store.fact('larger') or {}).get('base', NOT_RUN)}. One seed."


def rate_for(lab: Lab, kind: str) -> float:
    """The first rate, downwards from the small model's, with a checkpoint that is better than the base on validation
    items; after `RETREATS` the last one tried."""
    own = lab.scale.kinds[kind]
    begun = lab.scale.kinds[own.like or kind].lrs
    rate = chosen_lr(lab.store, lab.scale, kind)
    for left in reversed(range(RETREATS + 1)):
        name, _ = lab.trained(kind, TASK, lab.scale.seeds[0], rate)
        run = lab.store.run(name)
        assert run is not None
        rate = float(run["lr"])
        if run["best"]["step"] > 0 or len(begun) < 2 or not left:
            break
        rate = float(f"{rate * begun[0] / begun[1]:.2g}")
    assert rate is not None  # the loop set it
    return rate


def _cells(report: Report, run: Mapping[str, Any], last: bool) -> list[str]:
    """Accuracies of a run, or why there are none."""
    if run["best"]["step"] == 0 and not last:
        return ["no better than the base on validation", *[""] * len(UNSEEN)]
    texts = []
    for task in (TASK, *UNSEEN):
        text = report.accuracy(task, run["name"])
        texts.append(text if text == NOT_RUN else f"{text} ({report.against(task, run['name'], BASE)})")
    return texts
