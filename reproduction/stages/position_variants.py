"""Variants of z at the prompt's tokens: some answer tokens, both ways at once, single matrices, an L1 penalty."""

from __future__ import annotations

from collections.abc import Sequence

from reproduction.lab import Lab
from reproduction.names import run_as, single
from reproduction.report import NOT_RUN, Report, table
from reproduction.scale import L1, MATRICES, Scale
from reproduction.stages.positions import RL, kl_of_cell
from reproduction.stages.sweep import sweep

TOKENS = ("svf-prompt-1-rl", "svf-prompt-4-rl")

BOTH = "svf-both-rl"

PARTS = tuple(f"{name}-{part}-rl" for name in ("svf-prompt", "svf") for part in MATRICES)

PENALTIES = tuple(f"{name}-l1-{strength:g}-rl" for name in ("svf-prompt", "svf") for strength in L1)


class PositionVariants:
    """One seed of each variant on the first two tasks."""

    name, title = "position-variants", "Answer tokens, both ways, matrices, L1"
    needs: tuple[str, ...] = ()

    def run(self, lab: Lab) -> None:
        """The cheap questions first."""
        tasks, seed = lab.scale.tasks[:2], lab.scale.seeds[0]
        lab.base_cells(tasks)
        for kind in RL:
            sweep(lab, kind)
            for task in tasks:
                lab.single_cells(kind, task, seed)
        for kind in _of(lab.scale, (*TOKENS, BOTH, *sorted([*PARTS, *PENALTIES], key=_order))):
            for task in tasks:
                lab.single_cells(kind, task, seed)
                if kind == BOTH:
                    lab.single_cells(kind, task, seed, positions="all")

    def tables(self, report: Report) -> str:
        """Each against z of all matrices at the same positions, on the same items."""
        kinds, tasks = report.scale.kinds, report.scale.tasks[:2]
        head = ["", "numbers", *(f"{task}{column}" for task in tasks for column in ("", ", difference", ", KL"))]
        tokens, penalties = _of(report.scale, TOKENS), _of(report.scale, PENALTIES)
        found = []
        if tokens:
            rows = [_row(report, RL[1], RL[1]), *(_row(report, kind, RL[1]) for kind in tokens)]
            found += ["z on the first tokens of the answer, too; differences to the prompt alone:", table(head, rows)]
        if BOTH in kinds:
            rows = [_row(report, BOTH, RL[1]), _row(report, BOTH, RL[0], "all")]
            title = "Half of the answers trained each way; differences to the experts of that way:"
            found += [title, table(head, rows)]
        for positions, kind in zip(("all tokens", "prompt"), RL, strict=True):
            own = [one for one in _of(report.scale, PARTS) if kinds[one].positions == kinds[kind].positions]
            if own:
                rows = [_row(report, kind, kind), *(_row(report, one, kind) for one in own)]
                found += [f"z at {positions}, of some matrices; differences to all of them:", table(head, rows)]
        if penalties:
            rows = [
                [*_row(report, kind, RL[kinds[kind].positions == "prompt"]), _left(report, kind)] for kind in penalties
            ]
            title = "A penalty on |z - 1|: strength in learning rates a step, and the share of z that differ from 1:"
            found += [title, table([*head, "share left"], rows)]
        return "\n\n".join(found)


def _order(kind: str) -> tuple[bool, bool]:
    """Return a sort key: variants at all tokens first, then two at the prompt's, then the others there."""
    late = kind.startswith("svf-prompt") and not kind.endswith(("down-rl", "-attention-rl"))
    return late, kind.startswith("svf-prompt")


def _of(scale: Scale, kinds: Sequence[str]) -> list[str]:
    """Return the kinds that the scale has."""
    return [kind for kind in kinds if kind in scale.kinds]


def _row(report: Report, kind: str, against: str, positions: str | None = None) -> list[str]:
    own, seed = report.scale.kinds[kind], report.scale.seeds[0]
    label = own.label + (f", run at {positions or own.positions}" if own.both else f" ({own.positions})" * bool(own.l1))
    cells, count = [], None
    for task in report.scale.tasks[:2]:
        name = single(report.store, report.scale, kind, task, seed)
        count = (report.store.run(name or "") or {}).get("parameters", count)
        who = run_as(name, positions) if name and positions else name
        base = single(report.store, report.scale, against, task, seed)
        difference = "" if kind == against else report.against(task, who, base)
        cells += [report.accuracy(task, who), difference, kl_of_cell(report, task, who)]
    return [label, f"{count:,}" if count else NOT_RUN, *cells]


def _left(report: Report, kind: str) -> str:
    shares = []
    for task in report.scale.tasks[:2]:
        name = single(report.store, report.scale, kind, task, report.scale.seeds[0])
        cell = None if name is None else report.store.cell(task, name)
        shares.append(NOT_RUN if cell is None else f"{100 * cell.facts['surviving']:.1f} %")
    return ", ".join(shares)
