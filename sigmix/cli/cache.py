"""`sigmix cache`: list and clear cached data; `sigmix decompose`: fill it with the decompositions of a base model."""

from __future__ import annotations

import datetime
import sys
from typing import TYPE_CHECKING, Any

import typer

from sigmix.cli import app
from sigmix.cli._console import Progress, emit, table, working
from sigmix.cli._loading import read_layers, read_targets
from sigmix.cli._options import BASE, JSON, LAYERS, TARGETS
from sigmix.errors import ConfigError, UnknownNameError
from sigmix.utils.io import size

if TYPE_CHECKING:
    from sigmix.utils.cache import Entry

group = typer.Typer(
    help="List and clear the cache.", no_args_is_help=True, rich_markup_mode=None, epilog="Example: sigmix cache list"
)
app.add_typer(group, name="cache")

KIND = typer.Option(
    "all", help="models, svd (decompositions), downloads, banks (of the hub), compiled or all."
)


@group.command("list", epilog="Example: sigmix cache list --kind svd")
def list_entries(
    kind: str = KIND,
    damaged: bool = typer.Option(False, "--damaged", help="Damaged entries only, with the reason (reads every file)."),
    as_json: bool = JSON,
) -> None:
    """List cache entries with their sizes."""
    from sigmix.utils.cache import cache_dir, damage, entries

    every = entries(_kind(kind))
    with working("reading the cache"):
        reasons = {entry.path: why for entry in every if (why := damage(entry))} if damaged else {}
    shown = [entry for entry in every if not damaged or entry.path in reasons]
    total = sum(entry.bytes for entry in shown)
    rows = [_as_json(entry) | ({"damage": reasons[entry.path]} if damaged else {}) for entry in shown]
    if emit({"folder": str(cache_dir()), "bytes": total, "entries": rows}, as_json):
        return
    svd = [entry for entry in shown if entry.kind == "svd" and not damaged and kind != "svd"]  # one line for all
    lines = [
        [entry.kind, entry.name[:40], size(entry.bytes), _date(entry.last_used), reasons.get(entry.path)]
        for entry in shown
        if entry not in svd
    ]
    if svd:
        last = _date(max(entry.last_used for entry in svd))
        lines.append(["svd", f"{len(svd)} decompositions", size(sum(entry.bytes for entry in svd)), last, None])
    if not lines:
        typer.echo(f"{cache_dir()}: no {'damaged ' if damaged else ''}entries")
        return
    columns = ["kind", "name", "size", "last used", *(["damage"] if damaged else [])]
    table(f"{cache_dir()}: {size(total)}", columns, [line[: len(columns)] for line in lines])


@group.command(epilog="Example: sigmix cache clear --kind models --yes")
def clear(
    kind: str = KIND,
    damaged: bool = typer.Option(False, "--damaged", help="Damaged entries only, of every kind."),
    yes: bool = typer.Option(False, "--yes", help="Do not ask for confirmation."),
    as_json: bool = JSON,
) -> None:
    """Remove cache entries; they are downloaded or computed again when needed."""
    from sigmix.utils import cache

    if damaged and kind != "all":
        raise ConfigError("--damaged includes every kind", remedy="leave out --kind")
    selected = _kind(kind)
    what = "damaged entries" if damaged else f"{size(cache.total(selected))} of {kind}"
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"this removes {what}", remedy="confirm with --yes")
        typer.confirm(f"remove {what}?", abort=True, err=True)
    with working("clearing the cache"):
        pairs = cache.clear_damaged() if damaged else [(entry, "") for entry in cache.clear(selected)]
    freed = sum(entry.bytes for entry, _ in pairs)
    removed = [_as_json(entry) | ({"damage": why} if why else {}) for entry, why in pairs]
    text = "\n".join([*(why for _, why in pairs if why), f"removed {len(pairs)} entries, {size(freed)}"])
    emit({"removed": removed, "bytes": freed}, as_json, text)


def _kind(kind: str) -> str | None:
    from sigmix.utils.cache import KINDS

    if kind not in (*KINDS, "all"):
        raise UnknownNameError("kind of cache", kind, (*KINDS, "all"))
    return None if kind == "all" else kind


def _as_json(entry: Entry) -> dict[str, Any]:
    return {
        "kind": entry.kind, "name": entry.name, "path": str(entry.path), "bytes": entry.bytes,
        "last_used": _date(entry.last_used),
    }  # fmt: skip


def _date(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).isoformat(sep=" ", timespec="minutes")


@app.command(epilog="Example: sigmix decompose --base smollm2-135m --targets attention")
def decompose(
    base: str = BASE,
    dtype: str = typer.Option(None, help="dtype in which the base model will be loaded, such as bfloat16."),
    device: str = typer.Option(None, help="Device, such as cuda:0. Default: a GPU if there is one."),
    targets: str = TARGETS, layers: str = LAYERS, as_json: bool = JSON,
) -> None:  # fmt: skip
    """Decompose the matrices of a base model into the cache, reading one at a time; resumes after an interruption."""
    target_modules: Any = read_targets(targets)
    layers_to_transform: Any = read_layers(layers)
    with working(f"reading the config of {base}"):
        from sigmix.svf.checkpoint import Checkpoint, decompose_checkpoint
        from sigmix.svf.config import SVFConfig
        from sigmix.utils.cache import cache_dir

        where = _device(device)
        checkpoint = Checkpoint(base, dtype or "auto")
        config = SVFConfig(target_modules=target_modules, layers_to_transform=layers_to_transform)
        matrices = checkpoint.matrices(config)
    with Progress(f"decomposing {base}", len(matrices)) as progress:
        done = decompose_checkpoint(checkpoint, matrices, where, progress=lambda *_: progress.advance())
    figures = {
        "base": checkpoint.name, "dtype": str(checkpoint.dtype).removeprefix("torch."), "matrices": len(matrices),
        "computed": done.computed, "cached": done.cached, "bytes_written": done.bytes,
        "seconds": round(done.seconds, 2), "checkpoint_bytes": checkpoint.shards.bytes,
        "cache": str(cache_dir() / "svd"),
    }  # fmt: skip
    text = (
        f"{checkpoint.name} in {figures['dtype']}: {done.computed} of {len(matrices)} matrices decomposed, "
        f"{done.cached} were cached; {size(done.bytes)} written in {done.seconds:.1f} s"
    )
    emit(figures, as_json, text)


def _device(name: str | None) -> Any:
    """Return a device that computes in float64, as decompositions are.

    Raises:
        ConfigError: unknown or unusable device.
    """
    import torch

    if name is None:
        return None
    try:
        device = torch.device(name)
        usable = torch.ones(2, dtype=torch.float64, device=device).sum().item() == 2
    except Exception:  # the class depends on the device
        usable = False
    if not usable:
        raise ConfigError(f"--device {name} cannot be used on this machine", remedy="give cpu, or a GPU such as cuda:0")
    return device
