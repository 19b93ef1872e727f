"""``python -m benchmarks neighbour``: decoding beside a busy core, by OpenMP wait policy and number of threads.

Tokens per second of `Engine.generate` on the base model with 1 and 8 requests, alone and beside one process that spins
on a core. libgomp reads its settings when it starts, so every setting runs in a fresh child process; the settings take
turns in every round. All ratios are to the default setting, alone, of the same round.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.harness import device, ratio, report, say
from benchmarks.peers import in_child
from sigmix.models.default import DEFAULT

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")

SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "threads_1": {"OMP_NUM_THREADS": "1"},
    "threads_2": {"OMP_NUM_THREADS": "2"},
    "passive": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
    **{
        f"spin_{count}": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": str(count)}
        for count in (0, 1_000, 2_000, 4_000, 10_000, 100_000)
    },
}
"""Environment of each setting; one thread has no barrier to wait at, so the wait policy varies with two only."""

ROWS = (1, 8)

PLACES = ("alone", "beside")


def run(
    repeats: int | None = None,
    dtype: str | None = None,
    base: str = DEFAULT,
    new_tokens: int = 32,
    settings: Mapping[str, Mapping[str, str]] = SETTINGS,
) -> dict[str, Any]:
    """Run the benchmark; see `harness.report` for the result.

    Args:
        repeats: rounds, default 3. dtype: default float32. base: name or folder of a base model.
        new_tokens: per answer. settings: {name: environment}, with "default".

    Raises:
        SigmixError: a child process failed.
    """
    where = device(dtype or "float32")
    options = {"base": base, "dtype": dtype or "float32", "new_tokens": new_tokens}
    speeds: dict[str, dict[str, list[float]]] = {name: {} for name in settings}
    rounds = repeats or 3
    for number in range(rounds):
        for name, environment in settings.items():
            found = measure(environment, options)
            say(f"round {number + 1} of {rounds}, {name}: {json.dumps(found)} tokens/s")
            for key, speed in found.items():
                speeds[name].setdefault(key, []).append(speed)
    ratios = {
        f"{name}_{place}_{rows}_vs_default_alone": ratio(own[f"{place}_{rows}"], speeds["default"][f"alone_{rows}"])
        for name, own in speeds.items()
        for rows in ROWS
        for place in PLACES
        if (name, place) != ("default", "alone")
    }
    raw = {
        **options,
        "settings": {name: dict(environment) for name, environment in settings.items()},
        "tokens_per_second": speeds,
        "median_tokens_per_second": {
            name: {key: statistics.median(values) for key, values in own.items()} for name, own in speeds.items()
        },
    }
    return report("neighbour", where, ratios, {}, raw)


def measure(environment: Mapping[str, str], options: Mapping[str, Any]) -> dict[str, float]:
    """Return tokens per second under an environment: {"alone_1": …, "beside_1": …, "alone_8": …, "beside_8": …}."""
    inherited = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    what = f"decoding under {dict(environment)}"
    return in_child("benchmarks.neighbour", options, what, {**inherited, **environment})


@contextmanager
def busy_core() -> Iterator[None]:
    """Run a process that spins on one core."""
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"], stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        child.kill()
        child.wait()


def _child(options: Mapping[str, Any]) -> dict[str, float]:
    from sigmix.engine import Engine
    from sigmix.models.loading import load_base

    model, tokenizer = load_base(options["base"], options["dtype"])
    engine = Engine(model, tokenizer)
    engine.eos_token_ids = []  # every answer has the same number of tokens
    prompts = [f"Write a short story about the number {number}." for number in range(max(ROWS))]

    def speed(texts: Sequence[str]) -> float:
        started = time.perf_counter()
        engine.generate(texts, max_new_tokens=options["new_tokens"])
        return len(texts) * options["new_tokens"] / (time.perf_counter() - started)

    found = {}
    for rows in ROWS:
        speed(prompts[:rows])  # warm-up
        found[f"alone_{rows}"] = speed(prompts[:rows])
        with busy_core():
            found[f"beside_{rows}"] = speed(prompts[:rows])
    return found


if __name__ == "__main__":
    print(json.dumps(_child(json.loads(sys.argv[1]))))
