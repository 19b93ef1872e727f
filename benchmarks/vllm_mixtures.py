"""``python -m benchmarks vllm-mixtures``: mixtures in vLLM, by sigmix's plugin and as vLLM's own LoRA adapters.

All contestants are vLLM on the CPU (``make vllm-env``), a process each, with the same prompts, dtype and number of
greedy tokens:

    exact_vs_base_N     a mixture of all experts for each of N requests, full rank, z on all tokens; against the base,
                        which vLLM compiles (with adapters it does not)
    prompt_vs_base_N    the same with z on prompt tokens only
    exact_vs_loraR_8    8 requests with a mixture each; against 8 LoRA adapters of rank R of the same mixtures

Ratios are in tokens per second. `benchmarks.vllm` compares sigmix's own engine.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness import Aim, device, interleaved, ratio, report, say
from benchmarks.peers import Peer
from benchmarks.requests import acting_on, bundled_engine, mixtures, prompts, save_base
from benchmarks.vllm import ADAPTERS, CONTEXT, ENVIRONMENT, OPTIONS, PYTHON, fastest, lora_adapters
from sigmix.adapt.base import skills
from sigmix.errors import SigmixError
from sigmix.experts.bank import Bank
from sigmix.integrations.vllm.adapter import PYTHON as VARIABLE
from sigmix.integrations.vllm.adapter import Adapter, Settings
from sigmix.models.default import DEFAULT

AIMS: dict[str, Aim] = {}

RANKS = (64,)
"""Of the LoRA adapters; 512 is the largest that vLLM supports, and takes minutes for a round on two cores."""


def run(
    repeats: int | None = None,
    dtype: str | None = None,
    base: str = DEFAULT,
    new_tokens: int = 16,
    bank: Any = None,
    sizes: Sequence[int] = (8, 32),
    ranks: Sequence[int] = RANKS,
) -> dict[str, Any]:
    """Run the benchmark; see `harness.report` for the result.

    Args:
        repeats: rounds that count, default 3. dtype: of all, default float32. base, bank: what is run.
        new_tokens: of an answer. sizes: numbers of requests. ranks: of the LoRA adapters.

    Raises:
        SigmixError: vLLM fails, or an answer has another number of tokens.
    """
    where = device(dtype or "float32")
    raw: dict[str, Any] = {"base": base, "new_tokens": new_tokens, "options": OPTIONS, "ranks": list(ranks)}
    python = os.environ.get(VARIABLE, PYTHON)
    if not os.access(python, os.X_OK):
        reason = f"there is no {python} -> make vllm-env, or set {VARIABLE} to a Python that has vLLM"
        return report("vllm-mixtures", where, {}, {}, {**raw, "skipped": {"vLLM": reason}})
    engine = bundled_engine(base, where["dtype"], bank)
    repeats, most = repeats or 3, max(sizes)
    rounds = [[engine.encode(text) for text in prompts(engine, most, seed=number)] for number in range(1 + repeats)]
    source, names = engine.bank, skills(engine.bank)
    mixes = mixtures(names, most)
    ratios, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model = f"{folder}/base"
        save_base(base, where["dtype"], Path(model))
        given: dict[str, list[str]] = {"base": []}
        for kind, positions in (("exact", "all"), ("prompt", "prompt")):
            own = Bank(f"{folder}/{kind}", create=True)
            for name, one in acting_on(positions, {name: source[name] for name in names}).items():
                own.add(replace(one, name=name))
            found = [Adapter.find(mix.id, Settings(str(own.folder))) for mix in mixes]
            given[kind] = [one.path for one in found if one is not None]
        for rank in ranks:
            given[f"lora{rank}"] = lora_adapters(base, mixes[:ADAPTERS], source, f"{folder}/rank-{rank}", rank)
        peers = {}
        for kind, adapters in given.items():
            say(f"starting vLLM: {kind}")
            options = {"dtype": where["dtype"], "model": model, "adapters": adapters, "rank": max([16, *ranks])}
            options["options"] = {"max_model_len": CONTEXT, **OPTIONS}
            environment = {**ENVIRONMENT, **fastest(python)}
            if kind in ("exact", "prompt"):
                environment["SIGMIX_VLLM_EXPERTS"] = f"{folder}/{kind}"
            command = [python, "-P", str(Path(__file__).with_name("vllm_peer.py")), json.dumps(options)]
            peers[kind] = stack.enter_context(Peer(command, environment))
            raw["vllm"] = peers[kind].ready
        for count in sizes:
            say(f"{count} requests")
            parts = [rows[:count] for rows in rounds]
            turn = {
                kind: _answers(peer, parts, new_tokens)
                for kind, peer in peers.items()
                if count == ADAPTERS or not kind.startswith("lora")
            }
            taken = seconds[str(count)] = interleaved(turn, repeats)
            for kind in ("exact", "prompt"):
                ratios[f"{kind}_vs_base_{count}"] = ratio(taken["base"], taken[kind])
            for kind in taken:
                if kind.startswith("lora"):
                    ratios[f"exact_vs_{kind}_{count}"] = ratio(taken[kind], taken["exact"])
    raw.update(
        mixes=[mix.id for mix in mixes], seconds=seconds,
        tokens_per_second={
            count: {kind: [int(count) * new_tokens / one for one in own] for kind, own in taken.items()}
            for count, taken in seconds.items()
        },
    )  # fmt: skip
    return report("vllm-mixtures", where, ratios, {name: aim for name, aim in AIMS.items() if name in ratios}, raw)


def _answers(peer: Peer, rounds: Sequence[list[list[int]]], new_tokens: int) -> Callable[[int], float]:
    def answer(number: int) -> float:
        found = peer.ask(rows=rounds[number], new_tokens=new_tokens)
        if any(len(ids) != new_tokens for ids in found["ids"]):
            raise SigmixError(f"an answer of vLLM does not have {new_tokens} tokens")
        return found["seconds"]

    return answer
