"""Tables 8 and 10: how many examples, and how long a search; IA3 trained on the same examples. Fig. 7: α per layer."""

from __future__ import annotations

from typing import Any

from reproduction.banks import bank_of
from reproduction.lab import Lab
from reproduction.names import BASE, best_rate, next_rate
from reproduction.report import NOT_RUN, Report, table
from reproduction.stages.strategies import search_on, searched_cell
from sigmix.engine import Engine
from sigmix.evals.plots import figure, save_png
from sigmix.train.config import make_config
from sigmix.train.objectives import Learner
from sigmix.train.policy import make_policy
from sigmix.train.rollout import Actor

IA3_LRS = (3e-3, 1e-2, 3e-2)

FULL = (10,)
"""Numbers of examples that the full search is run with; it takes too long for all of them."""


class FewShot:
    """Few-shot adaptation of one unseen task."""

    name, title = "fewshot", "Tables 8 and 10: shots, search budgets, IA3 on equal data"
    needs = ("sweep",)

    def run(self, lab: Lab) -> None:
        """CEM light with all shots, full with some, IA3, and a search of α per layer."""
        task = lab.scale.few_shot
        lab.base_cells([task])
        wanted = [("light", shots) for shots in lab.scale.shots] + [("full", shots) for shots in FULL] + [("layer", 10)]
        if not all(lab.store.has(task, self.who(*one)) for one in wanted):
            bank = bank_of(lab, "all", lab.scale.tasks + lab.scale.extra, lab.scale.seeds[0])
            model, tokenizer = lab.base()
            engine = Engine(model, tokenizer, bank=bank)
            for settings, shots in wanted:
                if lab.store.has(task, self.who(settings, shots)):
                    continue
                options = {"granularity": "layer"} if settings == "layer" else {"settings": settings}
                search = search_on(lab, engine, task, shots, **options)
                searched_cell(lab, engine, task, self.who(settings, shots), search)
        self._ia3(lab, task)

    @staticmethod
    def who(settings: str, shots: int) -> str:
        """Name of a cell."""
        return f"few-{settings}-{shots}"

    def _ia3(self, lab: Lab, task: str) -> None:
        if lab.store.fact("few-ia3-lr") is None:
            lab.store.write_fact("few-ia3-lr", lab.timed(lambda: self._sweep(lab, task)))
        rate = (lab.store.fact("few-ia3-lr") or {})["best"]
        for shots in lab.scale.shots:
            if not lab.store.has(task, self.who("ia3", shots)):
                self._tuned(lab, task, shots, rate, test=True)

    def _sweep(self, lab: Lab, task: str) -> dict[str, Any]:
        """Learning rate by validation items, which the searches never see: in IA3's favour."""
        found: dict[float, float] = {}
        while (lr := next_rate(found, IA3_LRS)) is not None:
            found[lr] = self._tuned(lab, task, 10, lr, test=False)
        return {"validation": {f"{lr:g}": value for lr, value in found.items()}, "best": best_rate(found)}

    def _tuned(self, lab: Lab, task: str, shots: int, lr: float, test: bool) -> float:
        """Train PEFT's IA3 on the gold answers of some examples; its accuracy on validation, or a test cell."""
        scale, made = lab.scale, lab.task(task)
        steps = scale.ia3_steps
        config = make_config(
            scale.preset, task=task, base=scale.base, policy="ia3", objective="sft", beta=0.0,
            generation_batch_size=shots, num_generations=1, learning_rate=lr, max_steps=steps,
            lr_scheduler_type="constant",
        )  # fmt: skip
        model, tokenizer = lab.base()
        policy = make_policy(model, config)
        actor = Actor(policy.model, tokenizer, made)
        learner = Learner(policy, actor, config, made.max_new_tokens)
        examples = lab.samples(task, "train", shots)
        for step in range(steps):
            learner.step(step, examples)
        if test:
            lab.cell(task, self.who("ia3", shots), policy.model, tokenizer, policy.acting, policy.reference, lr=lr)
            return 0.0
        samples = lab.samples(task, "validation", scale.validation)
        return lab.measured(task, samples, policy.model, tokenizer, policy.acting)[0].accuracy

    def tables(self, report: Report) -> str:
        """By shots, then the layers."""
        scale, task = report.scale, report.scale.few_shot
        rows = []
        labels = {"light": "strategy C, CEM light", "full": "strategy C, CEM full"}
        for settings, label in {**labels, "ia3": f"IA3, {scale.ia3_steps} steps"}.items():
            cells = []
            for shots in scale.shots:
                who = self.who(settings, shots)
                known = report.store.has(task, who)
                text = f"{report.accuracy(task, who)} ({report.against(task, who, BASE)})" if known else NOT_RUN
                about = report.store.fact(f"{who}-{task}")
                cells.append(text + (f", {about['candidates']} mixtures" if about else ""))
            rows.append([label, *cells])
        rates = (report.store.fact("few-ia3-lr") or {}).get("validation")
        told = f"Task {task}; base {report.base(task)}, best constant {report.constant(task)}. One seed."
        if rates:
            found = "; ".join(f"{lr}: {100 * rates[lr]:.1f}" for lr in sorted(rates, key=float))
            told += f" IA3's validation accuracy by learning rate: {found}."
        return (
            table(["", *(f"{shots} examples" for shots in scale.shots)], rows)
            + f"\n\n{told}\n\n"
            + self._layers(report)
        )

    def _layers(self, report: Report) -> str:
        task = report.scale.few_shot
        about = report.store.fact(f"{self.who('layer', 10)}-{task}")
        if about is None:
            return f"α per layer (Figure 7): {NOT_RUN}"
        means = {name: sum(alphas) / len(alphas) for name, alphas in about["weights"].items()}
        told = ", ".join(f"{name} {alpha:.2f}" for name, alpha in means.items())
        accuracy = report.accuracy(task, self.who("layer", 10))
        found = f"α per layer on 10 examples (Figure 7): accuracy {accuracy}; mean α over the layers: {told}."
        return f"{found}\n\n{report.image('α per layer', 'layers')}"

    def plots(self, report: Report) -> None:
        """α by layer and expert."""
        about = report.store.fact(f"{self.who('layer', 10)}-{report.scale.few_shot}")
        if about is None or not about["weights"]:  # a search may find the base
            return
        canvas = figure(8, 2.4)
        axes = canvas.subplots()
        names = list(about["weights"])
        drawn = axes.imshow([about["weights"][name] for name in names], aspect="auto", cmap="viridis", vmin=0)
        axes.set(yticks=range(len(names)), yticklabels=names, xlabel="layer", title="α found on 10 examples")
        canvas.colorbar(drawn)
        save_png(canvas, report.picture("layers"))
