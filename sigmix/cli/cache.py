"""`sigmix cache`."""

from __future__ import annotations

import datetime
import sys
from typing import Any

import typer

from sigmix.cli._console import emit, size, table, working
from sigmix.cli._options import JSON


def add(app: typer.Typer) -> None:
    """Register the command group."""
    group = typer.Typer(
        help="What lies in the cache, and clearing it.", no_args_is_help=True, rich_markup_mode=None,
        epilog="Example: sigmix cache list",
    )  # fmt: skip
    group.command("list", epilog="Example: sigmix cache list --kind svd")(listed)
    group.command("clear", epilog="Example: sigmix cache clear --kind models --yes")(cleared)
    app.add_typer(group, name="cache")


KIND = typer.Option(
    "all", help="models, svd (decompositions), downloads, banks (from the hub), vllm (its adapters), or all."
)


def listed(
    kind: str = KIND,
    damaged: bool = typer.Option(False, "--damaged", help="Only what is damaged, with the reason (reads everything)."),
    as_json: bool = JSON,
) -> None:
    """Converted models, decompositions, unfinished downloads and banks from the hub with their sizes."""
    from sigmix.utils.cache import cache_dir, damage, entries

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
    from sigmix.errors import ConfigError
    from sigmix.utils.cache import clear, clear_damaged, total

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
    from sigmix.errors import UnknownNameError
    from sigmix.utils.cache import KINDS

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
