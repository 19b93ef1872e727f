"""``python -m benchmarks export``: peak memory of a merged export.

Peak resident size (VmHWM) of a process that streams a merged export, against one that loads the base model with
transformers and saves it (nothing merged). ``memory_*`` compares peaks; ``memory_above_imports_*`` what each has above
its imports, which are over half of it for a small model. ``_1`` is the base model; ``_deep`` repeats its layers, to
show what grows (its expert has no sketches to check).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import Aim, device, report, say
from benchmarks.peak import high_water
from benchmarks.peers import in_child
from sigmix.experts.bank import Bank
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix
from sigmix.export.base import BaseCheckpoint
from sigmix.export.merged import export_merged
from sigmix.models.default import DEFAULT
from sigmix.utils.safetensors import TensorSpec, write_file

AIMS = {"memory_above_imports_deep": Aim("<=", 0.5)}


def run(
    repeats: int | None = None,
    dtype: str | None = None,
    base: str = DEFAULT,
    times: int = 4,
    mix: str = "sums:0.7+compare-numbers:0.3",
    bank: Any = None,
) -> dict[str, Any]:
    """Run the benchmark; see `harness.report` for the result.

    Args:
        repeats, dtype: not used. times: how often the layers are repeated in the deep base.
        mix, bank: what is exported.
    """
    where = device()
    bank = Bank.bundled() if bank is None else bank
    one = Mix.parse(mix)
    source = BaseCheckpoint(base)
    source.adopt_dtype(bank[name] for name in one.weights)
    ratios: dict[str, list[float]] = {}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        deep = Path(folder) / "deep"
        experts = _deepen(source, one, bank, deep, times)
        for label, place, given in (("1", source.base, bank), ("deep", str(deep), experts)):
            peaks = {}
            for way in ("stream", "whole"):
                with tempfile.TemporaryDirectory(dir=folder) as out:
                    peaks[way] = _child(way, place, one, str(given.folder), f"{out}/out")
                say(f"{label}, {way}: {peaks[way]['peak'] / 1e6:.0f} MB, imports {peaks[way]['imported'] / 1e6:.0f} MB")
            above = {way: peak["peak"] - peak["imported"] for way, peak in peaks.items()}
            ratios[f"memory_{label}"] = [peaks["stream"]["peak"] / peaks["whole"]["peak"]]
            ratios[f"memory_above_imports_{label}"] = [above["stream"] / above["whole"]]
            found[label] = {**peaks, "weights": BaseCheckpoint(place).shards.bytes}
    raw = {"base": base, "mix": mix, "memory_bytes": found, "times": times}
    return report("export", where, ratios, AIMS, raw)


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
    given = {"way": way, "base": base, "mix": mix.id, "bank": bank, "out": out}
    return in_child("benchmarks.export", given, f"the memory of {way!r}")


def _main(given: str) -> None:
    from transformers import AutoModelForCausalLM

    job = json.loads(given)
    source = BaseCheckpoint(job["base"])  # both know where the base lies, and have what that imports
    imported = high_water()
    if job["way"] == "stream":
        mix, bank = Mix.parse(job["mix"]), Bank(job["bank"])
        source.adopt_dtype(bank[name] for name in mix.weights)
        export_merged(source, mix, bank, Path(job["out"]))
    else:
        model: Any = AutoModelForCausalLM.from_pretrained(source.folder, dtype="auto")
        model.save_pretrained(job["out"])
    print(json.dumps({"peak": high_water(), "imported": imported}))


if __name__ == "__main__":
    _main(sys.argv[1])
