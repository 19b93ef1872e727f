"""Do singular-value experts compose better than LoRA experts? The same tasks, data, loop and tuning for each kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

from reproduction.blend import Blend
from reproduction.compose import geometry, tuned_cells
from reproduction.lab import Lab
from reproduction.report import Report
from reproduction.stages import composed
from reproduction.stages.groups import crossed, groups, kinds, seeds


class Composition:
    """Composition of SVF and LoRA experts."""

    name, title = "composition", "Do singular-value experts compose better than LoRA experts?"
    needs = ("sweep",)

    def run(self, lab: Lab) -> None:
        """Experts alone, on each other's tasks, and mixed."""
        scale = lab.scale
        lab.base_cells(scale.tasks + scale.extra)
        for seed in scale.seeds:
            for kind in kinds(lab.store, scale):
                if seed in seeds(scale, kind):
                    self._one(lab, kind, seed)

    def _one(self, lab: Lab, kind: str, seed: int) -> None:
        scale, first = lab.scale, lab.scale.seeds[0]
        members = scale.tasks + scale.extra if seed == first else scale.tasks
        trained = {task: lab.trained(kind, task, seed) for task in members}
        model, tokenizer = lab.base()
        blend = Blend(model, {task: folder for task, (_, folder) in trained.items()}, scale.kinds[kind].policy)
        main = seed == first and kind in scale.compared
        for task, (name, _) in trained.items():
            others = crossed(scale) if main and task in crossed(scale) else ()
            for other in dict.fromkeys([task, *others]):
                reference = blend.reference if other == task else None
                lab.cell(other, name, blend.model, tokenizer, partial(blend.under, {task: 1.0}), reference)
        if main and lab.store.fact(f"geometry-{kind}") is None:
            lab.store.write_fact(f"geometry-{kind}", geometry(lab, blend, tokenizer, members))
        tuned_cells(lab, blend, tokenizer, kind, seed, groups(scale, kind, seed))

    # ------------------------------------------------------------------ tables

    def tables(self, report: Report) -> str:
        """All of it in Markdown."""
        heads = {
            "alone": "Experts alone",
            "mixed": "Mixed: mean accuracy over the members' tasks",
            "tasks": "Task by task",
            "crossed": "What each expert does to the other tasks",
            "geometry": "How alike the updates are",
            "curves": "Common α on validation: accuracy and KL",
        }
        parts = [f"### {head}\n\n{self.parts[name](report)}" for name, head in heads.items()]
        return "\n\n".join([*parts, report.image("Composition", "composition")])

    def plots(self, report: Report) -> None:
        """Retention by the number of experts; accuracy by KL."""
        composed.plots(report)

    parts: ClassVar[dict[str, Callable[[Report], str]]] = {
        "alone": composed.alone,
        "mixed": composed.mixed,
        "tasks": composed.by_task,
        "crossed": composed.crossed_matrix,
        "geometry": composed.geometry_table,
        "curves": composed.curves,
    }
