"""Must z act on the tokens of the answer, too? Experts with z at all tokens against experts with z at the prompt's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from reproduction.lab import Lab
from reproduction.names import run_as, single
from reproduction.report import NOT_RUN, Report, mean, table
from reproduction.scale import Scale
from reproduction.stages.sweep import sweep
from sigmix.evals.statistics import paired_difference
from sigmix.svf.config import POSITIONS

RL = ("svf-rl", "svf-prompt-rl")
SFT = ("svf-sft", "svf-prompt-sft")
"""Kinds with z at all tokens and at the prompt's."""


class Positions:
    """Policy gradient on the scale's tasks, with every seed."""

    name, title = "positions", "z at all tokens or at the prompt's, policy gradient"
    needs: tuple[str, ...] = ()

    def run(self, lab: Lab) -> None:
        """Train each kind, and measure each expert at both positions."""
        scale = lab.scale
        lab.base_cells(scale.tasks)
        for kind in RL:
            sweep(lab, kind)
        for seed in scale.seeds:
            for task in scale.tasks:
                for kind in RL:
                    lab.single_cells(kind, task, seed)
            for task in scale.tasks:
                for kind in RL:
                    lab.single_cells(kind, task, seed, positions=other(scale, kind))

    def tables(self, report: Report) -> str:
        """Accuracy over seeds and differences; then run the other way; then validation by step."""
        tasks, kinds = report.scale.tasks, report.scale.kinds
        names = {kind: {task: report.names(kind, task) for task in tasks} for kind in RL}
        theirs, ours = names.values()
        rows = [
            ["base", "", *(report.base(task) for task in tasks)],
            ["best constant answer", "", *(report.constant(task) for task in tasks)],
            *([kinds[kind].label, report.lr(kind), *(report.over(t, names[kind][t]) for t in tasks)] for kind in RL),
            ["prompt less all tokens", "", *(report.over_against(task, ours[task], theirs[task]) for task in tasks)],
            *(
                [f"prompt less all tokens, seed {seed}", "", *(_by_seed(report, task, seed) for task in tasks)]
                for seed in report.scale.seeds
            ),
            *(
                [f"KL per token, {kinds[kind].label}", "", *(_kls(report, task, names[kind][task]) for task in tasks)]
                for kind in RL
            ),
        ]
        crossed = []
        for kind in RL:
            positions = other(report.scale, kind)
            moved = {task: [run_as(name, positions) for name in names[kind][task]] for task in tasks}
            label = f"trained at {kinds[kind].label}, run at {positions}"
            crossed.append([label, *(report.over(task, moved[task]) for task in tasks)])
            crossed.append(["less as trained", *(report.over_against(t, moved[t], names[kind][t]) for t in tasks)])
        curves = [[task, *(_curves(report, names[kind][task]) for kind in RL)] for task in tasks]
        return "\n\n".join(
            [
                table(["z acts on", "lr", *tasks], rows),
                "Experts run at the other positions than in their training:",
                table(["", *tasks], crossed),
                "Accuracy at each validation, by seed, and seconds of training on a shared machine:",
                table(["task", *(kinds[kind].label for kind in RL)], curves),
            ]
        )


class Snips:
    """Next token on answers of 20 to 60 tokens."""

    name, title = "snips", "Long answers by next token: SNIPS requests to JSON"
    needs: tuple[str, ...] = ()
    seeds = 2

    def run(self, lab: Lab) -> None:
        """Two seeds of each kind."""
        lab.base_cells([self.name])
        for kind in SFT:
            sweep(lab, kind)
        for seed in lab.scale.seeds[: self.seeds]:
            for kind in SFT:
                lab.single_cells(kind, self.name, seed)
        for seed in lab.scale.seeds[: self.seeds]:
            for kind in SFT:
                lab.single_cells(kind, self.name, seed, positions=other(lab.scale, kind))

    def tables(self, report: Report) -> str:
        """Replies that are right as a whole, and the share of right fields."""
        return _pair(report, self.name, SFT, report.scale.seeds[: self.seeds])


