"""Table 5: an expert on another base, its z in order and shuffled; and where shapes forbid it.

z means something in its own basis only, and an expert refuses another base (`Expert.check`). Here that check is left
out on purpose, to see what is left: each z is put on the other base's own singular values, by rank.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from reproduction.blend import Blend
from reproduction.lab import Lab
from reproduction.names import BASE, single
from reproduction.report import NOT_RUN, Report, table
from sigmix.errors import ExpertError
from sigmix.experts.expert import Expert
from sigmix.svf.tuner import target_layers

BASES = ("requantised", "tuned", "same")

ORDERS = {
    "requantised": ("in order", "shuffled"),
    "tuned": ("in order", "shuffled"),
    "same": ("shuffled", "one layer on", "layers reversed"),
}

WHAT = {
    "requantised": "every matrix rounded to 4 bits again (GGUF Q4_0)",
    "tuned": "a LoRA of the last task, trained on next tokens, merged into the weights",
    "same": "the expert's own base: only z is moved",
}


def moved(expert: Expert, order: str, seed: int = 0) -> Expert:
    """An expert with its z in another order: within each matrix, or among the layers."""
    if order == "in order":
        z = dict(expert.z)
    elif order == "shuffled":
        draw = torch.Generator().manual_seed(seed)
        z = {path: one[torch.randperm(len(one), generator=draw)] for path, one in expert.z.items()}
    else:
        count = 1 + max(int(n) for path in expert.z for n in re.findall(r"\.(\d+)\.", path)[:1])

        def source(path: str) -> str:
            def turn(match: re.Match[str]) -> str:
                layer = int(match[1])
                return f".{(layer - 1) % count if order == 'one layer on' else count - 1 - layer}."

            return re.sub(r"\.(\d+)\.", turn, path, count=1)

        z = {path: expert.z[source(path)] for path in expert.z}
    return Expert(expert.name, z)


@torch.no_grad()
def requantise(model: Any) -> None:
    """Round the adapted layers to GGUF's Q4_0 and back, in place."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    for layer in target_layers(model).values():
        packed = quantize(layer.weight.float().cpu().numpy(), GGMLQuantizationType.Q4_0)
        layer.weight.copy_(torch.from_numpy(dequantize(packed, GGMLQuantizationType.Q4_0)))


def who(base: str, order: str, task: str) -> str:
    """Name of a cell."""
    return f"transfer-{base}-{order.replace(' ', '-')}-{task}"


class Transfer:
    """Table 5."""

    name, title = "transfer", "Table 5: experts on another base"
    needs = ("sweep",)

    def run(self, lab: Lab) -> None:
        """First seed, the first two tasks."""
        scale, tasks = lab.scale, lab.scale.tasks[:2]
        for base in BASES:
            wanted = [(task, order) for task in tasks for order in ORDERS[base]]
            alone = [] if base == "same" else [(task, BASE) for task in tasks]
            if all(lab.store.has(task, who(base, order, task)) for task, order in wanted + alone):
                continue
            experts = {task: Expert.from_pretrained(lab.trained("svf-rl", task, scale.seeds[0])[1]) for task in tasks}
            model, tokenizer = self._base(lab, base)
            turned = {f"{task}-{order}": moved(experts[task], order) for task, order in wanted}
            blend = Blend(model, turned, "svf", cache=base == "same")
            for task, order in wanted:
                lab.cell(
                    task, who(base, order, task), blend.model, tokenizer,
                    partial(blend.under, {f"{task}-{order}": 1.0}), blend.reference,
                )  # fmt: skip
            for task, _ in alone:
                lab.cell(task, who(base, BASE, task), blend.model, tokenizer, blend.reference)
        if lab.store.fact("transfer-shapes") is None:
            lab.store.write_fact("transfer-shapes", self._shapes(lab))

    @staticmethod
    def _base(lab: Lab, base: str) -> tuple[Any, Any]:
        model, tokenizer = lab.base()
        if base == "requantised":
            requantise(model)
        elif base == "tuned":
            _, folder = lab.trained("lora-sft", lab.scale.tasks[-1], lab.scale.seeds[0])
            blend = Blend(model, {"it": folder}, "lora")
            with blend.under({"it": 1.0}):
                weights = {path: place.get_base_layer().weight.clone() for path, place in blend.places.items()}
            model, tokenizer = lab.base()
            for path, weight in weights.items():
                model.get_submodule(path).weight.data = weight
        return model, tokenizer

    @staticmethod
    def _shapes(lab: Lab) -> dict[str, str]:
        """Return the error of an expert with one component less per matrix than the base model."""
        expert = Expert.from_pretrained(lab.trained("svf-rl", lab.scale.tasks[0], lab.scale.seeds[0])[1])
        smaller = replace(expert, z={path: z[:-1] for path, z in expert.z.items()}, meta={})
        model, _ = lab.base()
        try:
            smaller.check(model)
        except ExpertError as error:
            return {"refused": str(error)}
        return {"refused": ""}

    def tables(self, report: Report) -> str:
        """Accuracy and, in brackets, the difference to the base that the expert was put on."""
        scale, tasks = report.scale, report.scale.tasks[:2]
        own = {task: single(report.store, scale, "svf-rl", task, scale.seeds[0]) for task in tasks}
        rows = [["the expert's own", "in order", *(self._cell(report, t, own[t], BASE) for t in tasks)]]
        for base in BASES:
            if base != "same":
                rows.append([base, "base alone", *(report.accuracy(t, who(base, BASE, t)) for t in tasks)])
            for order in ORDERS[base]:
                under = {task: BASE if base == "same" else who(base, BASE, task) for task in tasks}
                rows.append([base, order, *(self._cell(report, t, who(base, order, t), under[t]) for t in tasks)])
        told = "\n".join(f"- {base}: {WHAT[base]}." for base in BASES)
        refused = (report.store.fact("transfer-shapes") or {}).get("refused")
        shapes = f"\n\nOn a base with matrices of other sizes there is no transfer: `{refused}`" if refused else ""
        return (
            table(["base", "z", *tasks], rows)
            + f"\n\n{told}\n- one layer on: layer l takes the z of layer l - 1.{shapes}"
        )

    @staticmethod
    def _cell(report: Report, task: str, name: str | None, base: str) -> str:
        text = report.accuracy(task, name)
        return text if text == NOT_RUN else f"{text} ({report.against(task, name, base)})"
