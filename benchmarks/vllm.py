"""``python -m benchmarks vllm``: `Engine.generate` against vLLM's offline API on the CPU; 1, 8 and 32 requests at once.

Both answer the same token ids greedily with the same number of tokens, in the same dtype and with the same number of
threads; every round has other prompts, so that prefix caches hold their common beginning only:

    base_N            the base model on both sides. vLLM compiles it, and has the settings that were fastest
    base_default_N    vLLM with its default settings
    mixed_N           ours a mixture for each request, full rank, of experts that act on the prompt; vLLM 8 LoRA
                      adapters of rank 16, exported from 8 of the mixtures, in turn. It does not compile with LoRA
    mixed_all_N       the same with experts that act on all tokens

vLLM runs in an environment of its own (``make vllm-env``), where `benchmarks/vllm_peer.py` is started with it. Ratios
are in tokens per second, ours over vLLM's.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Aim, device, interleaved, ratio, report, say
from benchmarks.peers import Peer, equal_start
from benchmarks.requests import acting_on, bundled_engine, compiled, mixtures, prompts, save_base
from sigmix.adapt.base import skills
from sigmix.engine import Engine
from sigmix.errors import SigmixError
from sigmix.experts.mix import Mix
from sigmix.export.base import BaseCheckpoint
from sigmix.export.lora import export_lora
from sigmix.export.low_rank import LowRank
from sigmix.models.default import DEFAULT

AIMS = {
    "base_1": Aim(">=", 1.5), "base_8": Aim(">=", 2.2), "base_32": Aim(">=", 2.6),
    "mixed_8": Aim(">=", 4.0), "mixed_32": Aim(">=", 8.0),
}  # fmt: skip

SIZES = {"base": (1, 8, 32), "base_default": (1, 8, 32), "mixed": (8, 32)}

ADAPTERS, RANK = 8, 16

PYTHON = ".venv-vllm/bin/python"
"""Unless ``SIGMIX_VLLM_PYTHON`` names another one."""

LEAST_EQUAL = 0.9
"""Share of requests on the base model that must have the same first token on both sides."""

ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}

CONTEXT = 512
"""Of vLLM, in tokens."""

OPTIONS = {"block_size": 32}
"""Of `vllm.LLM`: blocks of 32 tokens, not 128, so that the prompts' common beginning is cached."""


def run(
    repeats: int | None = None,
    dtype: str | None = None,
    base: str = DEFAULT,
    new_tokens: int = 32,
    bank: Any = None,
    sizes: Mapping[str, Sequence[int]] = SIZES,
    compile: bool = True,
) -> dict[str, Any]:
    """Run the benchmark; see `harness.report` for the result.

    Args:
        repeats: rounds that count, default 3. dtype: of both, default bfloat16. base, bank: what is run.
        new_tokens: of an answer. sizes: numbers of requests. compile: our decode step.

    Raises:
        SigmixError: vLLM fails, an answer has another number of tokens, or vLLM answers other prompts.
    """
    where = device(dtype or "bfloat16")
    raw: dict[str, Any] = {"base": base, "new_tokens": new_tokens, "options": OPTIONS}
    python = os.environ.get("SIGMIX_VLLM_PYTHON", PYTHON)
    if not os.access(python, os.X_OK):
        reason = f"there is no {python} -> make vllm-env, or set SIGMIX_VLLM_PYTHON to a Python that has vLLM"
        return report("vllm", where, {}, {}, {**raw, "skipped": {"vLLM": reason}})
    engine = bundled_engine(base, where["dtype"], bank, compile)
    repeats, most = repeats or 3, max(map(max, sizes.values()))
    rounds = [[engine.encode(text) for text in prompts(engine, most, seed=number)] for number in range(1 + repeats)]
    everywhere = acting_on("all", engine.bank)
    on_prompts = {f"{name}-prompt": one for name, one in acting_on("prompt", everywhere).items()}
    engine.bank = {**everywhere, **on_prompts}
    mixes_all = mixtures(skills(everywhere), most)
    ours: dict[str, dict[str, list[Mix] | None]] = {"base": {"": None}, "base_default": {"": None}}
    ours["mixed"] = {"": mixtures(skills(on_prompts), most), "_all": mixes_all}
    ratios, seconds, agreement = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        given = {"dtype": where["dtype"], "rank": RANK, "model": f"{folder}/base"}
        save_base(base, where["dtype"], Path(given["model"]))
        for kind, counts in sizes.items():
            given["adapters"] = lora_adapters(base, mixes_all[:ADAPTERS], everywhere, folder) if kind == "mixed" else []
            given["options"] = {"max_model_len": CONTEXT, **({} if kind == "base_default" else OPTIONS)}
            environment = {**ENVIRONMENT, **({} if kind == "base_default" else fastest(python))}
            say(f"starting vLLM: {kind}")
            command = [python, "-P", str(Path(__file__).with_name("vllm_peer.py")), json.dumps(given)]
            with Peer(command, environment) as peer:
                raw["vllm"] = peer.ready
                for count in counts:
                    say(f"{kind}_{count}")
                    parts = [rows[:count] for rows in rounds]
                    theirs: list[Any] = []
                    answers: dict[str, list[Any]] = {name: [] for name in ours[kind]}
                    contestants = {
                        f"ours{name}": _ours(engine, parts, mix and mix[:count], new_tokens, answers[name])
                        for name, mix in ours[kind].items()
                    }
                    contestants["vllm"] = _theirs(peer, parts, new_tokens, theirs)
                    taken = seconds[f"{kind}_{count}"] = interleaved(contestants, repeats)
                    for name, own in answers.items():
                        label = f"{kind}{name}_{count}"
                        ratios[label] = ratio(taken["vllm"], taken[f"ours{name}"])
                        agreement[label] = _compare(own, theirs, new_tokens, label)
    raw.update(
        compiled=compiled(engine), mixes=[mix.id for mix in mixes_all], seconds=seconds, equal_answers=agreement,
        tokens_per_second={
            name: {who: [int(name.rpartition("_")[2]) * new_tokens / one for one in own] for who, own in taken.items()}
            for name, taken in seconds.items()
        },
    )  # fmt: skip
    return report("vllm", where, ratios, {name: aim for name, aim in AIMS.items() if name in ratios}, raw)