class Gsm8k:
    """A larger model that reasons before it answers."""

    name, title = "gsm8k", "Reasoning before the answer: GSM8K with a larger model, policy gradient"
    needs: tuple[str, ...] = ()

    def run(self, lab: Lab) -> None:
        """One seed of each kind, at the rates of the small model's sweep."""
        if not lab.scale.larger:
            lab.say("no larger model was named (--larger): its rows stay as they are")
            return
        for kind in RL:
            sweep(lab, kind)
        own = Lab(inner(lab.scale), lab.store, lab.work, lab.data_dir, lab.allow_code, lab.say)
        lab.store.write_fact(self.name, {"base": Path(lab.scale.larger).name, **own.scale.larger_training})
        own.base_cells([self.name])
        for kind in RL:
            own.single_cells(kind, self.name, lab.scale.seeds[0])
        for kind in RL:
            own.single_cells(kind, self.name, lab.scale.seeds[0], positions=other(own.scale, kind))

    def tables(self, report: Report) -> str:
        """Accuracy, difference to the base model and to each other."""
        about = report.store.fact(self.name) or {}
        return _pair(report, self.name, RL, report.scale.seeds[:1]) + f"\n\nBase: {about.get('base', NOT_RUN)}."


def inner(scale: Scale) -> Scale:
    """Return the same scale on the larger model."""
    return replace(
        scale,
        base=scale.larger or "",
        training={**scale.training, **scale.larger_training},
        n=min(scale.n, 300),
        batch=128,
    )


def other(scale: Scale, kind: str) -> str:
    """Return the positions that a kind was not trained for."""
    return next(positions for positions in POSITIONS if positions != scale.kinds[kind].positions)


def kl_of_cell(report: Report, task: str, who: str | None) -> str:
    """Return the KL per token to the base model on a cell's replies, with two decimals."""
    kl = report.kl(task, who)
    if kl is None:
        return NOT_RUN if report.result(task, who) is None else "not measured"
    return f"{kl:.2f}"


def _by_seed(report: Report, task: str, seed: int) -> str:
    theirs, ours = (single(report.store, report.scale, kind, task, seed) for kind in RL)
    return report.against(task, ours, theirs)


def _kls(report: Report, task: str, names: Sequence[str]) -> str:
    return ", ".join(kl_of_cell(report, task, name) for name in names) or NOT_RUN


def _curves(report: Report, names: Sequence[str]) -> str:
    parts = []
    for name in names:
        run = report.store.run(name) or {"history": [], "seconds": 0}
        points = [f"{100 * entry['accuracy']:.0f}" for entry in run["history"] if entry["kind"] == "validation"]
        parts.append(f"{', '.join(points)} ({run['seconds']:.0f} s)")
    return "; ".join(parts) or NOT_RUN


def _pair(report: Report, task: str, kinds: Sequence[str], seeds: Sequence[int]) -> str:
    """Table of a task: base model and both kinds, at the positions of their training and at the others."""
    rows = [["base", "", "", report.base(task), _score(report, task, "base"), "", "", ""]]
    for seed in seeds:
        theirs, ours = (single(report.store, report.scale, kind, task, seed) for kind in kinds)
        for kind, name in zip(kinds, (theirs, ours), strict=True):
            own = report.scale.kinds[kind]
            for positions in (own.positions, other(report.scale, kind)):
                who = name and (name if positions == own.positions else run_as(name, positions))
                against = report.against(task, who, theirs) if who != theirs else ""
                score = _score_against(report, task, who, theirs) if who != theirs else ""
                rows.append([own.label, positions, seed, report.accuracy(task, who), _score(report, task, who), against,
                             score, kl_of_cell(report, task, who)])  # fmt: skip
    over = [report.names(kind, task, seeds) for kind in kinds]
    head = ["trained at", "run at", "seed", "right", "mean score", "right, less all tokens of the same seed",
            "mean score, less all tokens", "KL per token"]  # fmt: skip
    summary = f"Prompt less all tokens, over {len(seeds)} seeds: {report.over_against(task, over[1], over[0])}."
    rates = "; ".join(f"{report.scale.kinds[kind].label} {report.lr(kind)}" for kind in kinds)
    return "\n\n".join(
        [
            table(head, rows),
            f"{summary} Best constant answer: {report.constant(task)} (mean score). Learning rates: {rates}.",
        ]
    )


def _score(report: Report, task: str, who: str | None) -> str:
    result = report.result(task, who)
    return NOT_RUN if result is None else f"{100 * mean([item.score or 0.0 for item in result.items]):.1f}"


def _score_against(report: Report, task: str, who: str | None, base: str | None) -> str:
    ours, theirs = report.result(task, who), report.result(task, base)
    if ours is None or theirs is None:
        return NOT_RUN
    pair = ([item.score or 0.0 for item in result.items] for result in (ours, theirs))
    difference, low, high = paired_difference(*pair)
    return f"{100 * difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
