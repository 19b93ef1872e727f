"""SVF's mixtures against methods that merge LoRA adapters, on the experts of the composition experiment."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from reproduction.compose import fact
from reproduction.lab import Lab
from reproduction.merging import METHODS, Merging, tune_merging
from reproduction.report import NOT_RUN, Report, mean, table
from reproduction.scale import Scale
from reproduction.seeds import seeds_interval
from reproduction.stages.groups import MODES, groups, retention, rows_of


class MergingMethods:
    """Each method, tuned on as many validation measurements as α of the weighted sum."""

    name, title = "merging", "SVF's mixtures against methods that merge LoRA adapters"
    needs = ("composition",)

    def run(self, lab: Lab) -> None:
        """Merge the experts of every seed."""
        for seed in lab.scale.seeds:
            for kind in lab.scale.compared:
                self._one(lab, kind, seed)

    def _one(self, lab: Lab, kind: str, seed: int) -> None:
        policy = lab.scale.kinds[kind].policy
        chosen = _groups(lab.scale, kind, seed)
        members = dict.fromkeys(task for group in chosen for task in group)
        folders = {task: lab.trained(kind, task, seed)[1] for task in members}
        model, tokenizer = lab.base()
        merging = Merging(model, folders, policy)
        for group in chosen:
            for merging.rule in METHODS[policy]:
                found = lab.store.fact(fact(kind, seed, group, merging.rule))
                if found is None:
                    found = lab.timed(partial(tune_merging, lab, merging, tokenizer, group))
                    lab.store.write_fact(fact(kind, seed, group, merging.rule), found)
                merging.density = found["density"] or 1.0  # of a rule without one it is not used
                lab.mixed_cells(merging, tokenizer, kind, seed, found["weights"], group)

    def tables(self, report: Report) -> str:
        """Mean accuracy, share of the gain that is kept, and share of each expert's right items that stay right."""
        scale, rows = report.scale, []
        for group in _groups(scale, scale.compared[0], scale.seeds[0]):
            title = " + ".join(group)
            for kind in scale.compared:
                for mode in ("alone", *MODES, *METHODS[scale.kinds[kind].policy]):
                    found = rows_of(report, kind, group, mode)
                    cells = [NOT_RUN] * 3
                    if found:
                        value, low, high = seeds_interval(list(found.values()))
                        kept, still = retention(report, kind, group, mode), _still(report, kind, group, mode)
                        cells = [
                            f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}] ({len(found)})",
                            f"{100 * mean(kept):.0f} %" if kept else "", f"{100 * mean(still):.1f} %" if still else "",
                        ]  # fmt: skip
                    rows.append([title, scale.kinds[kind].label, mode, *cells])
                    title = ""
        head = ["experts", "kind", "method", "mean accuracy (seeds)", "keeps of the gain", "right items still right"]
        return table(head, rows)


def _groups(scale: Scale, kind: str, seed: int) -> list[tuple[str, ...]]:
    return [group for group in groups(scale, kind, seed) if group != scale.conflict]


def _still(report: Report, kind: str, group: Sequence[str], mode: str) -> list[float]:
    """Return per seed: the share of items that their own expert solves which the merge solves, too."""
    alone = rows_of(report, kind, group, "alone")
    return [
        mean([merged for merged, before in zip(right, alone[seed], strict=True) if before])
        for seed, right in rows_of(report, kind, group, mode).items()
        if any(alone.get(seed, ()))
    ]
