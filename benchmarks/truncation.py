"""``python -m benchmarks truncation``: KL, cost and speed of the truncated form by error budget.

A plan is fitted on training prompts of the bank's tasks and cut to a series of error budgets. For each: the expected
error, the KL from the exact to the truncated model in nats per answer token, on validation prompts under random
mixtures of all experts, and the speed of a mixed batch against the same batch on the base model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import device, interleaved, ratio, report, say
from benchmarks.requests import bundled_engine, mixtures, prompts
from sigmix.adapt.base import skills
from sigmix.engine.prefix_cache import left_pad
from sigmix.engine.truncation import Calibration, Truncation, fit
from sigmix.evals.plots import figure, save_png
from sigmix.models.default import DEFAULT

BUDGETS = (0.5, 0.4, 0.3, 0.2, 0.15, 0.1)


class Divergence:
    """KL from the exact model to another state of it, on answers that the exact one gave.

    Args:
        engine: an engine. rows: R token-id prompts. mixes: R mixes. new_tokens: of every answer.
    """

    def __init__(self, engine: Any, rows: list[list[int]], mixes: list[Any], new_tokens: int) -> None:
        self.engine, self.mixes = engine, mixes
        answers = engine.generate(rows, mixes, max_new_tokens=new_tokens)
        whole = [row + answer.ids for row, answer in zip(rows, answers, strict=True)]
        self.ids, self.mask = left_pad(whole, engine.pad_id, engine.model.device)
        self.answer = torch.zeros_like(self.mask)
        for row, answer in enumerate(answers):
            self.answer[row, -len(answer.ids) - 1 : -1] = True
        self.exact = self._logprobs(mixes, None)

    def of(self, mixes: Any, form: str | None) -> float:
        """Mean nats per answer token of KL(exact ‖ this)."""
        return float((self.exact.exp() * (self.exact - self._logprobs(mixes, form))).sum(-1).mean())

    def _logprobs(self, mixes: Any, form: str | None) -> torch.Tensor:
        return self.engine.logits(self.ids, self.mask, mixes, form)[self.answer].float().log_softmax(-1)


def calibrate(engine: Any, count: int = 96) -> Calibration:
    """Fit on training prompts (seed 7: not those that the benchmarks time)."""
    return fit(engine, prompts(engine, count, seed=7), skills(engine.bank))


def within(calibration: Calibration, divergence: Divergence, limit: float) -> tuple[Truncation, float]:
    """The cheapest of the plans of `BUDGETS` whose KL is under a limit (the last one if none is), and its KL."""
    engine = divergence.engine
    for budget in BUDGETS:
        engine.truncation = calibration.plan(budget)
        found = divergence.of(divergence.mixes, "truncated")
        say(f"{engine.truncation.describe()}: KL {found:.4f}")
        if found < limit:
            break
    return engine.truncation, found


def run(
    repeats: int | None = None, dtype: str | None = None, base: str = DEFAULT, rows: int = 32, new_tokens: int = 24,
    bank: Any = None, count: int = 96,
) -> dict[str, Any]:  # fmt: skip
    """Run the benchmark; see `harness.report` for the result.

    Args:
        repeats: rounds that count, default 3. dtype, base, bank: what is run. rows, new_tokens: of the timed batch.
        count: prompts of the calibration.
    """
    where = device()
    engine = bundled_engine(base, dtype, bank)
    where["dtype"] = str(engine.model.dtype).removeprefix("torch.")
    mixes = mixtures(skills(engine.bank), rows)
    held_out = [engine.encode(one) for one in prompts(engine, rows, split="validation")]
    divergence = Divergence(engine, held_out, mixes, new_tokens)
    points = [{"kind": "base", "cost": 0.0, "error": 1.0, "kl": divergence.of(None, None)}]
    # what rounding alone does: another exact form
    points.append({"kind": "exact, gain form", "cost": None, "error": 0.0, "kl": divergence.of(mixes, "gain")})
    calibration = calibrate(engine, count)
    plans = {f"budget_{budget}": calibration.plan(budget) for budget in BUDGETS}
    for name, plan in plans.items():
        engine.truncation = plan
        kl = divergence.of(mixes, "truncated")
        points.append({"kind": "subspaces", "name": name, "error": plan.error, "cost": plan.cost, "kl": kl})
        say(f"{plan.describe()}: KL {kl:.4f}")
    texts = [engine.encode(one) for one in prompts(engine, rows)]

    def under(plan: Truncation | None, form: str | None, mix: Any) -> Callable[[int], float]:
        def answer(_: int) -> float:
            engine.truncation = plan
            engine.generate(texts, mix, max_new_tokens=1, form=form)  # an engine packs one plan's weights at a time
            started = time.perf_counter()
            engine.generate(texts, mix, max_new_tokens=new_tokens, form=form)
            return time.perf_counter() - started

        return answer

    contestants = {"base": under(None, None, None), "exact": under(None, None, mixes)}
    contestants |= {name: under(plan, "truncated", mixes) for name, plan in plans.items()}
    seconds = interleaved(contestants, repeats or 3)
    ratios = {f"{name}_vs_base": ratio(seconds["base"], taken) for name, taken in seconds.items() if name != "base"}
    raw = {"base": base, "rows": rows, "new_tokens": new_tokens, "points": points, "seconds": seconds,
           "calibration": calibration.facts, "mixes": [mix.id for mix in mixes]}  # fmt: skip
    return report("truncation", where, ratios, {}, raw)


def plot(result: Mapping[str, Any], path: str | Path) -> None:
    """KL to the exact model against the extra work, as PNG.

    Raises:
        ConfigError: matplotlib is not installed. OutputError: the file cannot be written.
    """
    points = result["raw"]["points"]
    canvas = figure(7, 4.5)
    axes = canvas.add_subplot()
    plans = [one for one in points if one["kind"] == "subspaces"]
    axes.plot([100 * one["cost"] for one in plans], [one["kl"] for one in plans], marker="o", label="subspaces")
    for one in points[:2]:
        axes.axhline(one["kl"], linestyle=":", color="grey")
        axes.text(0, one["kl"], one["kind"], va="bottom")
    axes.set_yscale("log")
    axes.set_xlabel("more multiply-adds than the base, %")
    axes.set_ylabel("KL(exact ‖ truncated), nats per token")
    axes.set_title("The truncated form: what is saved, what is lost")
    axes.legend()
    save_png(canvas, path)
