"""Ablations: the truncated form's budget, baseline and KL estimator, z's parameterisation, the sketch."""

from __future__ import annotations

from typing import Any

import torch

from reproduction.banks import bank_of
from reproduction.lab import Lab
from reproduction.names import single
from reproduction.report import NOT_RUN, Report, table
from sigmix.adapt.base import skills
from sigmix.engine import Engine
from sigmix.engine.truncation import fit
from sigmix.errors import ConfigError
from sigmix.evals.dispatch import prompts_of_experts
from sigmix.experts.expert import Expert
from sigmix.experts.fingerprint import TOLERANCE, Sketch, deviation
from sigmix.experts.mix import Mix

BUDGETS = (0.02, 0.1, 0.3, 0.6)

LOSSES = ("svf-none", "svf-mean", "svf-k3", "svf-reference")

PROMPTS = 96


class Ablations:
    """Ablations of design choices."""

    name, title = "ablations", "Ablations of ours"
    needs = ("sweep", "table1")

    def run(self, lab: Lab) -> None:
        """First seed; losses on the sweep's task, the truncated form on the first two."""
        tasks = lab.scale.tasks[:2]
        lab.base_cells([*tasks, lab.scale.sweep])
        for kind in ("svf-rl", *LOSSES):
            lab.single_cells(kind, lab.scale.sweep, lab.scale.seeds[0])
        self._truncated(lab, tasks)
        if lab.store.fact("sketches") is None:
            lab.store.write_fact("sketches", lab.timed(lambda: self._sketches(lab)))

    @staticmethod
    def who(budget: float) -> str:
        """Name of a cell."""
        return f"truncated-{budget:g}"

    def _truncated(self, lab: Lab, tasks: tuple[str, ...]) -> None:
        reached = [budget for budget in BUDGETS if not (lab.store.fact(self.who(budget)) or {}).get("out_of_reach")]
        if all(lab.store.has(task, self.who(budget)) for task in tasks for budget in reached):
            return
        bank = bank_of(lab, "all", lab.scale.tasks + lab.scale.extra, lab.scale.seeds[0])
        model, tokenizer = lab.base()
        engine = Engine(model, tokenizer, bank=bank)
        calibration = fit(engine, prompts_of_experts(bank, PROMPTS, data_dir=lab.data_dir), skills(bank))
        for budget in BUDGETS:
            try:
                engine.truncation = plan = calibration.plan(budget)
            except ConfigError as error:  # a finding about this bank, not a fault of the reproduction
                lab.store.write_fact(self.who(budget), {"out_of_reach": error.message})
                continue
            lab.store.write_fact(self.who(budget), {"work": plan.cost, "error": plan.error, "told": plan.describe()})
            for task in tasks:
                lab.strategy_cell(task, self.who(budget), engine, Mix.one(task), form="truncated")

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
        """Three tables."""
        tasks, seed = report.scale.tasks[:2], report.scale.seeds[0]
        rows = []
        sweep = report.scale.sweep
        ours = single(report.store, report.scale, "svf-rl", sweep, seed)
        for kind in ("svf-rl", *LOSSES):
            name = single(report.store, report.scale, kind, sweep, seed)
            label = "leave-one-out, exact KL, direct z (ours)" if kind == "svf-rl" else report.scale.kinds[kind].label
            kl = report.kl(sweep, name)
            told = [report.lr(kind), report.accuracy(sweep, name), NOT_RUN if kl is None else f"{kl:.2f}"]
            rows.append([label, *told, "" if kind == "svf-rl" else report.against(sweep, name, ours)])
        cut = [
            [
                "exact",
                "",
                "",
                *(report.accuracy(t, single(report.store, report.scale, "svf-rl", t, seed)) for t in tasks),
            ]
        ]
        for budget in BUDGETS:
            about = report.store.fact(self.who(budget))
            if about and "out_of_reach" in about:
                cut.append(
                    [f"{budget:g}", "out of reach", about["out_of_reach"].partition(": ")[2], *[""] * len(tasks)]
                )
                continue
            work = [f"{100 * about['work']:.0f} %", f"{100 * about['error']:.1f} %"] if about else [NOT_RUN] * 2
            cut.append([f"{budget:g}", *work, *(report.accuracy(task, self.who(budget)) for task in tasks)])
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
                "### Budget of the truncated form",
                table(["error budget", "extra work", "expected error", *tasks], cut),
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
