"""``python -m benchmarks decompose --stream``: peak memory of streaming a checkpoint against loading the whole model.

Each contestant is a process of its own with an empty cache of decompositions:

    whole     load the model, then decompose every adapted matrix into the cache
    stream    `sigmix.svf.checkpoint`: headers and config, then one matrix at a time

Base models: the default one, and two random Llamas in bfloat16 that differ in depth only (hidden 512, intermediate
2048; 6 and 24 layers: 51 and 202 MB), since a stream's peak must not depend on depth. Peaks are the high-water mark
(VmHWM) above the loaded libraries, including those loaded on first use.

Memory and disk of the streams are compared with `sigmix.models.memory.model_plan`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Aim, device, report, say
from benchmarks.peak import high_water
from benchmarks.peers import in_child
from sigmix.models.loading import dtype_of, locate
from sigmix.models.memory import empty_model, model_plan
from sigmix.models.quantization import load_weights
from sigmix.svf.checkpoint import Checkpoint, decompose_checkpoint
from sigmix.svf.decomposition import cached_decompose, decompose
from sigmix.svf.tuner import target_layers
from sigmix.utils.io import write_json

AIMS = {
    "peak_against_whole_24_layers": Aim("<=", 0.2),
    "stream_peak_24_against_6_layers": Aim("<=", 1.2),
    "plan_memory_against_measured": Aim(">=", 0.7),  # too low is what misleads
}

DEPTHS = (6, 24)

WIDTH, INSIDE = 512, 2048


def run(
    repeats: int | None = None,
    dtype: str | None = None,
    base: str = "smollm2-135m",
    depths: tuple[int, int] = DEPTHS,
    width: int = WIDTH,
    inside: int = INSIDE,
) -> dict[str, Any]:
    """Run the benchmark; see `harness.report` for the result.

    Args:
        repeats: rounds, default 1. dtype: that bases are decomposed in; default: as `load_base` picks.
        base: beside the two random ones, of the given depths, width and inner width.
    """
    kind = str(dtype_of(dtype, torch.device("cpu"))).removeprefix("torch.")
    where = device(kind)
    repeats = 1 if repeats is None else repeats
    _, folder, _ = locate(base)
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sigmix-bench-") as scratch:
        bases = {"default": folder}
        for depth in depths:
            bases[f"{depth} layers"] = random_base(Path(scratch) / str(depth), depth, width, inside)
        for number in range(repeats):
            found: dict[str, Any] = {}
            for name, path in bases.items():
                for how in ("stream", "whole"):
                    found[f"{name}, {how}"] = done = measured(how, path, kind)
                    peak = done["peak"] - done["imported"]
                    figures = f"{peak / 1e6:.0f} MB beyond imports, {done['seconds']:.3g} s"
                    say(f"round {number + 1}, {name}, {how}: {figures}")
            rounds.append(found)
        plans = {name: _plan(path, kind) for name, path in bases.items()}

    def beyond(name: str) -> list[int]:
        return [one[name]["peak"] - one[name]["imported"] for one in rounds]

    def over(a: list[Any], b: list[Any]) -> list[float]:
        return [x / y for x, y in zip(a, b, strict=True)]

    few, many = (f"{depth} layers" for depth in depths)
    planned = [plans["default"]["decompose_bytes"]] * repeats
    files = [one["default, stream"]["files"] for one in rounds]
    ratios = {
        "peak_against_whole_default": over(beyond("default, stream"), beyond("default, whole")),
        f"peak_against_whole_{depths[0]}_layers": over(beyond(f"{few}, stream"), beyond(f"{few}, whole")),
        f"peak_against_whole_{depths[1]}_layers": over(beyond(f"{many}, stream"), beyond(f"{many}, whole")),
        f"stream_peak_{depths[1]}_against_{depths[0]}_layers": over(
            beyond(f"{many}, stream"), beyond(f"{few}, stream")
        ),
        "plan_memory_against_measured": over(planned, beyond("default, stream")),
        "plan_disk_against_measured": over([plans["default"]["disk_bytes"]] * repeats, files),
    }
    raw = {
        "base": base,
        "random": {"width": width, "inside": inside, "depths": list(depths)},
        "rounds": rounds,
        "plans": plans,
    }
    aims = {name: aim for name, aim in AIMS.items() if name in ratios}
    return report("decompose-stream", where, ratios, aims, raw)


def random_base(folder: Path, depth: int, width: int, inside: int) -> Path:
    """A folder with a random Llama in bfloat16, written layer by layer into shards."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=inside, num_hidden_layers=depth,
        num_attention_heads=max(width // 64, 1), tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    draw = torch.Generator().manual_seed(depth)
    shapes = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (inside, width), "mlp.up_proj": (inside, width), "mlp.down_proj": (width, inside)}
    placed: dict[str, str] = {}

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file, {"format": "pt"})
        placed.update(dict.fromkeys(tensors, file))

    one = torch.ones(width, dtype=torch.bfloat16)
    write("rest.safetensors", {
        "model.embed_tokens.weight": torch.randn(256, width, generator=draw).bfloat16(), "model.norm.weight": one,
    })  # fmt: skip
    for number in range(depth):
        at = f"model.layers.{number}."
        layer = {f"{at}{n}.weight": 0.02 * torch.randn(s, generator=draw).bfloat16() for n, s in shapes.items()}
        norms = {f"{at}{name}_layernorm.weight": one.clone() for name in ("input", "post_attention")}
        write(f"layer-{number}.safetensors", {**layer, **norms})
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": placed})
    return folder


def measured(how: str, folder: Path, dtype: str) -> dict[str, Any]:
    """``imported`` and ``peak`` bytes, ``seconds`` without imports, ``files``: bytes of decompositions on disk."""
    with tempfile.TemporaryDirectory(prefix="sigmix-bench-") as cache:
        given = {"how": how, "folder": str(folder), "dtype": dtype, "threads": torch.get_num_threads()}
        environment = {**os.environ, "SIGMIX_CACHE": cache}
        found = in_child("benchmarks.stream", given, f"the memory of {how!r} on {folder}", environment)
        files = sum(path.stat().st_size for path in Path(cache).rglob("*.safetensors"))
        return {**found, "files": files}


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True)


def _plan(folder: Path, dtype: str) -> dict[str, Any]:
    model = empty_model(_config(folder))
    return model_plan(model, target_layers(model), dtype)


def _main(given: str) -> None:
    job = json.loads(given)
    torch.set_num_threads(job["threads"])
    folder, kind = Path(job["folder"]), getattr(torch, job["dtype"])
    # the model's code and LAPACK are loaded on first use, by both
    empty_model(_config(folder))
    decompose(torch.randn(64, 96))
    imported, begun = high_water(), time.perf_counter()
    if job["how"] == "stream":
        decompose_checkpoint(Checkpoint(folder, kind), device="cpu")
    else:
        model: Any = load_weights(folder, str(folder), kind, torch.device("cpu"))
        for layer in target_layers(model).values():
            cached_decompose(layer.weight.data)
    print(json.dumps({"imported": imported, "peak": high_water(), "seconds": time.perf_counter() - begun}))


if __name__ == "__main__":
    _main(sys.argv[1])
