"""`sigmix doctor`: installed packages, machine, cache, dtype, and the memory and disk that a base model needs."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sigmix.cli import app
from sigmix.cli._console import emit, working
from sigmix.cli._options import DEFAULT, JSON
from sigmix.utils.io import size

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_LLAMA3: dict[str, Any] = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128}
_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "meta-llama/meta-llama-3-8b-instruct": {**_LLAMA3, **_8B},
    "meta-llama/meta-llama-3-70b-instruct": {**_LLAMA3, **_70B},
    "mistralai/mistral-7b-instruct-v0.3": {**_LLAMA3, **_8B, "model_type": "mistral", "vocab_size": 32768},
}  # fmt: skip
"""Published configs of the default base model and of the paper's gated ones, which need no download."""


@app.command(epilog="Example: sigmix doctor --base meta-llama/Meta-Llama-3-70B-Instruct --plan --gpus 8")
def doctor(
    base: str = typer.Option(
        DEFAULT, help="Base model: smollm2-135m, a hub name, a folder, a .gguf file or a config.json."
    ),
    plan: bool = typer.Option(False, "--plan", help="Show matrices, and memory to decompose, train and serve."),
    dtype: str = typer.Option(None, help="dtype of the weights, with --plan. Default: the one used on this machine."),
    quantization: str = typer.Option(None, help="Quantization with --plan: int8, int4 or nf4."),
    gpus: int = typer.Option(1, min=1, help="Number of GPUs over which layers are spread, with --plan."),
    gpu_memory: float = typer.Option(None, min=0.1, help="GB per GPU, with --plan. Default: that of this machine's."),
    as_json: bool = JSON,
) -> None:
    """Check the installation and this machine, and count what a base model needs; downloads no weights."""
    from sigmix.errors import SigmixError

    figures: dict[str, Any] = {
        "packages": packages(), "machine": machine(), "cache": cache(), "dtype": default_dtype(),
    }  # fmt: skip
    failure: SigmixError | None = None
    try:
        with working("reading the config"):
            kind = (plan and dtype) or figures["dtype"]["chosen"] or "bfloat16"
            cuda = bool(figures["machine"]["gpu"]) or (plan and (gpus > 1 or gpu_memory is not None))
            figures["base"] = needs(base, kind, quantization if plan else None, cuda, figures["machine"])
            if plan:
                figures["base"]["per_gpu"] = per_gpu(figures["base"], gpus, gpu_memory, figures["machine"])
    except SigmixError as error:
        failure = error
        figures["base"] = {"name": base, "problem": str(error)}
    figures["problems"] = problems(figures, plan)
    emit(figures, as_json, "\n".join(_lines(figures, plan)))
    if failure is not None:
        raise failure
    if figures["problems"]:
        raise SigmixError(f"{len(figures['problems'])} problems, the first: {figures['problems'][0]}")


def packages() -> dict[str, Any]:
    """Return versions and requirements of core packages and extras: {name: {"version", "required", "ok"}}."""
    from packaging.requirements import Requirement

    core: dict[str, Any] = {}
    extras: dict[str, dict[str, Any]] = {}
    try:
        requirements, installed = metadata.requires("sigmix") or [], metadata.version("sigmix")
    except metadata.PackageNotFoundError:  # run from a checkout
        requirements, installed = ["torch", "transformers", "peft", "typer"], None
    for requirement in map(Requirement, requirements):
        extra = re.search(r"extra == \"([\w-]+)\"", str(requirement.marker))
        if requirement.name != "sigmix":
            rows = core if extra is None else extras.setdefault(extra[1], {})
            rows[requirement.name] = _package(requirement)
    listed = {
        name: {"packages": rows, "ok": all(row["ok"] for row in rows.values()),
               "install": f"pip install 'sigmix[{name}]'"}
        for name, rows in sorted(extras.items())
    }  # fmt: skip
    return {"sigmix": installed, "python": platform.python_version(), "core": core, "extras": listed}


