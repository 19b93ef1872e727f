"""Table 2: strategies A to D on tasks that nothing was trained on, best of LoRA; Table 3: cost of the first pass;
Fig. 6: accuracy of dispatch."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from reproduction.banks import bank_of, with_classifier
from reproduction.blend import Blend
from reproduction.lab import Lab
from reproduction.names import BASE, single
from reproduction.report import NOT_RUN, Report, table
from sigmix.adapt.base import Strategy
from sigmix.adapt.classifier import ClassifierDispatch
from sigmix.adapt.few_shot import Example, FewShotSearch
from sigmix.adapt.prompt import PromptDispatch
from sigmix.adapt.router import RouterDispatch, unrouted
from sigmix.engine import Engine
from sigmix.evals.dispatch import add_statistics, confusion, plot, requests, unseen_tasks
from sigmix.evals.statistics import wilson
from sigmix.experts.bank import Bank
from sigmix.experts.mix import Mix

LETTERS = ("A", "B", "C", "D")

SHOTS = 10


def search_on(lab: Lab, engine: Engine, task: str, shots: int, **options: Any) -> FewShotSearch:
    """Strategy C on training items of a task, or of the one that stands for it."""
    task = lab.scale.examples.get(task, task)
    made = lab.task(task)
    given = [Example(one.prompt, one.gold, one) for one in lab.samples(task, "train", shots)]
    return FewShotSearch(
        engine, given, lambda example, reply: made.score(example.extra, reply).value or 0.0,
        max_new_tokens=made.max_new_tokens, **{"settings": "light", **options, **lab.scale.search},
    )  # fmt: skip


def searched_cell(lab: Lab, engine: Engine, task: str, who: str, search: FewShotSearch) -> None:
    """A cell under what a search finds, and what it found."""
    lab.strategy_cell(task, who, engine, search)
    assert search.result is not None  # deciding searched
    about = {**search.evidence(), "mix": search.result.id, "weights": search.result.to_json()["weights"]}
    lab.store.write_fact(f"{who}-{task}", about)


def ready(lab: Lab) -> Engine:
    """An engine on the reproduction's own bank: an expert for every task, and B's."""
    scale = lab.scale
    bank = bank_of(lab, "all", scale.tasks + scale.extra, scale.seeds[0])
    with_classifier(lab, bank, scale.classifier_steps)
    model, tokenizer = lab.base()
    return Engine(model, tokenizer, bank=bank)


def router_of(lab: Lab, engine: Engine) -> RouterDispatch:
    """Strategy D, on statistics of training prompts (kept with the experts in the work folder)."""
    assert isinstance(engine.bank, Bank)  # of `ready`
    for name in unrouted(engine.bank, engine.base_fingerprint):
        add_statistics(engine, engine.bank, name, lab.data_dir)
    return RouterDispatch(engine)


class Strategies:
    """Tables 2 and 3."""

    name, title = "table2", "Tables 2 and 3: strategies on unseen tasks, and what they cost"
    needs = ("sweep",)

    def run(self, lab: Lab) -> None:
        """Strategies, every expert alone, and the LoRA that is best by validation, on the unseen tasks."""
        scale = lab.scale
        wanted = [BASE, *LETTERS, *(f"expert-{task}" for task in scale.tasks + scale.extra)]
        missing = [task for task in scale.unseen if not all(lab.store.has(task, self.who(w)) for w in wanted)]
        if missing:
            engine = ready(lab)
            made: dict[str, Strategy | Mix] = {
                "A": PromptDispatch(engine), "B": ClassifierDispatch(engine), "D": router_of(lab, engine),
                BASE: Mix.base(), **{f"expert-{task}": Mix.one(task) for task in scale.tasks + scale.extra},
            }  # fmt: skip
            for task in missing:
                for name in wanted:
                    if lab.store.has(task, self.who(name)):
                        continue
                    if name == "C":
                        searched_cell(lab, engine, task, self.who(name), search_on(lab, engine, task, SHOTS))
                    else:
                        lab.strategy_cell(task, self.who(name), engine, made[name])
        for task in scale.unseen:
            if lab.store.fact(f"best-lora-{task}") is None:
                lab.store.write_fact(f"best-lora-{task}", lab.timed(partial(self._best_lora, lab, task)))
            best = (lab.store.fact(f"best-lora-{task}") or {})["best"]
            lab.single_cells(scale.peer, best, scale.seeds[0], on=[task])

    @staticmethod
    def who(name: str) -> str:
        """Cell of a strategy; the base's is the one that every stage shares."""
        return BASE if name == BASE else f"strategy-{name}"

    @staticmethod
    def _best_lora(lab: Lab, task: str) -> dict[str, Any]:
        """Which LoRA adapter is best on a task's validation items (more than any strategy may see)."""
        scale, every = lab.scale, lab.scale.tasks + lab.scale.extra
        task = scale.examples.get(task, task)
        samples = lab.samples(task, "validation", scale.validation)
        model, tokenizer = lab.base()
        blend = Blend(model, {one: lab.trained(scale.peer, one, scale.seeds[0])[1] for one in every}, "lora")

        def value(one: str) -> float:
            result, _ = lab.measured(task, samples, blend.model, tokenizer, lambda: blend.under({one: 1.0}))
            return result.accuracy

        found = {one: value(one) for one in every}
        return {"validation": found, "best": max(found, key=lambda member: found[member])}

    def tables(self, report: Report) -> str:
        """Accuracies, differences to the base, choices; then seconds and tokens of the passes."""
        scale, every = report.scale, report.scale.tasks + report.scale.extra
        rows: list[list[Any]] = [["base", *(f"{report.base(task)}" for task in scale.unseen)]]
        rows.append(["best constant answer", *(report.constant(task) for task in scale.unseen)])
        for letter in LETTERS:
            rows.append([f"strategy {letter}", *(self._cell(report, task, self.who(letter)) for task in scale.unseen)])
        best = [(report.store.fact(f"best-lora-{task}") or {}).get("best") for task in scale.unseen]
        loras = [single(report.store, scale, scale.peer, one, scale.seeds[0]) if one else None for one in best]
        cells = [
            self._cell(report, task, who) + (f" ({member})" if member else "")
            for task, who, member in zip(scale.unseen, loras, best, strict=True)
        ]
        rows.append(["best LoRA by validation", *cells])
        less = [report.against(task, self.who("C"), who) for task, who in zip(scale.unseen, loras, strict=True)]
        rows.append(["strategy C less the best LoRA", *less])
        for member in every:
            who = self.who(f"expert-{member}")
            rows.append([f"expert {member} alone", *(self._cell(report, task, who) for task in scale.unseen)])
        chosen = [[letter, *(self._chosen(report, task, letter) for task in scale.unseen)] for letter in LETTERS]
        costs = (
            "Seconds for all items of pass one / pass two, in per cent, and tokens that pass one read per item. C "
            "searches once for a task; its pass one is the whole search."
        )
        return "\n\n".join(
            [
                "Accuracy and, in brackets after it, the paired difference to the base.",
                table(["", *scale.unseen], rows),
                "What was chosen:",
                table(["strategy", *scale.unseen], chosen),
                "### Table 3: pass one and pass two",
                table(["strategy", *scale.unseen], self._costs(report)),
                costs,
            ]
        )  # fmt: skip

    @staticmethod
    def _cell(report: Report, task: str, who: str | None) -> str:
        text = report.accuracy(task, who)
        return text if text == NOT_RUN else f"{text} ({report.against(task, who, BASE)})"

    def _chosen(self, report: Report, task: str, letter: str) -> str:
        cell = report.store.cell(task, self.who(letter))
        if cell is None:
            return NOT_RUN
        short = {re.sub(r"\d+\.\d+", lambda α: f"{float(α[0]):.2f}", mix): n for mix, n in cell.facts["chosen"].items()}
        return ", ".join(f"{mix} {count}" for mix, count in list(short.items())[:4])

    def _costs(self, report: Report) -> list[list[str]]:
        rows = []
        for letter in LETTERS:
            cells = []
            for task in report.scale.unseen:
                cell = report.store.cell(task, self.who(letter))
                if cell is None:
                    cells.append(NOT_RUN)
                    continue
                one, two = cell.facts["pass1_seconds"], cell.facts["pass2_seconds"]
                share = f"{100 * one / two:.0f} %"
                cells.append(
                    f"{one:.1f} / {two:.1f} = {share}, {cell.facts['pass1_tokens'] / cell.facts['n']:.0f} tokens"
                )
            rows.append([letter, *cells])
        return rows


