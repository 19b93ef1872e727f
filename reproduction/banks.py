"""Banks of the experts that a reproduction trained, without the bundled ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from reproduction.lab import Lab
from reproduction.names import chosen_lr
from sigmix.evals.dispatch import DispatchTask
from sigmix.experts.bank import Bank
from sigmix.experts.expert import Expert
from sigmix.train.config import make_config
from sigmix.train.trainer import Trainer

DISPATCH = "dispatch"


def bank_of(lab: Lab, name: str, tasks: Sequence[str], seed: int) -> Bank:
    """Return a bank of the SVF experts of some tasks, named after their tasks; train missing ones."""
    rate = chosen_lr(lab.store, lab.scale, "svf-rl")
    folder = lab.work / "banks" / f"{name}@{rate or 0:g}.s{seed}"  # another rate makes other experts
    with lab.held(f"bank-{folder.name}"):
        bank = Bank(folder, create=True)
        for task in tasks:
            if task not in bank:
                expert = Expert.from_pretrained(lab.trained("svf-rl", task, seed)[1])
                bank.add(replace(expert, name=task))
        return bank


def with_classifier(lab: Lab, bank: Bank, steps: int) -> Bank:
    """Add a classification expert (strategy B), trained on the experts' training prompts, to the bank."""
    with lab.held(f"classifier-{bank.folder.name}"):
        bank.refresh()
        if DISPATCH not in bank:
            _train_classifier(lab, bank, steps)
        return bank


def _train_classifier(lab: Lab, bank: Bank, steps: int) -> None:
    task = DispatchTask(bank, data_dir=lab.data_dir)
    settings: dict[str, Any] = {**lab.scale.training, "max_steps": steps, "eval_steps": steps}
    config = make_config(lab.scale.preset, **settings, task=DISPATCH, base=lab.scale.base, seed=lab.scale.seeds[0])
    folder = lab.work / "runs" / f"classifier-{bank.folder.name}"
    model, tokenizer = lab.base()
    trainer = Trainer(model, tokenizer, task, config, folder, DISPATCH)
    expert = trainer.fit(resume=(folder / "config.json").exists())
    assert expert is not None  # the policy is svf
    bank.add(replace(expert, name=DISPATCH))
    lab.store.write_fact("classifier", {"best": trainer.best, "steps": steps, "seconds": round(trainer.seconds, 1)})
    lab.say(f"classification expert: validation {trainer.best['accuracy']:.3f}")