def _package(requirement: Requirement) -> dict[str, Any]:
    required = str(requirement.specifier)
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return {"version": None, "required": required, "ok": False}
    return {"version": version, "required": required, "ok": requirement.specifier.contains(version, prereleases=True)}


def machine() -> dict[str, Any]:
    """Return CPU cores of this process, memory, free disk space at the cache, in bytes, and the GPU."""
    import psutil

    from sigmix.utils.cache import cache_dir
    from sigmix.utils.io import free_bytes

    memory = psutil.virtual_memory()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory.total, "memory_available_bytes": memory.available,
        "disk_free_bytes": free_bytes(cache_dir()), "gpu": _gpu(), "kernels": _kernels(),
    }  # fmt: skip


def _gpu() -> dict[str, Any] | None:
    try:
        import torch

        if not torch.cuda.is_available():
            return None
        return {"name": torch.cuda.get_device_name(), "memory_bytes": torch.cuda.get_device_properties(0).total_memory}
    except Exception:  # a torch that cannot be imported is reported with the dtype
        return None


def _kernels() -> dict[str, Any]:
    """Return whether the C++ kernels of a decode step work on this CPU, after compiling them, and why not."""
    try:
        from sigmix.engine.cpu import native

        native.load_kernels()
    except Exception as error:
        return {"bfloat16": False, "int8": False, "problem": str(error)}
    return {"bfloat16": native.has_bfloat16(), "int8": native.has_int8(), "problem": None}


def cache() -> dict[str, Any]:
    """Return the cache folder, whether it is writable, bytes of each kind, and its models."""
    from sigmix.utils.cache import KINDS, cache_dir, entries
    from sigmix.utils.io import existing

    every = entries()
    parent = existing(cache_dir())
    return {
        "folder": str(cache_dir()),
        "writable": os.access(parent, os.W_OK) and parent.is_dir(),
        "bytes": {kind: sum(entry.bytes for entry in every if entry.kind == kind) for kind in KINDS},
        "models": [{"name": entry.name, "bytes": entry.bytes} for entry in every if entry.kind == "models"],
    }


def default_dtype() -> dict[str, Any]:
    """Return the dtype in which base models are loaded on this machine, and the reason."""
    try:
        import torch

        from sigmix.models.loading import default_dtype as measured

        device = "cuda" if torch.cuda.is_available() else "cpu"
        chosen = str(measured(device)).removeprefix("torch.")
    except Exception as error:
        return {"chosen": None, "why": f"torch cannot be imported: {error}"}
    fast = chosen == "bfloat16"
    if device == "cuda":
        why = "the GPU computes bfloat16 natively" if fast else "the GPU has no native bfloat16"
    else:
        why = f"bfloat16 was measured {'faster' if fast else 'not faster'} than float32 on this CPU"
    return {"chosen": chosen, "device": device, "why": why}


def needs(name: str, dtype: str, quantization: str | None, cuda: bool, has: dict[str, Any]) -> dict[str, Any]:
    """Return the plan of a base model, see `sigmix.models.memory.model_plan`, and whether it fits this machine.

    Raises:
        BaseModelError: no config, or not of a supported causal language model.
        ConfigError: unknown dtype or quantization.
    """
    from sigmix.models.batching import check_architecture
    from sigmix.models.memory import empty_model, model_plan
    from sigmix.svf.tuner import target_layers

    config, source = read_config(name)
    model = empty_model(config)
    check_architecture(type(model), config, name)
    plan = model_plan(model, target_layers(model), dtype, quantization, cuda)
    memory, disk = has["memory_available_bytes"], plan["weights_bf16_bytes"] + plan["disk_bytes"]
    forms = {form: plan["weights_bytes"] + extra for form, extra in plan["form_bytes"].items()}
    return {
        "name": name, "config": source, "plan": plan, "memory_bytes": forms, "disk_bytes": disk,
        "fits_memory": {form: needed < memory for form, needed in forms.items()},
        "fits_disk": disk < has["disk_free_bytes"],
    }  # fmt: skip