class Dispatch:
    """Figure 6."""

    name, title = "dispatch", "Figure 6: is the right expert chosen?"
    needs = ("sweep",)
    letters = ("A", "B", "D")

    def run(self, lab: Lab) -> None:
        """Test requests of every kind, of foreign tasks and of a foreign domain."""
        if all(lab.store.fact(f"dispatch-{letter}") for letter in self.letters):
            return
        engine = ready(lab)
        made: dict[str, PromptDispatch | ClassifierDispatch | RouterDispatch] = {
            "A": PromptDispatch(engine), "B": ClassifierDispatch(engine), "D": router_of(lab, engine),
        }  # fmt: skip
        found = requests(
            engine.bank, "test", lab.scale.per_label, unseen=unseen_tasks(engine.bank), data_dir=lab.data_dir
        )
        for letter in self.letters:
            if lab.store.fact(f"dispatch-{letter}") is None:
                names = [label.name for label in made[letter].labels]
                figures = lab.timed(partial(confusion, made[letter], found, names))
                items = figures.pop("items")
                short = [[one["truth"], one["label"]] for one in items]
                lab.store.write_fact(f"dispatch-{letter}", {**figures, "items": short})
                lab.say(f"dispatch {letter}: {100 * figures['accuracy']:.1f}")

    def tables(self, report: Report) -> str:
        """Right choices by what a request is."""
        found = {letter: report.store.fact(f"dispatch-{letter}") for letter in self.letters}
        done = {letter: fact for letter, fact in found.items() if fact}
        if not done:
            return NOT_RUN
        rows = []
        truths = list(dict.fromkeys(truth for truth, _ in next(iter(done.values()))["items"]))
        for truth in [*truths, None]:
            cells = []
            for letter in self.letters:
                if letter not in done:
                    cells.append(NOT_RUN)
                    continue
                own = [(t, label) for t, label in done[letter]["items"] if truth in (None, t)]
                right = sum(label == t.partition(":")[0] for t, label in own)
                low, high = wilson(right, len(own))
                cells.append(f"{right} of {len(own)}: {100 * right / len(own):.1f} [{100 * low:.1f}, {100 * high:.1f}]")
            rows.append([truth or "all", *cells])
        pictures = [report.image(f"Confusion of strategy {letter}", f"dispatch-{letter}") for letter in done]
        return table(["a request is", *self.letters], rows) + "\n\n" + "\n".join(pictures)

    def plots(self, report: Report) -> None:
        """Plot the confusion matrices."""
        for letter in self.letters:
            if figures := report.store.fact(f"dispatch-{letter}"):
                plot(figures, report.picture(f"dispatch-{letter}"))
