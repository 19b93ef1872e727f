"""Skills added one by one: what is left of the earlier ones.

SVF experts beside each other, chosen per request by the router (D); against one LoRA and one SVF that learn the tasks
in turn, each starting from what the one before left.
"""

from __future__ import annotations

from typing import Any

from reproduction.banks import bank_of
from reproduction.lab import Lab
from reproduction.names import chosen_lr, run_name
from reproduction.report import NOT_RUN, Report, mean, table
from sigmix.adapt.router import RouterDispatch
from sigmix.engine import Engine
from sigmix.evals.dispatch import add_statistics

IN_TURN = ("lora-rl", "svf-rl")


def dispatched(count: int) -> str:
    """Name of the cells of a bank of the first ``count`` experts; stored results are of an earlier strategy D."""
    return f"bank-{count}-probe"


class Continual:
    """Continual learning."""

    name, title = "continual", "Continual learning: skills added one by one"
    needs = ("sweep",)

    def run(self, lab: Lab) -> None:
        """First seed; every earlier task after every addition."""
        scale, seed = lab.scale, lab.scale.seeds[0]
        lab.base_cells(scale.tasks)
        for kind in IN_TURN:
            for place, task in enumerate(scale.tasks):
                lab.single_cells(kind, task, seed, on=scale.tasks[: place + 1], after=scale.tasks[:place])
        for count in range(1, len(scale.tasks) + 1):
            if not all(lab.store.has(task, dispatched(count)) for task in scale.tasks[:count]):
                self._bank(lab, count, seed)

    def _bank(self, lab: Lab, count: int, seed: int) -> None:
        tasks = lab.scale.tasks[:count]
        bank = bank_of(lab, f"continual-{count}", tasks, seed)
        model, tokenizer = lab.base()
        engine = Engine(model, tokenizer, bank=bank)
        for task in tasks:
            add_statistics(engine, bank, task, lab.data_dir)
        router = RouterDispatch(engine)
        for task in tasks:
            lab.strategy_cell(task, dispatched(count), engine, router)

    def tables(self, report: Report) -> str:
        """A row for each task and way, a column for each stage."""
        scale, rows = report.scale, []
        final: dict[str, list[float]] = {}
        for way in ("SVF experts, chosen by D", *IN_TURN):
            label = scale.kinds[way].label + ", one adapter in turn" if way in IN_TURN else way
            for place, task in enumerate(scale.tasks):
                cells: list[Any] = []
                for count in range(1, len(scale.tasks) + 1):
                    who = self._who(report, way, count)
                    cells.append("" if count <= place else report.accuracy(task, who))
                    result = report.result(task, who)
                    if count == len(scale.tasks) and result is not None:
                        final.setdefault(label, []).append(result.accuracy)
                rows.append([label if place == 0 else "", task, report.base(task), *cells])
        head = ["way", "task", "base", *(f"after {task}" for task in scale.tasks)]
        told = "; ".join(f"{label} {100 * mean(values):.1f}" for label, values in final.items()) or NOT_RUN
        return table(head, rows) + f"\n\nMean over all tasks at the end: {told}. First seed."

    @staticmethod
    def _who(report: Report, way: str, count: int) -> str | None:
        if way not in IN_TURN:
            return dispatched(count)
        rate, tasks = chosen_lr(report.store, report.scale, way), report.scale.tasks
        return (
            None if rate is None else run_name(way, rate, tasks[count - 1], report.scale.seeds[0], tasks[: count - 1])
        )
