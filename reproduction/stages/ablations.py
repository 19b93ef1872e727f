"""Ablations: baseline and KL estimator, z's parameterisation, the sketch."""

from __future__ import annotations

from typing import Any

import torch

from reproduction.lab import Lab
from reproduction.names import single
from reproduction.report import NOT_RUN, Report, table
from sigmix.experts.expert import Expert
from sigmix.experts.fingerprint import TOLERANCE, Sketch, deviation

LOSSES = ("svf-none", "svf-mean", "svf-k3", "svf-reference")

class Ablations:
    """Ablations of design choices."""

    name, title = "ablations", "Ablations of ours"
    needs = ("sweep", "table1")

    def run(self, lab: Lab) -> None:
        """First seed, on the sweep's task."""
        lab.base_cells([lab.scale.sweep])
        for kind in ("svf-rl", *LOSSES):
            lab.single_cells(kind, lab.scale.sweep, lab.scale.seeds[0])
        if lab.store.fact("sketches") is None:
            lab.store.write_fact("sketches", lab.timed(lambda: self._sketches(lab)))

    @staticmethod
    def _sketches(lab: Lab) -> dict[str, Any]:
        """Largest deviation of an expert's sketches when the basis is computed anew."""
        expert = Expert.from_pretrained(lab.trained("svf-rl", lab.scale.tasks[0], lab.scale.seeds[0])[1])
        stored = {path: Sketch.from_json(value) for path, value in expert.meta["sketches"].items()}
        before, rows = torch.get_num_threads(), []
        try:
            for dtype in ("bfloat16", "float32"):
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    model, _ = lab.base(dtype=dtype)
                    fresh = _fresh_sketches(model, expert)
                    found = [deviation(stored[path], fresh[path]) for path in stored]
                    rows.append(
                        {"dtype": dtype, "threads": threads, "worst": max(found), "mean": sum(found) / len(found)}
                    )
        finally:
            torch.set_num_threads(before)
        return {"made_in": expert.meta["base"]["dtype"], "tolerance": TOLERANCE, "rows": rows}

    def tables(self, report: Report) -> str:
        """Two tables."""
        seed = report.scale.seeds[0]
        rows = []
        sweep = report.scale.sweep
        ours = single(report.store, report.scale, "svf-rl", sweep, seed)
        for kind in ("svf-rl", *LOSSES):
            name = single(report.store, report.scale, kind, sweep, seed)
            label = "leave-one-out, exact KL, direct z (ours)" if kind == "svf-rl" else report.scale.kinds[kind].label
            kl = report.kl(sweep, name)
            told = [report.lr(kind), report.accuracy(sweep, name), NOT_RUN if kl is None else f"{kl:.2f}"]
            rows.append([label, *told, "" if kind == "svf-rl" else report.against(sweep, name, ours)])
        found = report.store.fact("sketches")
        sketches = NOT_RUN
        if found:
            sketches = table(
                ["decomposed in", "threads", "worst deviation", "mean"],
                [[r["dtype"], r["threads"], f"{r['worst']:.2g}", f"{r['mean']:.2g}"] for r in found["rows"]],
            ) + f"\n\nThe expert was made in {found['made_in']}; the tolerance is {found['tolerance']:g}."  # fmt: skip
        return "\n\n".join(
            [
                "### Baseline, KL estimator, parameterisation (first seed)",
                table(["", "lr", sweep, "KL per token", "against ours"], rows),
                "### Sketches across dtype and threads", sketches,
            ]
        )  # fmt: skip


def _fresh_sketches(model: Any, expert: Expert) -> dict[str, Sketch]:
    """Sketches of an expert on a base that is decomposed anew, past the cache."""
    from peft import inject_adapter_in_model

    from sigmix.svf.config import SVFConfig

    inject_adapter_in_model(SVFConfig(target_modules="all-linear", cache=False, inference_mode=True), model, "fresh")
    sealed = Expert(expert.name, expert.z).sealed(model)
    return {path: Sketch.from_json(value) for path, value in sealed.meta["sketches"].items()}