def fastest(python: str) -> dict[str, str]:
    """Variables for one process and Intel's OpenMP, which vLLM's documentation advises. By default vLLM computes on all
    cores but one, and has three processes."""
    openmp = Path(python).parent.parent / "lib" / "libiomp5.so"
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(torch.get_num_threads()),
        **({"LD_PRELOAD": str(openmp)} if openmp.is_file() else {}),
    }  # fmt: skip


def lora_adapters(base: str, mixes: Sequence[Mix], bank: Any, folder: str, rank: int = RANK) -> list[str]:
    """Write mixtures as PEFT LoRAs and return their folders."""
    source, made = BaseCheckpoint(base), []
    for number, mix in enumerate(mixes):
        low = LowRank.from_mix(source, mix, bank)
        low.set_ranks(rank=rank, vllm=True)
        made.append(f"{folder}/adapter-{number}")
        export_lora(low, Path(made[-1]))
        say(f"LoRA {number + 1} of {len(mixes)}: it loses {low.error:.0%} of the mixture's change")
    return made


def _ours(
    engine: Engine, rounds: Sequence[list[list[int]]], mix: list[Mix] | None, new_tokens: int, answers: list[Any]
) -> Callable[[int], None]:
    def answer(number: int) -> None:
        answers.append([one.ids for one in engine.generate(rounds[number], mix, max_new_tokens=new_tokens)])

    return answer


def _theirs(
    peer: Peer, rounds: Sequence[list[list[int]]], new_tokens: int, answers: list[Any]
) -> Callable[[int], float]:
    def answer(number: int) -> float:
        found = peer.ask(rows=rounds[number], new_tokens=new_tokens)
        answers.append(found["ids"])
        return found["seconds"]

    return answer


def _compare(ours: list[Any], theirs: list[Any], new_tokens: int, name: str) -> dict[str, Any]:
    """Count requests with the same answer, and the mean number of tokens before the first that differs.

    Raises:
        SigmixError: an answer of another length; or hardly a request on the base model begins alike.
    """
    pairs = [pair for rounds in zip(ours, theirs, strict=True) for pair in zip(*rounds, strict=True)]
    for who, ids in (("sigmix", [one for one, _ in pairs]), ("vLLM", [other for _, other in pairs])):
        if any(len(one) != new_tokens for one in ids):
            raise SigmixError(f"{name}: an answer of {who} does not have {new_tokens} tokens")
    same = [equal_start(one, other) for one, other in pairs]
    if name.startswith("base") and sum(count > 0 for count in same) < LEAST_EQUAL * len(same):
        raise SigmixError(f"{name}: vLLM's answers begin differently from ours, so the requests are not the same")
    return {"requests": len(same), "equal": same.count(new_tokens), "equal_start": sum(same) / len(same)}
