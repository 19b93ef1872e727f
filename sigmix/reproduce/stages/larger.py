"""A larger model: an ARC-Easy expert, and unseen questions of other collections."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sigmix.reproduce.lab import Lab
from sigmix.reproduce.names import BASE, single
from sigmix.reproduce.report import NOT_RUN, Report, table
from sigmix.reproduce.scale import Scale

KINDS = ("svf-rl", "lora-rl")
TASK, UNSEEN = "arc-easy", ("arc-challenge", "openbookqa")


def inner(scale: Scale) -> Scale:
    """The same scale on the larger model; learning rates are those of the small one's sweep."""
    return replace(scale, base=scale.larger or "", training={**scale.training, **scale.larger_training})


class Larger:
    """The larger model."""

    name, title = "larger", "A larger model"
    needs = ("sweep",)

    def run(self, lab: Lab) -> None:
        """One seed. Without the model or the data the rows stay "not run"."""
        if not lab.scale.larger:
            lab.say("no larger model was named (--larger): its rows stay as they are")
            return
        own = Lab(inner(lab.scale), lab.store, lab.work, lab.data_dir, lab.allow_code, lab.say)
        lab.store.write_fact("larger", {"base": Path(lab.scale.larger).name, **own.scale.larger_training})
        own.base_cells([TASK, *UNSEEN])
        for kind in KINDS:
            own.single_cells(kind, TASK, lab.scale.seeds[0], on=[TASK, *UNSEEN])

    def tables(self, report: Report) -> str:
        """Accuracy and paired difference to the base."""
        rows = [
            ["base", "", *(report.base(task) for task in (TASK, *UNSEEN))],
            ["best constant answer", "", *(report.constant(task) for task in (TASK, *UNSEEN))],
        ]
        for kind in KINDS:
            name = single(report.store, report.scale, kind, TASK, report.scale.seeds[0])
            cells = []
            for task in (TASK, *UNSEEN):
                text = report.accuracy(task, name)
                cells.append(text if text == NOT_RUN else f"{text} ({report.against(task, name, BASE)})")
            rows.append([report.scale.kinds[kind].label, report.lr(kind), *cells])
        head = ["", "lr (of the small model's sweep)", TASK, *(f"{task}, unseen" for task in UNSEEN)]
        return table(head, rows) + f"\n\nBase: {(report.store.fact('larger') or {}).get('base', NOT_RUN)}. One seed."
