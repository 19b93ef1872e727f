"""``python -m benchmarks export``: peak memory of a merged export, and a mixture in llama.cpp against the engine.

Memory: peak resident size (VmHWM) of a process that streams a merged export, against one that loads the base model with
transformers and saves it (nothing merged). ``memory_*`` compares peaks; ``memory_above_imports_*`` what each has above
its imports, which are over half of it for a small model. ``_1`` is the base model; ``_deep`` repeats its layers, to
show what grows (its expert has no sketches to check).

Speed: seconds of one greedy answer to one request under the same mixture with the same number of threads: the engine
with merged weights; llama.cpp on the base model's own quantized GGUF file, with the mixture as an adapter, exact and of
rank 64, and without one. ``vs_llamacpp_exact`` 2 means that the engine generates twice the tokens per second. Both
process the prompt every time. Without llama-cpp-python the speed part is left out, as ``raw`` records.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Aim, device, interleaved, ratio, report, say
from benchmarks.peak import high_water
from benchmarks.requests import bundled_engine, prompts
from sigmix.errors import SigmixError
from sigmix.experts.bank import Bank
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix
from sigmix.export.base import BaseCheckpoint
from sigmix.export.gguf import export_gguf
from sigmix.export.low_rank import LowRank
from sigmix.export.merged import export_merged
from sigmix.export.verify import LlamaCpp, base_gguf
from sigmix.models.default import DEFAULT
from sigmix.utils.safetensors import TensorSpec, write_file

AIMS = {"memory_above_imports_deep": Aim("<=", 0.5)}

RANK = 64


def run(
    repeats: int | None = None,
    dtype: str | None = None,
    base: str = DEFAULT,
    new_tokens: int = 64,
    times: int = 4,
    mix: str = "addition:0.7+larger:0.3",
    bank: Any = None,
    gguf: Path | None = None,
) -> dict[str, Any]:
    """Run the benchmark; see `harness.report` for the result.

    Args:
        repeats: answers that count, default 3; memory is measured once. dtype: of our engine.
        new_tokens: of an answer. times: how often the layers are repeated in the deep base.
        mix, bank: what is exported. gguf: the base's GGUF file; default: see `base_gguf`.
    """
    where = device()
    bank = Bank.bundled() if bank is None else bank
    source = BaseCheckpoint(base)
    source.adopt_dtype(bank[name] for name in Mix.parse(mix).weights)
    ratios, memory = _memory(source, Mix.parse(mix), bank, times)
    raw: dict[str, Any] = {"base": base, "mix": mix, "memory_bytes": memory, "times": times, "new_tokens": new_tokens}
    file = base_gguf(source, gguf)
    if isinstance(file, Path):
        speeds, facts = _speed(source, Mix.parse(mix), bank, file, dtype, new_tokens, repeats or 3)
        ratios.update(speeds)
        raw.update(facts)
        where["dtype"] = facts["engine_dtype"]
    else:
        say(f"speed is not measured: {file}")
        raw["no_speed"] = file
    return report("export", where, ratios, AIMS, raw)


# ---------------------------------------------------------------------- memory


def _memory(source: BaseCheckpoint, mix: Mix, bank: Any, times: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    ratios: dict[str, list[float]] = {}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        deep = Path(folder) / "deep"
        experts = _deepen(source, mix, bank, deep, times)
        for label, base, given in (("1", source.base, bank), ("deep", str(deep), experts)):
            peaks = {}
            for way in ("stream", "whole"):
                with tempfile.TemporaryDirectory(dir=folder) as out:
                    peaks[way] = _child(way, base, mix, str(given.folder), f"{out}/out")
                say(f"{label}, {way}: {peaks[way]['peak'] / 1e6:.0f} MB, imports {peaks[way]['imported'] / 1e6:.0f} MB")
            above = {way: one["peak"] - one["imported"] for way, one in peaks.items()}
            ratios[f"memory_{label}"] = [peaks["stream"]["peak"] / peaks["whole"]["peak"]]
            ratios[f"memory_above_imports_{label}"] = [above["stream"] / above["whole"]]
            found[label] = {**peaks, "weights": BaseCheckpoint(base).shards.bytes}
    return ratios, found


def _deepen(source: BaseCheckpoint, mix: Mix, bank: Mapping[str, Any], folder: Path, times: int) -> Bank:
    """Write the base with its layers repeated, and a bank of the mix's experts for it."""
    folder.mkdir()
    layers = source.config.num_hidden_layers

    def copies(name: str) -> list[str]:
        head, found, rest = name.partition(".layers.")
        if not found:
            return [name]
        number, rest = rest.split(".", 1)
        return [f"{head}.layers.{int(number) + layers * copy}.{rest}" for copy in range(times)]

    kinds = {key: source.shards.entry(key) for key in source.shards}
    origin = {name: key for key in kinds for name in copies(key)}
    specs = [TensorSpec(name, kinds[key].shape, kinds[key].dtype, kinds[key].bytes) for name, key in origin.items()]
    write_file(folder / "model.safetensors", specs, lambda name: source.shards.tensor(origin[name]))
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = layers * times
    if "layer_types" in config:
        config["layer_types"] *= times
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    made = Bank(folder.parent / "deep-bank", create=True)
    for name in mix.weights:
        z = {copy: value for path, value in bank[name].z.items() for copy in copies(path)}
        made.add(Expert(name, z, {}))
    return made


