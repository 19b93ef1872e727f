"""Do experts with z at the prompt's tokens compose as those with z at all tokens?"""

from __future__ import annotations

from typing import Any

from reproduction.blend import Blend
from reproduction.compose import average, fact, total, tuned_cells
from reproduction.lab import Lab
from reproduction.names import BASE, chosen_lr, mix_name, single
from reproduction.report import NOT_RUN, Report, marks, mean, table
from reproduction.scale import Scale
from reproduction.stages.groups import MODES
from reproduction.stages.positions import RL, kl_of_cell
from reproduction.stages.sweep import sweep
from sigmix.evals.statistics import paired_difference


class PositionMixtures:
    """Two, three and all experts of the first seed by average, sum and tuned α."""

    name, title = "position-mixtures", "Composition with z at the prompt's tokens"
    needs: tuple[str, ...] = ()

    def run(self, lab: Lab) -> None:
        """Experts alone, then mixed."""
        scale = lab.scale
        lab.base_cells(members(scale))
        for kind in RL:
            sweep(lab, kind)
            for task in members(scale):
                lab.single_cells(kind, task, scale.seeds[0])
        for kind in RL:
            self._mixed(lab, kind)

    def _mixed(self, lab: Lab, kind: str) -> None:
        scale, seed = lab.scale, lab.scale.seeds[0]
        folders = {task: lab.trained(kind, task, seed)[1] for task in members(scale)}
        model, tokenizer = lab.base()
        own = scale.kinds[kind]
        blend = Blend(model, folders, own.policy, True, own.positions)
        tuned_cells(lab, blend, tokenizer, kind, seed, groups(scale))

    def tables(self, report: Report) -> str:
        """Mean over the members' tasks with the share of the gain that is kept; then task by task with KL."""
        labels = [report.scale.kinds[kind].label for kind in RL]
        rows, each = [], []
        for group in groups(report.scale):
            for mode in ("alone", *MODES):
                found = {kind: _marks(report, kind, group, mode) for kind in RL}
                cells = [_mean(report, kind, group, found[kind], mode) for kind in RL]
                theirs, ours = found.values()
                difference = NOT_RUN
                if ours and theirs:
                    value, low, high = paired_difference(ours, theirs)
                    difference = f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
                rows.append([" + ".join(group) if mode == "alone" else "", mode, *cells, difference])
                for kind, label in zip(RL, labels, strict=True):
                    each.append([len(group), mode, label, _alphas(report, kind, group, mode), *(
                        _cell(report, kind, group, mode, task) if task in group else ""
                        for task in members(report.scale)
                    )])  # fmt: skip
        return "\n\n".join(
            [
                table(["experts", "mixture", *labels, "prompt less all tokens"], rows),
                "Task by task: accuracy, and KL per token to the base model on the replies:",
                table(["experts", "mixture", "z acts on", "α", *members(report.scale)], each),
            ]
        )


def members(scale: Scale) -> tuple[str, ...]:
    """Return the tasks of the experts that are mixed."""
    return tuple(dict.fromkeys(scale.tasks + scale.extra))


def groups(scale: Scale) -> list[tuple[str, ...]]:
    """Return which experts are mixed: two, three, all."""
    every = members(scale)
    return list(dict.fromkeys([every[:2], every[:3], every]))


def who(report: Report, kind: str, group: tuple[str, ...], mode: str, task: str) -> str | None:
    """Return the name of a cell; None for a tuning that was not run."""
    seed = report.scale.seeds[0]
    if mode == "alone":
        return single(report.store, report.scale, kind, task, seed)
    rate, weights = chosen_lr(report.store, report.scale, kind), weights_of(report, kind, group, mode)
    return None if rate is None or weights is None else mix_name(kind, rate, weights, seed)


def weights_of(report: Report, kind: str, group: tuple[str, ...], mode: str) -> dict[str, float] | None:
    """Return α of a mode; None for a tuning that was not run."""
    if mode != "tuned":
        return average(group) if mode == "average" else total(group)
    tuned: dict[str, Any] = report.store.fact(fact(kind, report.scale.seeds[0], group)) or {}
    return tuned.get("weights")


def _marks(report: Report, kind: str, group: tuple[str, ...], mode: str) -> list[bool] | None:
    """Marks on all members' items in turn; None if a cell was not run."""
    results = [report.result(task, BASE if mode == BASE else who(report, kind, group, mode, task)) for task in group]
    return None if any(one is None for one in results) else [mark for one in results if one for mark in marks(one)]


def _mean(report: Report, kind: str, group: tuple[str, ...], ours: list[bool] | None, mode: str) -> str:
    if not ours:
        return NOT_RUN
    alone, base = (_marks(report, kind, group, one) for one in ("alone", BASE))
    if mode == "alone" or not alone or not base or mean(alone) <= mean(base):
        return f"{100 * mean(ours):.1f}"
    kept = (mean(ours) - mean(base)) / (mean(alone) - mean(base))
    return f"{100 * mean(ours):.1f}, keeps {100 * kept:.0f} %"


def _alphas(report: Report, kind: str, group: tuple[str, ...], mode: str) -> str:
    weights = weights_of(report, kind, group, mode) if mode != "alone" else None
    return ", ".join(f"{alpha:.2g}" for alpha in weights.values()) if weights else ""


def _cell(report: Report, kind: str, group: tuple[str, ...], mode: str, task: str) -> str:
    name = who(report, kind, group, mode, task)
    text = report.accuracy(task, name)
    return text if text == NOT_RUN else f"{text} (KL {kl_of_cell(report, task, name)})"
