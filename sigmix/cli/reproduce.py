"""`sigmix reproduce`."""

from __future__ import annotations

from pathlib import Path

import typer


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: sigmix reproduce --scale laptop --only table1")(reproduce)


ONLY = typer.Option([], help="A stage; may be repeated. Default: all.")


def reproduce(
    scale: str = typer.Option("laptop", help="laptop (two cores, embedded model), gpu (the paper's tasks) or smoke."),
    only: list[str] = ONLY,
    out: Path = typer.Option(None, help="Folder for items and tables. Default: results/SCALE."),
    work: Path = typer.Option(None, help="Folder for checkpoints and adapters. Default: in the user's cache."),
    data_dir: Path = typer.Option(None, help="Local JSONL data instead of the hub."),
    allow_code: bool = typer.Option(False, "--allow-code", help="Let code tasks run the model's programs."),
) -> None:
    """The paper's tables and our own experiments on a real model, resumable; what is stored is not measured again."""
    from sigmix.files import cache_dir
    from sigmix.reproduce.lab import Lab
    from sigmix.reproduce.scale import get_scale
    from sigmix.reproduce.stages.sweep import Sweep
    from sigmix.reproduce.store import Store

    chosen = get_scale(scale)
    work = work or cache_dir() / "reproduce" / scale
    lab = Lab(chosen, Store(out or Path("results") / scale), work, data_dir, allow_code, typer.echo)
    for stage in (Sweep(),):
        if not only or stage.name in only:
            stage.run(lab)
