"""``python -m benchmarks vllm-serve``: latency and memory of servers on the CPU, 1, 8 and 32 streaming clients.

    vllm_base       vLLM's server on the base, which it compiles
    vllm_mixtures   with sigmix's plugin: a mixture of all experts for each client, full rank, z on all tokens
    vllm_lora8      with 8 LoRA adapters of rank 16 of the same mixtures, in turn; vllm_lora32: with 32
    sigmix_base, sigmix_mixtures   `sigmix serve`, with the same mixtures

Contestants take turns. All use the same dtype, prompts and limit of tokens. Ratios are in tokens per second.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import device, ratio, report, say
from benchmarks.requests import acting_on, bundled_engine, mixtures, save_base
from benchmarks.serve import CLIENTS, Seen, free_port, latency, rates_of, server
from benchmarks.vllm import CONTEXT, ENVIRONMENT, OPTIONS, PYTHON, RANK, fastest, lora_adapters
from sigmix.adapt.base import skills
from sigmix.experts.bank import Bank
from sigmix.models.default import DEFAULT

RATIOS = {
    "mixtures_vs_base": ("vllm_mixtures", "vllm_base"), "mixtures_vs_lora8": ("vllm_mixtures", "vllm_lora8"),
    "mixtures_vs_lora32": ("vllm_mixtures", "vllm_lora32"), "sigmix_vs_vllm": ("sigmix_mixtures", "vllm_mixtures"),
}  # fmt: skip


def run(
    repeats: int | None = None,
    dtype: str | None = None,
    base: str = DEFAULT,
    new_tokens: int = 32,
    each: int = 2,
    clients: Sequence[int] = CLIENTS,
    bank: Any = None,
    adapters: Sequence[int] = (8, 32),
) -> dict[str, Any]:
    """Run the benchmark; see `harness.report` for the result.

    Args:
        repeats: rounds that count, default 2. dtype: of all, default float32. base, bank: what is served.
        new_tokens: of an answer at most. each: requests of a client in a round. clients: how many at once.
        adapters: numbers of LoRA adapters.

    Raises:
        SigmixError: a server does not start, or fails.
    """
    where = device(dtype or "float32")
    raw: dict[str, Any] = {"base": base, "new_tokens": new_tokens, "requests_each": each, "rank": RANK}
    python = os.environ.get("SIGMIX_VLLM_PYTHON", PYTHON)
    if not os.access(python, os.X_OK):
        reason = f"there is no {python} -> make vllm-env, or set SIGMIX_VLLM_PYTHON to a Python that has vLLM"
        return report("vllm-serve", where, {}, {}, {**raw, "skipped": {"vLLM": reason}})
    experts = acting_on("all", Bank.bundled() if bank is None else bank)
    mixes = mixtures(skills(experts), max(*clients, *adapters))
    names = [mix.id for mix in mixes]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model, kept = f"{folder}/base", Bank(f"{folder}/bank", create=True)
        tokenizer, _ = save_base(base, where["dtype"], Path(model))
        for expert in experts.values():
            kept.add(expert)
        loras = lora_adapters(base, mixes[: max(adapters, default=0)], experts, folder)
        bundled_engine(base, where["dtype"], kept, compile=True)  # the server finds the compiled step in the cache
        vllm = [
            python, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "base",
            "--dtype", where["dtype"], "--max-model-len", str(CONTEXT), "--block-size", str(OPTIONS["block_size"]),
            "--max-num-seqs", str(max(clients)), "--host", "127.0.0.1",
        ]  # fmt: skip
        ours = [
            sys.executable, "-m", "sigmix", "serve", "--base", base, "--bank", str(kept.folder), "--state",
            f"{folder}/state",
        ]  # fmt: skip
        environment = {**ENVIRONMENT, **fastest(python), "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING")  # a server needs it
        plugin = {"SIGMIX_VLLM_EXPERTS": str(kept.folder), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        slots = ["--enable-lora", "--max-lora-rank", str(RANK), "--max-loras"]
        started = {
            "vllm_base": (vllm, environment, ["base"]),
            "vllm_mixtures": ([*vllm, *slots, str(len(names))], {**environment, **plugin}, names),
            **{
                f"vllm_lora{count}": (
                    [*vllm, *slots, str(count), "--lora-modules", *(f"lora-{i}={loras[i]}" for i in range(count))],
                    environment, [f"lora-{i}" for i in range(count)],
                )
                for count in adapters
            },
            "sigmix": (ours, {"SIGMIX_SERVE_LOG_LEVEL": "warning", "SIGMIX_SERVE_DTYPE": where["dtype"]}, names),
        }  # fmt: skip
        places, processes = {}, {}
        for name, (words, variables, models) in started.items():
            port = free_port()
            command = [*words, "--port", str(port)]
            processes[name] = stack.enter_context(server(command, port, Path(folder) / f"{name}.log", variables))
            places[name] = (port, models)
            say(f"{name} is up")
        places["sigmix_mixtures"] = places["sigmix"]
        places["sigmix_base"] = (places.pop("sigmix")[0], ["base"])
        seen: dict[str, dict[int, list[Seen]]] = {}
        rates: dict[int, dict[str, list[float]]] = {}
        for count in clients:
            say(f"{count} clients")
            contestants = {
                name: (port, [models[i % len(models)] for i in range(count)]) for name, (port, models) in places.items()
            }
            rates[count] = rates_of(contestants, each, new_tokens, repeats or 2, tokenizer, count, seen)
        memory = {name: resident(process.pid) for name, process in processes.items()}
    ratios = {
        f"{label}_{count}": ratio(rates[count][ours], rates[count][theirs])
        for label, (ours, theirs) in RATIOS.items()
        if ours in places and theirs in places
        for count in clients
    }
    raw.update(
        mixes=names, tokens_per_second=rates, resident_bytes=memory,
        latency={name: {count: latency(*found) for count, found in own.items()} for name, own in seen.items()},
    )  # fmt: skip
    return report("vllm-serve", where, ratios, {}, raw)


def resident(pid: int) -> int:
    """Return the resident memory of a process and its children in bytes; shared pages count once for each."""
    process = psutil.Process(pid)
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))
