"""``python -m benchmarks plan``: what `sigmix doctor --plan` says of the default base against what is measured.

    train    one REINFORCE step of `bench.train_step` (32 answers of 8 tokens, groups of 4): peak memory, seconds
    serve    16 requests under 16 mixtures in the factored form, 200 tokens read, 16 written: peak memory, tokens
             written a second

Each is measured in a process of its own: the kernel's high-water mark beyond what importing took, and seconds of a
second run after one that warms up. Rates for the plan's times are measured between the two. Decomposition is in
``python -m benchmarks decompose --stream``. The packed copies, merged weights and prefixes that an engine may keep are
switched off here: they are budgets that a user sets, and no part of the plan.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.harness import Aim, device, report, say
from benchmarks.peak import high_water
from sigmix.errors import SigmixError
from sigmix.models.default import DEFAULT
from sigmix.models.loading import dtype_of, locate
from sigmix.models.memory import Load, budget, measure_rates

AIMS = {
    "train_memory_plan_against_measured": Aim(">=", 0.7),
    "serve_memory_plan_against_measured": Aim(">=", 0.7),
}


BATCH, GROUP, ANSWER = 32, 4, 8


REQUESTS, READ, WRITTEN = 16, 200, 16


def run(repeats: int | None = None, dtype: str | None = None, base: str = DEFAULT) -> dict[str, Any]:
    """Run the benchmark; see `harness.report` for the result.

    Args:
        repeats: rounds, default 1. dtype: of the base; default: as `load_base` picks.
    """
    from transformers import AutoConfig

    kind = str(dtype_of(dtype, torch.device("cpu"))).removeprefix("torch.")
    where = device(kind)
    _, folder, _ = locate(base)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    rounds: list[dict[str, Any]] = []
    for _ in range(1 if repeats is None else repeats):
        train = measured("train", base, kind)
        rates = measure_rates("cpu", kind)
        serve = measured("serve", base, kind)
        load = Load(BATCH, GROUP, train["prompt"], ANSWER, REQUESTS, READ + WRITTEN)
        rounds.append({"train": train, "serve": serve, "plan": budget(config, rates, kind, load)})
        for name, one in (("train", train), ("serve", serve)):
            say(f"{name}: {(one['peak'] - one['imported']) / 1e6:.0f} MB beyond imports, {one['seconds']:.3g} s")

    def memory(one: dict[str, Any], name: str) -> float:
        planned = one["plan"][name]["peak_bytes"]
        planned = planned["factored"] if name == "serve" else planned
        return planned / (one[name]["peak"] - one[name]["imported"])

    ratios = {
        "train_memory_plan_against_measured": [memory(one, "train") for one in rounds],
        "serve_memory_plan_against_measured": [memory(one, "serve") for one in rounds],
        "train_seconds_plan_against_measured": [
            one["plan"]["train"]["seconds_per_step"] / one["train"]["seconds"] for one in rounds
        ],
        "serve_tokens_per_second_plan_against_measured": [
            one["plan"]["serve"]["decode_tokens_per_second"]["factored"]
            / (REQUESTS * (WRITTEN - 1) / one["serve"]["seconds"])
            for one in rounds
        ],
    }
    return report("plan", where, ratios, AIMS, {"base": base, "rounds": rounds})


def measured(what: str, base: str, dtype: str) -> dict[str, Any]:
    """``imported`` and ``peak`` bytes and ``seconds`` of "train" or "serve" in a process of its own."""
    given = json.dumps({"what": what, "base": base, "dtype": dtype, "threads": torch.get_num_threads()})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.plan", given], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SigmixError(f"{what!r} cannot be measured: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _main(given: str) -> None:
    from benchmarks.train_step import Setting, contestant
    from sigmix.engine import Engine
    from sigmix.models.loading import load_base

    asked = json.loads(given)
    torch.set_num_threads(asked["threads"])
    imported = high_water()
    found: dict[str, Any] = {"imported": imported}
    if asked["what"] == "train":
        setting = Setting(base=asked["base"], dtype=asked["dtype"], batch=BATCH, group=GROUP, new_tokens=ANSWER)
        one: Any = contestant(setting, "ours")
        rolled: list[Any] = []
        own = one.learner._rollouts

        def kept(*given: Any) -> Any:
            rolled.append(own(*given))
            return rolled[-1]

        one.learner._rollouts = kept
        for number in range(2):
            samples, begun = setting.samples(number), time.perf_counter()
            one.step(number, samples)
            found["seconds"] = time.perf_counter() - begun
        rows = rolled[-1].prompts
        found["prompt"] = round(sum(map(len, rows)) / len(rows))
    else:
        engine = Engine(*load_base(asked["base"], asked["dtype"]), keep_merged=0, keep_packed=0, keep_prefixes=0)
        draw = torch.Generator().manual_seed(0)
        rows = torch.randint(100, 1000, (REQUESTS, READ), generator=draw).tolist()
        sizes = [layer.r for layer in engine.layers.values()]
        table = 1 + 0.01 * torch.randn(REQUESTS, sum(sizes), generator=draw)
        for _ in range(2):
            found["seconds"] = _decode(engine, rows, table)
    print(json.dumps({**found, "peak": high_water()}))


def _decode(engine: Any, rows: list[list[int]], table: torch.Tensor) -> float:
    """Seconds of the tokens after the first, which the reading of the prompts gives."""
    from sigmix.engine.execution import as_rows
    from sigmix.engine.prefix_cache import prefill

    with torch.no_grad(), as_rows(engine.layers, table, "factored"):
        state = prefill(engine.model, rows, engine.pad_id, share=False)
        tokens, begun = state.logits.argmax(-1), time.perf_counter()
        cache = state.cache
        for _ in range(WRITTEN - 1):
            out = engine.model(input_ids=tokens[:, None], past_key_values=cache, use_cache=True)
            tokens = out.logits[:, -1].argmax(-1)
        return time.perf_counter() - begun


if __name__ == "__main__":
    _main(sys.argv[1])
