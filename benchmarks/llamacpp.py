"""``python -m benchmarks llamacpp``: one greedy answer to one request, our engine against llama.cpp.

llama.cpp runs in a process of its own with the same number of threads, on GGUF files that are made from the base's own:

    base              bfloat16 on both sides
    mixture           one mixture: our merged weights; llama.cpp's bfloat16 file with the exact GGUF adapter
    mixture_merged    the same against its bfloat16 file alone, which is as fast as one that the mixture is merged into
    int8_vs_*         our 8-bit weights for decoding; its Q8_0 and Q4_1

Ratios are in tokens per second, ours over llama.cpp's; both process the prompt every time.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Aim, device, interleaved, ratio, report
from benchmarks.peers import Peer, equal_start
from benchmarks.requests import bundled_engine, compiled, prompts
from sigmix.errors import ConfigError, SigmixError
from sigmix.experts.mix import Mix
from sigmix.export.base import BaseCheckpoint
from sigmix.export.gguf import export_gguf
from sigmix.export.low_rank import LowRank
from sigmix.export.verify import LlamaCpp, base_gguf
from sigmix.models.default import DEFAULT

AIMS = {
    "base": Aim(">=", 1.0), "mixture": Aim(">=", 1.0), "mixture_merged": Aim(">=", 1.0),
    "int8_vs_q8_0": Aim(">=", 0.9), "int8_vs_q4_1": Aim(">=", 0.7),
}  # fmt: skip

KINDS = ("BF16", "Q8_0", "Q4_1")


def run(
    repeats: int | None = None,
    dtype: str | None = None,
    base: str = DEFAULT,
    new_tokens: int = 64,
    mix: str = "sums:0.7+compare-numbers:0.3",
    bank: Any = None,
    gguf: Path | None = None,
    compile: bool = True,
) -> dict[str, Any]:
    """Run the benchmark; see `harness.report` for the result.

    Args:
        repeats: rounds that count, default 5. dtype: of our engine, default bfloat16. new_tokens: of an answer.
        mix, bank: what is mixed. gguf: the base's GGUF file; default: see `base_gguf`. compile: our decode step.

    Raises:
        SigmixError: llama.cpp fails, or an answer has another number of tokens.
    """
    where = device(dtype or "bfloat16")
    raw: dict[str, Any] = {"base": base, "mix": mix, "new_tokens": new_tokens}
    source = BaseCheckpoint(base)
    file = base_gguf(source, gguf)
    if not isinstance(file, Path):
        return report("llamacpp", where, {}, {}, {**raw, "skipped": {"llama.cpp": file}})
    engine = bundled_engine(base, where["dtype"], bank, compile)
    engines = {"base": engine, "mixture": engine}
    try:
        engines["int8"] = bundled_engine(base, where["dtype"], bank, compile, decode_weights="int8")
    except ConfigError as error:
        raw["skipped"] = {"8-bit weights": str(error)}
    one = Mix.parse(mix)
    row = engine.encode(prompts(engine, 1)[0])
    answers: dict[str, list[int]] = {}

    def ours(name: str) -> Callable[[int], None]:
        mix = one if name == "mixture" else None

        def answer(_: int) -> None:
            answers[f"ours_{name}"] = engines[name].generate([row], mix, max_new_tokens=new_tokens)[0].ids

        return answer

    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter.gguf"
        raw["adapter_bytes"] = export_gguf(LowRank.from_mix(source, one, engine.bank), adapter, "f16")["bytes"]
        context = len(row) + new_tokens
        given = {"file": str(file), "folder": folder, "context": context, "threads": torch.get_num_threads()}
        with Peer([sys.executable, "-m", "benchmarks.llamacpp", json.dumps(given)]) as peer:

            def theirs(name: str, kind: str, adapters: Mapping[str, float]) -> Callable[[int], float]:
                def answer(_: int) -> float:
                    found = peer.ask(kind=kind, adapters=adapters, row=row, new_tokens=new_tokens)
                    answers[name] = found["ids"]
                    return found["seconds"]

                return answer

            contestants: dict[str, Callable[[int], float | None]] = {
                **{f"ours_{name}": ours(name) for name in engines},
                **{f"llamacpp_{kind}": theirs(f"llamacpp_{kind}", kind, {}) for kind in KINDS},
                "llamacpp_adapter": theirs("llamacpp_adapter", "BF16", {str(adapter): 1.0}),
            }
            seconds = interleaved(contestants, repeats or 5)
    if short := [name for name, ids in answers.items() if len(ids) != new_tokens]:
        raise SigmixError(f"{', '.join(short)} did not generate {new_tokens} tokens")
    pairs = {"base": ("llamacpp_BF16", "ours_base"), "mixture": ("llamacpp_adapter", "ours_mixture")}
    if "int8" in engines:
        pairs |= {f"int8_vs_{kind.lower()}": (f"llamacpp_{kind}", "ours_int8") for kind in KINDS[1:]}
    raw.update(
        seconds=seconds, prompt_tokens=len(row), compiled={name: compiled(one) for name, one in engines.items()},
        tokens_per_second={name: [new_tokens / one for one in taken] for name, taken in seconds.items()},
        same_tokens={name: equal_start(answers[theirs], answers[ours]) for name, (theirs, ours) in pairs.items()},
    )  # fmt: skip
    ratios = {name: ratio(seconds[theirs], seconds[ours]) for name, (theirs, ours) in pairs.items()}
    ratios["mixture_merged"] = ratio(seconds["llamacpp_BF16"], seconds["ours_mixture"])
    return report("llamacpp", where, ratios, {name: aim for name, aim in AIMS.items() if name in ratios}, raw)


def _peer(given: str) -> None:
    """Write the files, then answer the requests of standard input; see `benchmarks.peers`."""
    options = json.loads(given)
    with contextlib.ExitStack() as stack:
        models = {}
        for kind in KINDS:
            file = _quantised(Path(options["file"]), Path(options["folder"]) / f"{kind}.gguf", kind)
            models[kind] = stack.enter_context(LlamaCpp(file, options["context"], options["threads"], all_logits=False))
        print("{}", flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            llama = models[request["kind"]]
            llama.apply({Path(path): scale for path, scale in request["adapters"].items()})
            start = time.perf_counter()
            ids = llama.greedy(request["row"], request["new_tokens"])
            print(json.dumps({"seconds": time.perf_counter() - start, "ids": ids}), flush=True)


def _quantised(file: Path, out: Path, kind: str) -> Path:
    """Convert a GGUF file to another type of numbers."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    options.allow_requantize = True
    if llama_cpp.llama_model_quantize(str(file).encode(), str(out).encode(), ctypes.byref(options)):
        raise SigmixError(f"llama.cpp cannot convert {file} to {kind}")
    return out


if __name__ == "__main__":
    _peer(sys.argv[1])
