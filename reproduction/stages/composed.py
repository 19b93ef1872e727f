"""Tables and plots of the composition experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reproduction.names import BASE, single
from reproduction.report import NOT_RUN, Report, mean, table
from reproduction.seeds import paired_seeds, seeds_interval
from reproduction.stages.groups import (
    FIRST_SEED,
    MODES,
    crossed,
    fact,
    groups,
    kinds,
    retention,
    rows_of,
    seeds,
    weights_of,
    who,
)
from sigmix.evals.plots import figure, save_png


def alone(report: Report) -> str:
    """Every expert on its own task, its size, and its KL to the base."""
    scale = report.scale
    rows = [["base", "", "", "", *(report.base(task) for task in scale.tasks + scale.extra)]]
    for kind in kinds(report.store, scale):
        names = {task: report.names(kind, task) for task in scale.tasks + scale.extra}
        run = next((report.store.run(name) for own in names.values() for name in own), None) or {}
        count = run.get("parameters")
        divergences = [report.kl(task, name) for task, own in names.items() for name in own]
        known = [kl for kl in divergences if kl is not None]
        rows.append(
            [
                scale.kinds[kind].label, report.lr(kind), f"{count:,} / {4 * count:,}" if count else NOT_RUN,
                f"{mean(known):.2f}" if known else NOT_RUN,
                *(report.over(task, own) for task, own in names.items()),
            ]
        )  # fmt: skip
    head = ["kind", "lr", "numbers / bytes", "KL per token", *scale.tasks, *scale.extra]
    return table(head, rows)


def mixed(report: Report) -> str:
    """Mean accuracy over the members' tasks, and retention of the gain."""
    scale, rows = report.scale, []
    for group in groups(scale, scale.compared[0], scale.seeds[0]):
        for mode in ("alone", *MODES):
            cells = []
            found = {kind: rows_of(report, kind, group, mode) for kind in kinds(report.store, scale)}
            for kind, own in found.items():
                if not own:
                    cells.append(NOT_RUN)
                    continue
                value, low, high = seeds_interval(list(own.values()))
                text = f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
                kept = [] if mode == "alone" else retention(report, kind, group, mode)
                each = ", ".join(f"{100 * share:.0f}" for share in kept)
                cells.append(
                    f"{text} ({len(own)} seed{'s' * (len(own) > 1)})"
                    + (f", keeps {100 * mean(kept):.0f} %" if kept else "")
                    + (f" ({each})" if len(kept) > 1 else "")
                )
            ours, theirs = (found[kind] for kind in scale.compared)
            difference = NOT_RUN
            if ours and theirs:
                value, low, high = paired_seeds(list(ours.values()), list(theirs.values()))
                difference = f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
            rows.append([" + ".join(group) if mode == "alone" else "", mode, *cells, difference])
    labels = [scale.kinds[kind].label for kind in kinds(report.store, scale)]
    return table(["experts", "mixture", *labels, "SVF - LoRA 16"], rows)


def by_task(report: Report) -> str:
    """Every mixture on every member, with the tuned α."""
    scale, rows = report.scale, []
    for group in groups(scale, scale.compared[0], scale.seeds[0]):
        for mode in MODES:
            for kind in kinds(report.store, scale):
                if group not in groups(scale, kind, scale.seeds[0]):
                    continue
                cells = []
                for task in scale.tasks + scale.extra:
                    names = [who(report, kind, seed, group, mode) for seed in seeds(scale, kind)]
                    own = [n for n in names if n is not None and report.store.has(task, n)]
                    cells.append(report.over(task, own) if task in group else "")
                weights = [weights_of(report, kind, seed, group, mode) for seed in seeds(scale, kind)]
                told = (
                    "; ".join(", ".join(f"{a:.2g}" for a in w.values()) for w in weights if w)
                    if mode == "tuned"
                    else ""
                )
                rows.append([len(group), mode, scale.kinds[kind].label, told, *cells])
    return table(["experts", "mixture", "kind", "α by seed", *scale.tasks, *scale.extra], rows)


