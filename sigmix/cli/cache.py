"""`sigmix cache`: list and clear cached models, decompositions, downloads and banks."""

from __future__ import annotations

import datetime
import sys
from typing import TYPE_CHECKING, Any

import typer

from sigmix.cli import app
from sigmix.cli._console import emit, size, table, working
from sigmix.cli._options import JSON
from sigmix.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from sigmix.utils.cache import Entry

group = typer.Typer(
    help="List and clear the cache.", no_args_is_help=True, rich_markup_mode=None, epilog="Example: sigmix cache list"
)
app.add_typer(group, name="cache")

KIND = typer.Option(
    "all", help="models, svd (decompositions), downloads, banks (of the hub), vllm (adapters), compiled or all."
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
