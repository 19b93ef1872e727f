"""Benchmarks: ratios against named peers on the same machine in the same run. See ``benchmarks/README.md``."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from sigmix.errors import ConfigError, UnknownNameError

BENCHES = {
    "train-step": "one REINFORCE step against the public reference's dense composition, PEFT's LoRA and the matmuls",
    "mixed": "32 rows under 32 mixtures against the base model, swapped weights and PEFT's mixed-batch LoRA",
    "engine": "Engine.generate on the base model against transformers' generate, 1, 8 and 64 rows",
    "serve": "sigmix serve against transformers serve: 1, 8 and 32 clients; one expert, different mixtures, auto",
    "fine-tuning": "sigmix serve while a fine-tuning job trains against the same server at rest",
    "search": "one CEM iteration in mixed batches against swapping weights for every candidate",
    "pass1": "the first pass of strategies A, B and D as a share of two-pass inference",
    "export": "peak memory of a merged export against loading the model",
    "lora-ranks": "accuracy of the bundled experts as LoRA of rank 16, 64, 256 and 512 against exact ones",
    "vllm": "Engine.generate against vLLM on the CPU, 1, 8 and 32 requests; mixtures against its LoRA of rank 16",
    "vllm-mixtures": "mixtures in vLLM by the plugin against vLLM's base and its LoRA of rank 64, 8 and 32 requests",
    "vllm-serve": "latency and memory of servers: vLLM, with mixtures and LoRA, and sigmix serve; 1, 8 and 32 clients",
    "llamacpp": "one request against llama.cpp: base and mixture in bfloat16; 8-bit weights against Q8_0 and Q4_1",
    "decompose": "all matrices, cold and cached; a 4096×14336 matrix against torch.linalg.svd; with --stream the "
    "peak memory of streaming a checkpoint against loading the whole model",
    "quantised": "experts of the plain base model on its 8-bit and 4-bit forms: KL, accuracy, size and speed",
    "neighbour": "decoding beside a busy core, by OpenMP wait policy and number of threads",
}


def run(name: str, **options: Any) -> dict[str, Any]:
    """Run a benchmark; see its module for the options and `harness.report` for the result.

    Raises:
        UnknownNameError: unknown benchmark. ConfigError: ``stream`` for another benchmark than decompose.
    """
    if name not in BENCHES:
        raise UnknownNameError("benchmark", name, BENCHES, remedy="python -m benchmarks --list")
    if options.pop("stream", False):
        if name != "decompose":
            raise ConfigError(f"{name} has no streamed form", remedy="leave out --stream, or run decompose")
        name = "stream"
    return import_module(f"benchmarks.{name.replace('-', '_')}").run(**options)
