"""``python -m benchmarks lora-ranks``: accuracy of experts as truncated LoRA, against the exact experts and the base.

    python -m benchmarks lora-ranks --json > benchmarks/results/lora-ranks.json
    python -m benchmarks.lora_ranks benchmarks/results/lora-ranks.json             # the table of docs/exports.md

Greedy answers to the same test items of each expert's task, in float32. A truncated expert is measured as
`sigmix export lora --rank` writes it, in float32. ``kept_RANK`` is the share of an expert's gain over the base that is
left, of every expert with a task that needs no local data; an exact LoRA is the exact expert up to rounding.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.harness import device, percent, report, say
from benchmarks.requests import tasks
from sigmix.evals.accuracy import run as evaluate
from sigmix.evals.truncation import changed_weights, comparison
from sigmix.experts.bank import Bank
from sigmix.experts.mix import Mix
from sigmix.export.base import BaseCheckpoint
from sigmix.export.low_rank import LowRank
from sigmix.export.verify import load_engine
from sigmix.models.default import DEFAULT
from sigmix.utils.io import read_text

RANKS = (16, 64, 256, 512)


def run(
    repeats: int | None = None,
    dtype: str | None = None,
    base: str = DEFAULT,
    bank: Any = None,
    n: int = 300,
    ranks: Sequence[int] = RANKS,
) -> dict[str, Any]:
    """Run the benchmark; see `harness.report` for the result. Greedy answers, so one round is all there is.

    Args:
        repeats: not used. dtype: in which the base is read; default: that of the experts. n: test items of each task.
    """
    bank = Bank.bundled() if bank is None else bank
    measured = tasks(bank)
    where = device()
    source = BaseCheckpoint(base, dtype)
    source.adopt_dtype(bank[name] for name in measured)
    engine = load_engine(source, {name: bank[name] for name in measured}, upcast=True)
    found: dict[str, Any] = {}
    for name, task in measured.items():
        mix = Mix.one(name)
        _, whole = evaluate(engine, task, [mix], n=n)
        low = LowRank.from_mix(source, mix, bank)
        found[name] = {
            "task": task.name, "rank": max(low.exact.values()), "bytes": low.nbytes(torch.float32),
            "base": whole[Mix.base().id].summary(), "exact": whole[mix.id].summary(), "ranks": {},
        }  # fmt: skip
        say(f"{name}: base {percent(found[name]['base'])}, exact {percent(found[name]['exact'])}")
        for rank in ranks:
            low.set_ranks(rank=rank)
            with engine.execution.other_base(changed_weights(engine, [(low, 1.0)], torch.float32)):
                _, truncated = evaluate(engine, task, n=n)
            row = comparison(whole[Mix.base().id], whole[mix.id], truncated[Mix.base().id])
            found[name]["ranks"][str(rank)] = {
                **{key: row[key] for key in ("truncated", "paired", "kept")}, "error": low.error,
                "bytes": low.nbytes(torch.float32),
            }  # fmt: skip
            say(f"{name} at rank {rank}: {percent(row['truncated'])}, {low.error:.1%} of the change lost")
    kept = {rank: [one["ranks"][str(rank)]["kept"] for one in found.values()] for rank in ranks}
    ratios = {
        f"kept_{rank}": shares for rank, every in kept.items() if (shares := [one for one in every if one is not None])
    }
    return report("lora-ranks", where, ratios, {}, {"base": base, "n": n, "ranks": list(ranks), "found": found})


def table(result: Mapping[str, Any]) -> str:
    """Return a result as a Markdown table: accuracy in per cent with its interval, and the share of the gain kept."""
    ranks = [str(rank) for rank in result["raw"]["ranks"]]
    found = result["raw"]["found"]
    columns = ["expert", "base", *(f"rank {rank}" for rank in ranks), "exact"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for name, one in found.items():
        cells = [f"{percent(row['truncated'])}{_kept(row['kept'])}" for row in (one["ranks"][rank] for rank in ranks)]
        lines.append(f"| {name} | {percent(one['base'])} | {' | '.join(cells)} | {percent(one['exact'])} |")
    lost = [f"{100 * mean(one['ranks'][rank]['error'] for one in found.values()):.0f} %" for rank in ranks]
    lines.append(f"| of ‖ΔW‖ lost, mean | | {' | '.join(lost)} | 0 |")
    return "\n".join(lines)


def _kept(share: float | None) -> str:
    return "" if share is None else f", {100 * share:.0f} % kept"


if __name__ == "__main__":
    print(table(json.loads(read_text(Path(sys.argv[1])))))
