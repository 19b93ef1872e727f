"""Benchmarks: ratios against named peers on the same machine in the same run. Seconds alone say little elsewhere."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from sigmix.errors import ConfigError, UnknownNameError

BENCHES = {
    "train-step": "one REINFORCE step against the dense way of the public reference, PEFT's LoRA and the matmul floor",
    "mixed": "32 rows under 32 mixtures against the base, swapped weights and PEFT's mixed-batch LoRA",
    "truncation": "the truncated form under a series of error budgets: KL to the exact model, cost and speed",
    "engine": "Engine.generate on the base against transformers' generate, 1, 8 and 64 rows",
    "serve": "our server against `transformers serve`: 1, 8 and 32 clients; one expert, different mixtures, auto",
    "search": "one CEM iteration in mixed batches against swapping weights for every candidate",
    "pass1": "what strategies A, B and D cost, as a share of both passes",
    "export": "a merged export's peak memory against loading the model; llama.cpp with our adapter against our engine",
    "decompose": "the base's matrices, cold and from the cache; a 4096×14336 matrix against torch.linalg.svd; with "
    "--stream peak memory of streaming a checkpoint against loading the whole model",
    "quantised": "experts of the plain base on its 8-bit and 4-bit forms: KL, accuracy, size and speed",
}


def run(name: str, **options: Any) -> dict[str, Any]:
    """Run a benchmark; see the module of its name for the options, `harness.report` for the result.

    Raises:
        UnknownNameError: there is no such benchmark.
    """
    if name not in BENCHES:
        raise UnknownNameError("bench", name, BENCHES, remedy="python -m benchmarks --list")
    if options.pop("stream", False):
        if name != "decompose":
            raise ConfigError(f"{name} streams nothing", remedy="leave out --stream, or run decompose")
        name = "stream"
    return import_module(f"benchmarks.{name.replace('-', '_')}").run(**options)
