"""`sigmix cache` and `sigmix doctor`."""

from __future__ import annotations

import datetime
import sys
from typing import Any

import typer

from sigmix.cli.shared import JSON, emit, size, table, working


def add(app: typer.Typer) -> None:
    """Register the commands."""
    group = typer.Typer(
        help="What lies in the cache, and clearing it.", no_args_is_help=True, rich_markup_mode=None,
        epilog="Example: sigmix cache list",
    )  # fmt: skip
    group.command("list", epilog="Example: sigmix cache list --kind svd")(listed)
    group.command("clear", epilog="Example: sigmix cache clear --kind models --yes")(cleared)
    app.add_typer(group, name="cache")
    app.command(epilog="Example: sigmix doctor --base meta-llama/Meta-Llama-3-70B-Instruct --plan --gpus 8")(doctor)


KIND = typer.Option(
    "all", help="models, svd (decompositions), downloads, banks (from the hub), vllm (its adapters), or all."
)


def listed(
    kind: str = KIND,
    damaged: bool = typer.Option(False, "--damaged", help="Only what is damaged, with the reason (reads everything)."),
    as_json: bool = JSON,
) -> None:
    """Converted models, decompositions, unfinished downloads and banks from the hub with their sizes."""
    from sigmix.caching import damage, entries
    from sigmix.files import cache_dir

    found = entries(_kind(kind))
    with working("reading the cache"):
        reasons = {entry.path: why for entry in found if (why := damage(entry))} if damaged else {}
    shown = [entry for entry in found if not damaged or entry.path in reasons]
    total = sum(entry.bytes for entry in shown)
    figures = {
        "folder": str(cache_dir()),
        "bytes": total,
        "entries": [_entry(entry) | ({"damage": reasons[entry.path]} if damaged else {}) for entry in shown],
    }
    if as_json:
        emit(figures, True, "")
        return
    rows = [
        [entry.kind, entry.name[:40], size(entry.bytes), _date(entry.last_used), reasons.get(entry.path)]
        for entry in shown
        if damaged or entry.kind != "svd" or kind == "svd"
    ]
    if not damaged and kind != "svd" and (svd := [entry for entry in shown if entry.kind == "svd"]):
        last = _date(max(entry.last_used for entry in svd))
        rows.append(["svd", f"{len(svd)} decompositions", size(sum(entry.bytes for entry in svd)), last, None])
    if not rows:
        typer.echo(f"{cache_dir()}: nothing {'is damaged' if damaged else 'there'}")
        return
    columns = ["kind", "name", "size", "last used", *(["damage"] if damaged else [])]
    table(f"{cache_dir()}: {size(total)}", columns, [row[: len(columns)] for row in rows])


def cleared(
    kind: str = KIND,
    damaged: bool = typer.Option(False, "--damaged", help="Only what is damaged, of every kind."),
    yes: bool = typer.Option(False, "--yes", help="Do not ask."),
    as_json: bool = JSON,
) -> None:
    """Remove what is in the cache; all of it can be made again."""
    from sigmix.caching import clear, clear_damaged, total
    from sigmix.errors import ConfigError

    if damaged and kind != "all":
        raise ConfigError("--damaged looks at every kind", remedy="leave out --kind")
    wanted = _kind(kind)
    what = "what is damaged" if damaged else f"{size(total(wanted))} of {kind}"
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"this would remove {what}", remedy="say so with --yes")
        typer.confirm(f"remove {what}?", abort=True, err=True)
    if damaged:
        with working("reading the cache"):
            pairs = clear_damaged()
    else:
        pairs = [(entry, "") for entry in clear(wanted)]
    freed = sum(entry.bytes for entry, _ in pairs)
    removed = [_entry(entry) | ({"damage": why} if why else {}) for entry, why in pairs]
    text = "\n".join([f"{why}" for _, why in pairs if why] + [f"removed {len(pairs)} entries, {size(freed)}"])
    emit({"removed": removed, "bytes": freed}, as_json, text)


def _kind(kind: str) -> str | None:
    from sigmix.caching import KINDS
    from sigmix.errors import UnknownNameError

    if kind not in (*KINDS, "all"):
        raise UnknownNameError("kind of cache", kind, (*KINDS, "all"))
    return None if kind == "all" else kind


def _entry(entry: Any) -> dict[str, Any]:
    return {
        "kind": entry.kind, "name": entry.name, "path": str(entry.path), "bytes": entry.bytes,
        "last_used": _date(entry.last_used),
    }  # fmt: skip


def _date(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).isoformat(sep=" ", timespec="minutes")


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
    from sigmix.budget import Load
    from sigmix.cli import diagnose, planning
    from sigmix.errors import SigmixError
    from sigmix.fetch import DEFAULT

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
