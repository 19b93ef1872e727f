"""``python -m benchmarks quantised``: bundled experts, trained on the plain base model, on its 8-bit and 4-bit forms.

For each quantization and expert, in the basis that the expert was trained in (`sigmix.experts.original_basis`):

    accuracy    on held-out items of the expert's task, of plain and quantized model, with the expert and alone
    KL          in nats per answer token, plain ‖ quantized, on the plain model's answers under the expert; and of the
                two base models without an expert: the effect of quantization alone
    own basis   for nf4 also the same z in the basis of the quantized weights, which only a check forbids
    bytes       of the linear layers, over those of bfloat16
    seconds     of the items in the gain form, over the plain model's in the same form
"""

from __future__ import annotations

import time
from typing import Any

import torch
from peft import inject_adapter_in_model

from benchmarks.harness import Aim, device, report, say
from sigmix.engine import Engine
from sigmix.engine.execution import ENGINE_ADAPTER
from sigmix.engine.prefix_cache import left_pad
from sigmix.evals.statistics import wilson
from sigmix.experts.bank import Bank
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix
from sigmix.experts.original_basis import use_original_basis
from sigmix.models.default import DEFAULT
from sigmix.models.loading import load_base
from sigmix.models.quantization import QUANTIZATIONS
from sigmix.models.weights import value
from sigmix.svf.config import SVFConfig
from sigmix.tasks.registry import get_task

EXPERTS = ("compare-numbers", "dates")

AIMS = {"accuracy_kept_int8": Aim(">=", 0.95)}


def run(
    repeats: int | None = None,
    dtype: str | None = None,
    base: str = DEFAULT,
    bank: Any = None,
    n: int = 100,
    experts: tuple[str, ...] = EXPERTS,
) -> dict[str, Any]:
    """Run the benchmark; see `harness.report` for the result. Greedy answers, so one round is all there is.

    Args:
        repeats: not used. dtype: of the base. base, bank, experts: what is compared; each expert's task is in its card.
        n: items of each task.
    """
    bank = Bank.bundled() if bank is None else bank
    model, tokenizer = load_base(base, dtype)
    where = device(model.dtype)
    plain = Engine(model, tokenizer, bank, keep_packed=0)
    tasks = {name: get_task(bank[name].meta["task"]) for name in experts}
    items = {name: task.samples("test", n, seed=0) for name, task in tasks.items()}
    size = _bytes(plain)
    found: dict[str, Any] = {"plain": {}}
    answers: dict[str, dict[str, Any]] = {}
    for name in experts:
        answers[name] = {mix: _answer(plain, tasks[name], items[name], mix) for mix in (name, "base")}
        found["plain"][name] = {mix: _told(one) for mix, one in answers[name].items()}
        say(f"plain, {name}: {found['plain'][name]}")
    for kind in QUANTIZATIONS:
        small, _ = load_base(base, dtype, quantization_config=kind)
        use_original_basis(small)
        engine = Engine(small, tokenizer, bank)
        found[kind] = {"bytes": _bytes(engine) / size}
        unchecked = {name: Expert(name, bank[name].z) for name in experts}
        bare = None
        if kind == "nf4":
            own, same = _own_basis(base, dtype, kind)
            bare = Engine(own, same, unchecked)
        for name in experts:
            row: dict[str, Any] = {}
            for mix in (name, "base"):
                one = _answer(engine, tasks[name], items[name], mix)
                kept = answers[name][mix]
                row[mix] = {**_told(one), "kl": _kl(plain, engine, kept["rows"], mix)}
                row[mix]["seconds_against_plain"] = one["seconds"] / kept["seconds"]
            if bare is not None:
                row["own basis"] = {
                    **_told(_answer(bare, tasks[name], items[name], name)),
                    "kl": _kl(plain, bare, answers[name][name]["rows"], name),
                }
            found[kind][name] = row
            say(f"{kind}, {name}: {row}")
    ratios = {}
    for kind in QUANTIZATIONS:
        pairs = [(found[kind][name][name], found["plain"][name][name]) for name in experts]
        ratios[f"accuracy_kept_{kind}"] = [a["accuracy"] / max(b["accuracy"], 1 / n) for a, b in pairs]
        ratios[f"seconds_against_plain_{kind}"] = [a["seconds_against_plain"] for a, _ in pairs]
        ratios[f"bytes_against_bfloat16_{kind}"] = [found[kind]["bytes"]]
    return report("quantised", where, ratios, AIMS, {"base": base, "n": n, "experts": list(experts), "found": found})


def _own_basis(base: str, dtype: str | None, kind: str) -> Any:
    """A quantised base adapted in its own basis, which is computed and not kept in the cache."""
    model, tokenizer = load_base(base, dtype, quantization_config=kind)
    inject_adapter_in_model(SVFConfig(inference_mode=True, cache=False), model, ENGINE_ADAPTER)
    return model, tokenizer


def _bytes(engine: Engine) -> float:
    """Of the adapted layers' weights as they are held, over what bfloat16 would take."""
    held = wide = 0
    for layer in engine.layers.values():
        weight: Any = layer.get_base_layer().weight
        if weight.is_floating_point() and hasattr(weight, "__tensor_flatten__"):
            held += sum(getattr(weight, name).nbytes for name in weight.__tensor_flatten__()[0])
        elif (state := getattr(weight, "quant_state", None)) is not None:
            held += weight.nbytes + state.absmax.nbytes
        else:
            held += weight.nbytes
        wide += 2 * value(layer.get_base_layer()).numel()
    return held / wide


def _answer(engine: Engine, task: Any, items: Any, name: str) -> dict[str, Any]:
    """Right answers, the rows of prompt and answer, and seconds, in the gain form."""
    mix = Mix.base() if name == "base" else Mix.one(name)
    begun = time.perf_counter()
    out = engine.generate([one.prompt for one in items], mix, max_new_tokens=task.max_new_tokens, form="gain")
    seconds = time.perf_counter() - begun
    right = sum((task.score(item, one.text).value or 0) >= 1 for item, one in zip(items, out, strict=True))
    rows = [(engine.encode(item.prompt), one.ids) for item, one in zip(items, out, strict=True)]
    return {"right": right, "n": len(out), "rows": rows, "seconds": seconds}


def _told(one: dict[str, Any]) -> dict[str, Any]:
    low, high = wilson(one["right"], one["n"])
    return {"accuracy": one["right"] / one["n"], "interval": [low, high], "n": one["n"]}


def _kl(plain: Engine, other: Engine, rows: Any, name: str) -> float:
    """Mean KL(plain ‖ other) over the answers' tokens, in nats."""
    mix = Mix.base() if name == "base" else Mix.one(name)
    total = count = 0.0
    for start in range(0, len(rows), 16):
        part = rows[start : start + 16]
        ids, mask = left_pad([[*prompt, *answer] for prompt, answer in part], plain.pad_id, torch.device("cpu"))
        both = (engine.logits(ids, mask, [mix] * len(part), form="gain") for engine in (plain, other))
        one, two = (logits.float().log_softmax(-1) for logits in both)
        for row, (_, answer) in enumerate(part):
            at = slice(-len(answer) - 1, -1)
            total += float((one[row, at].exp() * (one[row, at] - two[row, at])).sum())
            count += len(answer)
    return total / count