def _child(way: str, base: str, mix: Mix, bank: str, out: str) -> dict[str, int]:
    """``peak`` and ``imported`` (before anything was read) of one way in a process of its own, in bytes."""
    given = json.dumps({"way": way, "base": base, "mix": mix.id, "bank": bank, "out": out})
    command = [sys.executable, "-m", "benchmarks.export", given]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SigmixError(f"the memory of {way!r} cannot be measured: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _main(given: str) -> None:
    from transformers import AutoModelForCausalLM

    asked = json.loads(given)
    source = BaseCheckpoint(asked["base"])  # both know where the base lies, and have what that imports
    imported = high_water()
    if asked["way"] == "stream":
        mix, bank = Mix.parse(asked["mix"]), Bank(asked["bank"])
        source.adopt_dtype(bank[name] for name in mix.weights)
        export_merged(source, mix, bank, Path(asked["out"]))
    else:
        model: Any = AutoModelForCausalLM.from_pretrained(source.folder, dtype="auto")
        model.save_pretrained(asked["out"])
    print(json.dumps({"peak": high_water(), "imported": imported}))


# ---------------------------------------------------------------------- speed


def _speed(
    source: BaseCheckpoint, mix: Mix, bank: Any, file: Path, dtype: str | None, new_tokens: int, repeats: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    engine = bundled_engine(source.base, dtype, bank)
    row = engine.encode(prompts(engine, 1)[0])
    say("writing adapters")
    with tempfile.TemporaryDirectory() as folder:
        low = LowRank.from_mix(source, mix, bank)
        adapters = {"exact": Path(folder) / "exact.gguf", "rank": Path(folder) / "rank.gguf"}
        sizes = {"exact": export_gguf(low, adapters["exact"], "f16")["bytes"]}
        low.set_ranks(rank=RANK)
        figures = export_gguf(low, adapters["rank"], "f16")
        sizes["rank"] = figures["bytes"]
        with LlamaCpp(file, len(row) + new_tokens, torch.get_num_threads(), all_logits=False) as llama:
            made: dict[str, list[int]] = {}

            def ours(_: int) -> None:
                made["ours"] = engine.generate([row], mix, max_new_tokens=new_tokens)[0].ids

            def theirs(name: str, scales: dict[Path, float]) -> Callable[[int], None]:
                def answer(_: int) -> None:
                    llama.apply(scales)
                    made[name] = llama.greedy(row, new_tokens)

                return answer

            contestants = {
                "ours": ours,
                "llamacpp_exact": theirs("llamacpp_exact", {adapters["exact"]: 1.0}),
                f"llamacpp_rank_{RANK}": theirs(f"llamacpp_rank_{RANK}", {adapters["rank"]: 1.0}),
                "llamacpp_base": theirs("llamacpp_base", {}),
            }
            seconds = interleaved(contestants, repeats)
    if short := [name for name, ids in made.items() if len(ids) != new_tokens]:
        raise SigmixError(f"{', '.join(short)} did not make {new_tokens} tokens, so the work was not the same")
    ratios = {f"vs_{name}": ratio(taken, seconds["ours"]) for name, taken in seconds.items() if name != "ours"}
    facts = {
        "seconds": seconds,
        "tokens_per_second": {name: [new_tokens / one for one in taken] for name, taken in seconds.items()},
        "engine_dtype": str(engine.model.dtype).removeprefix("torch."),
        "gguf": file.name,
        "adapter_bytes": sizes,
        "adapter_error": {"exact": 0.0, "rank": figures["error"]},
        "same_tokens_as_ours": {name: _same(made["ours"], ids) for name, ids in made.items() if name != "ours"},
        "prompt_tokens": len(row),
    }
    return ratios, facts


def _same(one: list[int], other: list[int]) -> int:
    """Tokens until the first that differs."""
    for number, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return number
    return min(len(one), len(other))


if __name__ == "__main__":
    _main(sys.argv[1])
