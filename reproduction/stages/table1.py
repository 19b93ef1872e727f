"""Table 1: SVF against LoRA on the tasks that they are trained on; and Table 4: matrices and objectives."""

from __future__ import annotations

from reproduction.lab import Lab
from reproduction.names import BASE, single
from reproduction.report import Report, table
from reproduction.scale import Scale
from sigmix.evals.plots import figure, save_png

ONCE = ("lora-rl", "lora-qv-sft", "lora-sft", "svf-sft", "lora-qv-rl", "lora-small-rl")

PARTS = ("svf-mlp-rl", "svf-qv-rl")


def once(scale: Scale) -> list[str]:
    """Return the kinds that are trained with the first seed only."""
    return [kind for kind in ONCE if kind in scale.kinds and kind not in scale.compared]


class Table1:
    """Every kind on every training task."""

    name, title = "table1", "Table 1: SVF against LoRA on the training tasks"
    needs = ("sweep",)

    def run(self, lab: Lab) -> None:
        """Train and measure; the two kinds that are compared most with every seed, the others with the first."""
        lab.base_cells(lab.scale.tasks)
        for seed in lab.scale.seeds:
            for kind in (*lab.scale.compared, *(once(lab.scale) if seed == lab.scale.seeds[0] else ())):
                for task in lab.scale.kinds[kind].tasks or lab.scale.tasks:
                    lab.single_cells(kind, task, seed)

    def tables(self, report: Report) -> str:
        """Accuracy by kind and task, and the difference to SVF on the same items."""
        scale = report.scale
        rows = [["base", "", "", *(report.base(task) for task in scale.tasks)]]
        rows.append(["best constant answer", "", "", *(report.constant(task) for task in scale.tasks)])
        differences = []
        for kind in (*scale.compared, *once(scale)):
            names = {task: report.names(kind, task) for task in scale.tasks}
            run = next((report.store.run(name) for own in names.values() for name in own), None) or {}
            count = run.get("parameters")
            rows.append(
                [
                    scale.kinds[kind].label, f"{count:,}" if count else "", report.lr(kind),
                    *(report.over(task, own) for task, own in names.items()),
                ]
            )  # fmt: skip
            if kind != scale.compared[0]:
                ours = {task: report.names(scale.compared[0], task) for task in scale.tasks}
                differences.append(
                    [scale.kinds[kind].label, *(report.over_against(t, ours[t], names[t]) for t in scale.tasks)]
                )
        return (
            table(["kind", "numbers", "lr", *scale.tasks], rows)
            + "\n\nSVF by policy gradient less each other kind, on the same items:\n\n"
            + table(["less", *scale.tasks], differences)
            + "\n\n"
            + report.image("Validation accuracy by step", "learning")
        )

    def plots(self, report: Report) -> None:
        """Validation accuracy by step, every kind at its own rate, first seed (the paper's Figures 4 and 9)."""
        scale = report.scale
        canvas = figure(3.2 * len(scale.tasks), 3)
        panels = canvas.subplots(1, len(scale.tasks), squeeze=False)[0]
        for panel, task in zip(panels, scale.tasks, strict=True):
            for number, kind in enumerate((*scale.compared, *once(scale))):
                name = single(report.store, scale, kind, task, scale.seeds[0])
                run = None if name is None else report.store.run(name)
                if run is not None:
                    points = [(e["step"], e["accuracy"]) for e in run["history"] if e["kind"] == "validation"]
                    label = scale.kinds[kind].label
                    panel.plot(*zip(*points, strict=True), color=f"C{number}", marker="o", markersize=3, label=label)
            panel.set(title=task, xlabel="step", ylim=(0, 1))
        panels[0].set_ylabel("validation accuracy")
        if panels[0].lines:
            panels[0].legend(fontsize=5)
        save_png(canvas, report.picture("learning"))


class Table4:
    """Which matrices are adapted."""

    name, title = "table4", "Table 4: MLP, attention, both; policy gradient against next token"
    needs = ("sweep", "table1")

    def run(self, lab: Lab) -> None:
        """SVF on the MLP alone and on q and v alone; the other rows are of Table 1."""
        first = lab.scale.seeds[0]
        lab.base_cells([*lab.scale.tasks, lab.scale.unseen[0]])
        for kind in (*PARTS, "svf-rl", "svf-sft", "lora-qv-rl", "lora-rl", "lora-qv-sft", "lora-sft"):
            for task in lab.scale.tasks[:2]:
                carried = task == lab.scale.tasks[0]
                lab.single_cells(kind, task, first, on=[task, lab.scale.unseen[0]] if carried else [task])

    def tables(self, report: Report) -> str:
        """First seed of each; the last column is a related task that the first task's adapters never saw."""
        scale, first = report.scale, report.scale.seeds[0]
        tasks, unseen = scale.tasks[:2], scale.unseen[0]
        rows = []
        for kind in (*PARTS, "svf-rl", "svf-sft", "lora-qv-rl", "lora-rl", "lora-qv-sft", "lora-sft"):
            own = [report.names(kind, task, [first]) for task in tasks]
            run = report.store.run(own[0][0]) if own[0] else None
            rows.append(
                [
                    scale.kinds[kind].label, f"{run['parameters']:,}" if run else "",
                    *(report.accuracy(task, names[0] if names else None) for task, names in zip(tasks, own)),
                    report.accuracy(unseen, own[0][0] if own[0] else None),
                    report.against(unseen, own[0][0], BASE) if own[0] else "",
                ]
            )  # fmt: skip
        head = ["kind", "numbers", *tasks, f"{unseen}, unseen (adapter of {tasks[0]})", "against the base"]
        return table(head, rows) + f"\n\nBase on {unseen}: {report.base(unseen)}. First seed of each."
