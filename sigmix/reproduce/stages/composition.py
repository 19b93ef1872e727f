"""Do singular-value experts compose better than LoRA experts? The same tasks, data, loop and tuning for each kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from sigmix.evals.plots import figure, save_png
from sigmix.reproduce.blend import Blend
from sigmix.reproduce.compose import average, geometry, total, tune
from sigmix.reproduce.lab import Lab
from sigmix.reproduce.names import BASE, chosen_lr, mix_name, single
from sigmix.reproduce.report import NOT_RUN, Report, marks, mean, table
from sigmix.reproduce.scale import Scale

EVERY_SEED = ("svf-rl", "lora-rl")
FIRST_SEED = ("lora-small-rl", "lora-kl-rl")
MODES = ("average", "sum", "tuned")


def kinds(store: Any, scale: Scale) -> list[str]:
    """The kinds that are compared; the one at SVF's KL only if it is not the sweep's best anyway."""
    same = chosen_lr(store, scale, "lora-kl-rl") == chosen_lr(store, scale, "lora-rl")
    return [kind for kind in (*EVERY_SEED, *FIRST_SEED) if not (kind == "lora-kl-rl" and same)]


def seeds(scale: Scale, kind: str) -> tuple[int, ...]:
    """Which seeds of a kind are trained."""
    return scale.seeds if kind in EVERY_SEED else scale.seeds[:1]


def groups(scale: Scale, kind: str, seed: int) -> list[tuple[str, ...]]:
    """Which experts are mixed: two, three (all seeds), all (first seed); and the pair in conflict (first seed, of the
    two kinds that are compared most)."""
    found = [scale.tasks[:count] for count in range(2, len(scale.tasks) + 1)]
    if seed == scale.seeds[0]:
        found.append(scale.tasks + scale.extra)
        if scale.conflict and kind in EVERY_SEED:
            found.append(scale.conflict)
    return list(dict.fromkeys(found))


def crossed(scale: Scale) -> tuple[str, ...]:
    """Experts that are also measured on each other's tasks: those of every seed, and the pair in conflict."""
    return tuple(dict.fromkeys(scale.tasks + (scale.conflict or ())))


def fact(kind: str, seed: int, members: Sequence[str]) -> str:
    """Name of the tuning's record."""
    return f"tuned-{kind}-s{seed}-{'+'.join(members)}"