def crossed_matrix(report: Report) -> str:
    """Effect of an expert on the other tasks."""
    parts, every = [], crossed(report.scale)
    for kind in report.scale.compared:
        rows = []
        for expert in every:
            name = single(report.store, report.scale, kind, expert, report.scale.seeds[0])
            rows.append([expert, *(change(report, task, name) for task in every)])
        parts.append(f"{report.scale.kinds[kind].label}, first seed: accuracy less the base's\n\n"
                     + table(["expert \\ task", *every], rows))  # fmt: skip
    return "\n\n".join(parts)


def change(report: Report, task: str, name: str | None) -> str:
    """Accuracy less the base's."""
    ours, base = report.result(task, name), report.result(task, BASE)
    return NOT_RUN if ours is None or base is None else f"{100 * (ours.accuracy - base.accuracy):+.1f}"


def geometry_table(report: Report) -> str:
    """Size and similarity of the updates."""
    rows = []
    for kind in report.scale.compared:
        found = report.store.fact(f"geometry-{kind}")
        if found is None:
            rows.append([report.scale.kinds[kind].label, *[NOT_RUN] * 4])
            continue
        pairs = found["pairs"]
        rows.append(
            [
                report.scale.kinds[kind].label, f"{100 * mean(list(found['norm'].values())):.2f} %",
                *(_spread([pair[key] for pair in pairs]) for key in ("cosine", "overlap", "activation")),
            ]
        )  # fmt: skip
    head = ["kind", "size ‖ΔW‖/‖W‖", "cosine of ΔW", "overlap of top 16", "cosine of hidden states' change"]
    return table(head, rows)


def curves(report: Report) -> str:
    """Common α on validation."""
    rows = []
    for kind in kinds(report.store, report.scale):
        for point in points(report, kind, report.scale.tasks):
            rows.append([report.scale.kinds[kind].label, f"{point[0]:g}", f"{100 * point[1]:.1f}", f"{point[2]:.2f}"])
    return table(["kind", "α", "mean accuracy", "KL per token"], rows) if rows else NOT_RUN


def points(report: Report, kind: str, group: Sequence[str]) -> list[tuple[float, float, float]]:
    """(α, mean accuracy, mean KL) of common α on validation, over seeds."""
    tried: dict[float, list[Mapping[str, Any]]] = {}
    for seed in seeds(report.scale, kind):
        for entry in (report.store.fact(fact(kind, seed, group)) or {}).get("tried", []):
            if entry["kl"]:
                tried.setdefault(next(iter(entry["weights"].values())), []).append(entry)
    return [
        (alpha, mean([mean(list(e["accuracy"].values())) for e in entries]),
         mean([mean(list(e["kl"].values())) for e in entries]))
        for alpha, entries in sorted(tried.items())
    ]  # fmt: skip


def plots(report: Report) -> None:
    """Retention by the number of experts; accuracy by KL."""
    canvas = figure(9, 3.6)
    left, right = canvas.subplots(1, 2)
    for kind in kinds(report.store, report.scale):
        for mode, style in (("average", "--"), ("sum", ":"), ("tuned", "-")):
            sizes = {
                len(group): mean(kept)
                for group in groups(report.scale, kind, report.scale.seeds[0])
                if group != report.scale.conflict and (kept := retention(report, kind, group, mode))
            }
            color = f"C{(*report.scale.compared, *FIRST_SEED).index(kind)}"
            label = f"{report.scale.kinds[kind].label}, {mode}"
            left.plot(list(sizes), list(sizes.values()), style, color=color, marker="o", markersize=3, label=label)
        found = points(report, kind, report.scale.tasks)
        right.plot([p[2] for p in found], [p[1] for p in found], "o-", label=report.scale.kinds[kind].label)
    left.set(xlabel="experts mixed", ylabel="share of the gain that is left")
    left.legend(fontsize=5)
    right.set(xlabel="KL to the base per token", ylabel=f"mean accuracy, {len(report.scale.tasks)} mixed (validation)")
    right.legend(fontsize=6)
    save_png(canvas, report.picture("composition"))


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):+.2f} ({min(values):+.2f} to {max(values):+.2f})" if values else "none"
