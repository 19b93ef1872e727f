"""What `sigmix doctor` finds: packages, machine, cache, dtype, and what a base would need. Nothing is changed."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import typer

from sigmix.cli import _planning as planning
from sigmix.cli._console import emit, size, working
from sigmix.cli._options import JSON


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: sigmix doctor --base meta-llama/Meta-Llama-3-70B-Instruct --plan --gpus 8")(doctor)


def doctor(
    base: str = typer.Option(
        None, help="What this base would need: smollm2-135m, a hub name, a folder, a .gguf file, a config.json."
    ),
    plan: bool = typer.Option(
        False, "--plan", help="Its matrices; memory, disk and time to decompose, train and serve it."
    ),
    dtype: str = typer.Option(None, help="With --plan: of the weights. Default: as the base would be loaded here."),
    quantization: str = typer.Option(None, help="With --plan: linear layers in int8, int4 or nf4."),
    gpus: int = typer.Option(1, min=1, help="With --plan: devices that the layers are spread over."),
    gpu_memory: float = typer.Option(None, min=0.1, help="With --plan: GB of each device. Default: of the GPU here."),
    batch: int = typer.Option(64, min=1, help="With --plan: answers of a training step."),
    prompt: int = typer.Option(64, min=1, help="With --plan: tokens of a training prompt."),
    answer: int = typer.Option(16, min=1, help="With --plan: tokens of a training answer."),
    requests: int = typer.Option(32, min=1, help="With --plan: requests that are served together."),
    context: int = typer.Option(1000, min=1, help="With --plan: tokens of each request."),
    as_json: bool = JSON,
) -> None:
    """What is installed and missing, what this machine has, and what a base would need of it; downloads no weights."""
    from sigmix.cli import _planning as planning
    from sigmix.cli import doctor as diagnose
    from sigmix.errors import SigmixError
    from sigmix.models.default import DEFAULT
    from sigmix.models.memory import Load

    figures: dict[str, Any] = {
        "packages": diagnose.packages(),
        "machine": diagnose.machine(),
        "cache": diagnose.cache(),
        "dtype": diagnose.dtype(),
    }
    failed: SigmixError | None = None
    try:
        with working("reading the base's config"):
            read = planning.read_config(base or DEFAULT)
            kind = (plan and dtype) or figures["dtype"]["chosen"] or "bfloat16"
            kept = quantization if plan else None
            cuda = bool(figures["machine"]["gpu"]) or (plan and (gpus > 1 or gpu_memory is not None))
            figures["base"] = planning.needs(base or DEFAULT, read, figures["machine"], kind, kept, cuda)
        if plan:
            load = Load(batch, min(4, batch), prompt, answer, requests, context)
            with working("measuring this machine"):
                figures["base"]["budget"] = planning.budget_of(
                    read[0], figures["machine"], kind, gpus, gpu_memory, load, kept, cuda
                )
    except SigmixError as error:
        failed = error
        figures["base"] = {"name": base, "problem": str(error)}
    # a plan is of a machine to come: that it does not fit this one is its answer, not a problem
    figures["problems"] = diagnose.problems(figures | ({"base": {}} if plan else {}))
    emit(figures, as_json, diagnose.text(figures, plan))
    if failed is not None:
        raise failed
    if figures["problems"]:
        raise SigmixError(f"{len(figures['problems'])} problems, the first: {figures['problems'][0]}")


CORE = ("torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub", "numpy", "rich", "typer")


REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)\s*(?:\[[^]]*\])?\s*\(?(?P<pin>[^;)]*)\)?\s*(?:;(?P<marker>.*))?")


def packages() -> dict[str, Any]:
    """python, core and extras: {name: {"version", "wanted", "ok"}}, and for each extra the command that installs it."""
    core: dict[str, Any] = {}
    extras: dict[str, dict[str, Any]] = {}
    try:
        wanted = metadata.requires("sigmix") or []
        installed = metadata.version("sigmix")
    except metadata.PackageNotFoundError:  # run from a checkout
        wanted, installed = list(CORE), None
    for line in wanted:
        match = REQUIREMENT.match(line)
        if match is None or match["name"] == "sigmix":
            continue
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", match["marker"] or "")
        row = _package(match["name"], match["pin"].strip())
        if extra is None:
            core[match["name"]] = row
        else:
            extras.setdefault(extra[1], {})[match["name"]] = row
    return {
        "sigmix": installed,
        "python": platform.python_version(),
        "core": core,
        "extras": {
            name: {
                "packages": rows,
                "ok": all(row["ok"] for row in rows.values()),
                "install": f"pip install 'sigmix[{name}]'",
            }
            for name, rows in sorted(extras.items())
        },
    }


def _package(name: str, pin: str) -> dict[str, Any]:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return {"version": None, "wanted": pin, "ok": False}
    try:
        from packaging.specifiers import SpecifierSet

        fits = SpecifierSet(pin).contains(version, prereleases=True)
    except Exception:  # no `packaging`, or a version that it cannot read: installed is all that is known
        fits = True
    return {"version": version, "wanted": pin, "ok": fits}


def machine() -> dict[str, Any]:
    """cpu cores this process may use, memory, free disk at the cache; bytes, None where the system does not say."""
    from sigmix.utils.cache import cache_dir
    from sigmix.utils.io import free_bytes

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores,
        "memory_bytes": _memory("MemTotal"),
        "memory_available_bytes": _memory("MemAvailable"),
        "disk_free_bytes": free_bytes(cache_dir()),
        "gpu": _gpu(),
    }


def _memory(key: str) -> int | None:
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"), re.M)
        return int(found[1]) * 1024 if found else None
    except OSError:
        pages = "SC_PHYS_PAGES" if key == "MemTotal" else "SC_AVPHYS_PAGES"
        try:
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            return None


def _gpu() -> dict[str, Any] | None:
    try:
        import torch

        if not torch.cuda.is_available():
            return None
        return {"name": torch.cuda.get_device_name(), "memory_bytes": torch.cuda.get_device_properties(0).total_memory}
    except Exception:  # a torch that does not load is reported with the packages
        return None


def cache() -> dict[str, Any]:
    """The cache folder, whether it can be written, bytes of each kind, and the models in it."""
    from sigmix.utils.cache import KINDS, cache_dir, entries
    from sigmix.utils.io import existing

    found = entries()
    folder = cache_dir()
    there = existing(folder)
    return {
        "folder": str(folder),
        "writable": os.access(there, os.W_OK) and there.is_dir(),
        "bytes": {kind: sum(entry.bytes for entry in found if entry.kind == kind) for kind in KINDS},
        "models": [{"name": entry.name, "bytes": entry.bytes} for entry in found if entry.kind == "models"],
    }


def dtype() -> dict[str, Any]:
    """In what dtype a base is loaded here, and why."""
    try:
        import torch

        from sigmix.models.loading import default_dtype

        device = "cuda" if torch.cuda.is_available() else "cpu"
        chosen = str(default_dtype(device)).removeprefix("torch.")
    except Exception as error:
        return {"chosen": None, "why": f"torch does not load: {error}"}
    if device == "cuda":
        why = "the GPU computes bfloat16 natively" if chosen == "bfloat16" else "the GPU has no native bfloat16"
    else:
        faster = "faster" if chosen == "bfloat16" else "not faster"
        why = f"bfloat16 was measured {faster} than float32 on this CPU with this torch"
    return {"chosen": chosen, "device": device, "why": why}


def problems(figures: dict[str, Any]) -> list[str]:
    """What keeps sigmix from working here, each with the command that mends it. Missing extras are no problem."""
    found = []
    if not (3, 10) <= sys.version_info[:2] < (3, 14):
        found.append(f"Python {figures['packages']['python']} is not supported -> use 3.10 to 3.13")
    for name, row in figures["packages"]["core"].items():
        if not row["ok"]:
            state = f"{name} {row['version']} is too old" if row["version"] else f"{name} is not installed"
            found.append(f"{state} -> pip install '{name}{row['wanted']}'")
    if not figures["cache"]["writable"]:
        folder = figures["cache"]["folder"]
        found.append(f"the cache {folder} cannot be written -> set SIGMIX_CACHE to a folder that can")
    if figures["base"].get("fits_disk") is False:
        free = size(figures["machine"]["disk_free_bytes"])
        found.append(
            f"{figures['base']['name']} needs {size(figures['base']['disk_bytes'])} of disk, {free} are free "
            "-> set SIGMIX_CACHE to another disk, or: sigmix cache clear"
        )
    return found


def text(figures: dict[str, Any], plan: bool) -> str:
    """The findings for a person."""
    packs, has, stored = figures["packages"], figures["machine"], figures["cache"]
    lines = [f"python {packs['python']}, sigmix {packs['sigmix'] or 'run from its source'}"]
    lines += [f"  {name:<18} {row['version'] or 'MISSING'}" for name, row in packs["core"].items()]
    for name, extra in packs["extras"].items():
        missing = [one for one, row in extra["packages"].items() if not row["ok"]]
        state = f"missing or too old: {', '.join(missing)} -> {extra['install']}" if missing else "installed"
        lines.append(f"extra {name}: {state}")
    memory = "unknown memory"
    if has["memory_bytes"]:
        memory = f"{size(has['memory_bytes'])} of memory ({size(has['memory_available_bytes'] or 0)} available)"
    disk = f"{size(has['disk_free_bytes'])} of disk free"
    lines.append(f"machine: {has['system']}, {has['cores']} cores, {memory}, {disk}")
    lines.append(f"GPU: {has['gpu']['name']}" if has["gpu"] else "GPU: none")
    held = ", ".join(f"{kind} {size(count)}" for kind, count in stored["bytes"].items())
    lines.append(f"cache: {stored['folder']}: {held}")
    lines += [f"  {model['name']} {size(model['bytes'])}" for model in stored["models"]]
    lines.append(f"dtype: {figures['dtype']['chosen']}, because {figures['dtype']['why']}")
    lines += planning.text(figures["base"], plan)
    lines += [f"PROBLEM: {problem}" for problem in figures["problems"]]
    return "\n".join(lines if figures["problems"] else [*lines, "everything that sigmix needs is here"])