class Composition:
    """The experiment that nobody has run."""

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
        main = seed == first and kind in EVERY_SEED
        for task, (name, _) in trained.items():
            others = crossed(scale) if main and task in crossed(scale) else ()
            for other in dict.fromkeys([task, *others]):
                reference = blend.reference if other == task else None
                lab.cell(other, name, blend.model, tokenizer, lambda task=task: blend.under({task: 1.0}), reference)
        if main and lab.store.fact(f"geometry-{kind}") is None:
            lab.store.write_fact(f"geometry-{kind}", geometry(lab, blend, tokenizer, members))
        for group in groups(scale, kind, seed):
            found = lab.store.fact(fact(kind, seed, group))
            if found is None:
                found = lab.timed(lambda group=group: tune(lab, blend, tokenizer, group))
                lab.store.write_fact(fact(kind, seed, group), found)
            for weights in (average(group), total(group), found["weights"]):
                lab.mixed_cells(blend, tokenizer, kind, seed, weights, group)

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
        parts = [f"### {head}\n\n{self.parts[name](self, report)}" for name, head in heads.items()]
        return "\n\n".join([*parts, "![Composition](composition.png)"])

    def _alone(self, report: Report) -> str:
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

    def weights(self, report: Report, kind: str, seed: int, group: Sequence[str], mode: str) -> dict[str, float] | None:
        """α of a mode; None for a tuning that was not run."""
        if mode == "average":
            return average(group)
        if mode == "sum":
            return total(group)
        return (report.store.fact(fact(kind, seed, group)) or {}).get("weights")

    def who(self, report: Report, kind: str, seed: int, group: Sequence[str], mode: str) -> str | None:
        """Name of a mixture's cells."""
        rate = chosen_lr(report.store, report.scale, kind)
        weights = self.weights(report, kind, seed, group, mode)
        return None if rate is None or weights is None else mix_name(kind, rate, weights, seed)

    def _rows(self, report: Report, kind: str, group: Sequence[str], mode: str) -> dict[int, list[bool]]:
        """{seed: marks on all members' items in turn} of complete mixtures."""
        found = {}
        for seed in seeds(report.scale, kind):
            if group not in groups(report.scale, kind, seed):
                continue
            if mode == "alone":
                results = [report.result(task, single(report.store, report.scale, kind, task, seed)) for task in group]
            elif mode == BASE:
                results = [report.result(task, BASE) for task in group]
            else:
                results = [report.result(task, self.who(report, kind, seed, group, mode)) for task in group]
            if all(one is not None for one in results):
                found[seed] = [mark for one in results if one is not None for mark in marks(one)]
        return found

    def retention(self, report: Report, kind: str, group: Sequence[str], mode: str) -> list[float]:
        """Per seed: share of the experts' gain over the base that is left in the mixture, over the members' tasks."""
        ours, alone = self._rows(report, kind, group, mode), self._rows(report, kind, group, "alone")
        base = self._rows(report, kind, group, BASE)
        return [
            (mean(ours[seed]) - mean(base[seed])) / (mean(alone[seed]) - mean(base[seed]))
            for seed in ours
            if seed in alone and seed in base and mean(alone[seed]) > mean(base[seed])
        ]

    def _mixed(self, report: Report) -> str:
        from sigmix.evals.stats import paired_seeds, seeds_interval

        scale, rows = report.scale, []
        for group in groups(scale, EVERY_SEED[0], scale.seeds[0]):
            for mode in ("alone", *MODES):
                cells = []
                found = {kind: self._rows(report, kind, group, mode) for kind in kinds(report.store, scale)}
                for kind, own in found.items():
                    if not own:
                        cells.append(NOT_RUN)
                        continue
                    value, low, high = seeds_interval(list(own.values()))
                    text = f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
                    kept = [] if mode == "alone" else self.retention(report, kind, group, mode)
                    cells.append(text + (f", keeps {100 * mean(kept):.0f} %" if kept else "") + f" ({len(own)})")
                ours, theirs = found["svf-rl"], found["lora-rl"]
                difference = NOT_RUN
                if ours and theirs:
                    value, low, high = paired_seeds(list(ours.values()), list(theirs.values()))
                    difference = f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
                rows.append([" + ".join(group) if mode == "alone" else "", mode, *cells, difference])
        labels = [scale.kinds[kind].label for kind in kinds(report.store, scale)]
        return table(["experts", "mixture", *(f"{label} (seeds)" for label in labels), "SVF - LoRA 16"], rows)

    def _tasks(self, report: Report) -> str:
        scale, rows = report.scale, []
        for group in groups(scale, EVERY_SEED[0], scale.seeds[0]):
            for mode in MODES:
                for kind in kinds(report.store, scale):
                    if group not in groups(scale, kind, scale.seeds[0]):
                        continue
                    cells = []
                    for task in scale.tasks + scale.extra:
                        names = [self.who(report, kind, seed, group, mode) for seed in seeds(scale, kind)]
                        own = [n for n in names if n is not None and report.store.has(task, n)]
                        cells.append(report.over(task, own) if task in group else "")
                    weights = [self.weights(report, kind, seed, group, mode) for seed in seeds(scale, kind)]
                    told = (
                        "; ".join(", ".join(f"{a:.2g}" for a in w.values()) for w in weights if w)
                        if mode == "tuned"
                        else ""
                    )
                    rows.append([len(group), mode, scale.kinds[kind].label, told, *cells])
        return table(["experts", "mixture", "kind", "α by seed", *scale.tasks, *scale.extra], rows)

    def _crossed(self, report: Report) -> str:
        parts, every = [], crossed(report.scale)
        for kind in EVERY_SEED:
            rows = []
            for expert in every:
                name = single(report.store, report.scale, kind, expert, report.scale.seeds[0])
                rows.append([expert, *(self._change(report, task, name) for task in every)])
            parts.append(f"{report.scale.kinds[kind].label}, first seed: accuracy less the base's\n\n"
                         + table(["expert \\ task", *every], rows))  # fmt: skip
        return "\n\n".join(parts)

    @staticmethod
    def _change(report: Report, task: str, name: str | None) -> str:
        ours, base = report.result(task, name), report.result(task, BASE)
        return NOT_RUN if ours is None or base is None else f"{100 * (ours.accuracy - base.accuracy):+.1f}"

    def _geometry(self, report: Report) -> str:
        rows = []
        for kind in EVERY_SEED:
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

    def _curves(self, report: Report) -> str:
        rows = []
        for kind in kinds(report.store, report.scale):
            for point in self._points(report, kind, report.scale.tasks):
                rows.append(
                    [report.scale.kinds[kind].label, f"{point[0]:g}", f"{100 * point[1]:.1f}", f"{point[2]:.2f}"]
                )
        return table(["kind", "α", "mean accuracy", "KL per token"], rows) if rows else NOT_RUN

    def _points(self, report: Report, kind: str, group: Sequence[str]) -> list[tuple[float, float, float]]:
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

    def plots(self, report: Report) -> None:
        """Retention by the number of experts; accuracy by KL."""
        canvas = figure(9, 3.6)
        left, right = canvas.subplots(1, 2)
        for kind in kinds(report.store, report.scale):
            for mode, style in (("average", "--"), ("sum", ":"), ("tuned", "-")):
                sizes = {
                    len(group): mean(kept)
                    for group in groups(report.scale, kind, report.scale.seeds[0])
                    if group != report.scale.conflict and (kept := self.retention(report, kind, group, mode))
                }
                color = f"C{(*EVERY_SEED, *FIRST_SEED).index(kind)}"
                label = f"{report.scale.kinds[kind].label}, {mode}"
                left.plot(list(sizes), list(sizes.values()), style, color=color, marker="o", markersize=3, label=label)
            points = self._points(report, kind, report.scale.tasks)
            right.plot([p[2] for p in points], [p[1] for p in points], "o-", label=report.scale.kinds[kind].label)
        left.set(xlabel="experts mixed", ylabel="share of the gain that is left")
        left.legend(fontsize=5)
        right.set(
            xlabel="KL to the base per token", ylabel=f"mean accuracy, {len(report.scale.tasks)} mixed (validation)"
        )
        right.legend(fontsize=6)
        save_png(canvas, report.store.folder / "composition.png")

    parts: ClassVar[dict[str, Callable[..., str]]] = {
        "alone": _alone,
        "mixed": _mixed,
        "tasks": _tasks,
        "crossed": _crossed,
        "geometry": _geometry,
        "curves": _curves,
    }


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):+.2f} ({min(values):+.2f} to {max(values):+.2f})" if values else "none"