def per_gpu(base: dict[str, Any], gpus: int, gpu_memory: float | None, has: dict[str, Any]) -> dict[str, Any]:
    """Return bytes per GPU of training and of each form, with layers spread evenly, and whether they fit."""
    available = int(gpu_memory * 1e9) if gpu_memory is not None else (has["gpu"] or {}).get("memory_bytes")
    needed = {"train": base["plan"]["train_bytes"] // gpus}
    needed |= {f"serve, {form}": count // gpus for form, count in base["memory_bytes"].items()}
    fits = {name: None if available is None else count < available for name, count in needed.items()}
    return {"gpus": gpus, "memory_bytes": available, "bytes": needed, "fits": fits}


def read_config(name: str) -> tuple[Any, str]:
    """Return the config of a base model, and its source.

    Args:
        name: as for `load_base`, or a folder with a config.json, or such a file.

    Raises:
        BaseModelError: the config cannot be found or read.
    """
    from transformers import AutoConfig

    from sigmix.errors import BaseModelError, reraised
    from sigmix.models import gguf
    from sigmix.models.default import offline
    from sigmix.models.hub import base_names, hub_errors, near_paths
    from sigmix.models.loading import HUB_NAME
    from sigmix.utils.logging import quiet

    path, own = Path(name).expanduser(), "the model's own"
    if name.lower() in CONFIGS and not path.exists():
        return AutoConfig.for_model(**CONFIGS[name.lower()]), "published sizes"
    if path.is_file() and path.suffix.lower() == ".gguf":
        files = gguf.model_files(path)
        return gguf.read_config(gguf.read_contents(files), files[0]), own
    if path.is_dir() and not (path / "config.json").is_file():
        raise BaseModelError(f"{name} is no model folder: config.json is missing", remedy=base_names())
    local = path.is_dir() or (path.is_file() and path.suffix == ".json")
    if not local and (path.exists() or name.startswith((".", "/", "~")) or not HUB_NAME.fullmatch(name)):
        raise BaseModelError(f"there is no base model at {name!r}{near_paths(path)}", remedy=base_names())
    problem, remedy = f"{name} has no config of a model", "give a model's config.json, with its model_type"
    on_the_hub = hub_errors(name, BaseModelError, action="read the config of", instead=base_names())
    with reraised(BaseModelError, problem, remedy), on_the_hub, quiet():
        return AutoConfig.from_pretrained(path if local else name, local_files_only=local or offline()), own


def problems(figures: dict[str, Any], plan: bool = False) -> list[str]:
    """Return what prevents sigmix from working here, each with its remedy; with ``plan``, the base is for elsewhere."""
    lines = []
    if not (3, 10) <= sys.version_info[:2] < (3, 14):
        lines.append(f"Python {figures['packages']['python']} is not supported -> use 3.10 to 3.13")
    for name, row in figures["packages"]["core"].items():
        if not row["ok"]:
            state = f"{name} {row['version']} is too old" if row["version"] else f"{name} is not installed"
            lines.append(f"{state} -> pip install '{name}{row['required']}'")
    if not figures["cache"]["writable"]:
        folder = figures["cache"]["folder"]
        lines.append(f"the cache {folder} is not writable -> set SIGMIX_CACHE to a writable folder")
    base = figures["base"]
    if base.get("fits_disk") is False and not plan:
        free = size(figures["machine"]["disk_free_bytes"])
        lines.append(
            f"{base['name']} needs {size(base['disk_bytes'])} of disk space, {free} are free "
            "-> set SIGMIX_CACHE to another disk, or: sigmix cache clear"
        )
    return lines


def _lines(figures: dict[str, Any], plan: bool) -> list[str]:
    packs, has, stored = figures["packages"], figures["machine"], figures["cache"]
    lines = [f"python {packs['python']}, sigmix {packs['sigmix'] or 'from source'}"]
    lines += [f"  {name:<18} {row['version'] or 'MISSING'}" for name, row in packs["core"].items()]
    for name, extra in packs["extras"].items():
        missing = [one for one, row in extra["packages"].items() if not row["ok"]]
        state = f"missing or too old: {', '.join(missing)} -> {extra['install']}" if missing else "installed"
        lines.append(f"extra {name}: {state}")
    memory = f"memory {size(has['memory_bytes'])} ({size(has['memory_available_bytes'])} available)"
    disk = f"free disk space {size(has['disk_free_bytes'])}"
    lines.append(f"machine: {has['system']}, {has['cores']} cores, {memory}, {disk}")
    lines.append(f"GPU: {has['gpu']['name'] if has['gpu'] else 'none'}")
    kernels = [name for name in ("bfloat16", "int8") if has["kernels"][name]]
    why = has["kernels"]["problem"]
    lines.append(f"CPU kernels: {', '.join(kernels) or 'those of torch'}{f' ({why})' if why else ''}")
    used = ", ".join(f"{kind} {size(count)}" for kind, count in stored["bytes"].items())
    lines.append(f"cache: {stored['folder']}: {used}")
    lines += [f"  {model['name']} {size(model['bytes'])}" for model in stored["models"]]
    lines.append(f"dtype: {figures['dtype']['chosen']} ({figures['dtype']['why']})")
    lines += _base_lines(figures["base"], plan)
    lines += [f"PROBLEM: {problem}" for problem in figures["problems"]]
    return lines if figures["problems"] else [*lines, "no problems"]


def _base_lines(base: dict[str, Any], plan: bool) -> list[str]:
    if "plan" not in base:
        return [f"base: {base['problem']}"]
    counts = base["plan"]
    kept = f", {counts['quantization']}" if counts["quantization"] else ""
    forms = ", ".join(f"{form} {size(count)}" for form, count in base["memory_bytes"].items())
    expert = f"{counts['z_parameters']:,} parameters per expert ({size(counts['expert_bytes'])})"
    lines = [
        f"base {base['name']}: {counts['parameters']:,} parameters, {counts['matrices']} adapted matrices, {expert}",
        f"  memory of weights and factors by form ({counts['dtype']}{kept}): {forms}",
        f"  disk: weights {size(counts['weights_bf16_bytes'])}, decompositions {size(counts['disk_bytes'])}",
    ]
    if base["config"] != "the model's own":
        lines.append(f"  config: {base['config']}")
    if short := [form for form, fits in base["fits_memory"].items() if not fits]:
        lines.append(f"  more than the available memory: {', '.join(short)}")
    if not plan:
        return lines
    lines += [f"  {one['count']:>4} × [{one['out']}, {one['in']}]" for one in counts["by_shape"]]
    lines += [f"  not adapted: {one['count']} × {one['name']} {one['shape']}: {one['why']}"
              for one in counts["not_adapted"]]  # fmt: skip
    lines.append(f"  decompose, one matrix at a time: about {size(counts['decompose_bytes'])} of memory")
    lines.append(f"  train: {size(counts['train_bytes'])} for weights, factors, z and its optimizer state")
    if counts["kv_bytes_per_1000_tokens"]:
        lines[-1] += f", and about {size(counts['activation_bytes_per_1000_tokens'])} per 1,000 tokens of a pass"
        lines.append(f"  serve: a form's memory, and a KV cache of {size(counts['kv_bytes_per_1000_tokens'])} per "
                     "1,000 tokens")  # fmt: skip
    share = base["per_gpu"]
    if share["gpus"] > 1 or share["memory_bytes"] is not None:
        words = {True: " (fits)", False: " (TOO MUCH)", None: ""}
        amounts = [f"{name} {size(count)}{words[share['fits'][name]]}" for name, count in share["bytes"].items()]
        limit = f" of {size(share['memory_bytes'])}" if share["memory_bytes"] is not None else ""
        lines.append(f"  on each of {share['gpus']} GPUs{limit}, about: {', '.join(amounts)}")
    return lines
