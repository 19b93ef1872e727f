"""``python -m reproduction --scale smoke|laptop|gpu``: the paper's tables and our experiments."""

from __future__ import annotations

from pathlib import Path

import typer

from sigmix.cli.app import run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
ONLY = typer.Option([], help="A stage; may be repeated. Default: all.")


@app.command(epilog="Example: python -m reproduction --scale laptop --only table1")
def reproduce(
    scale: str = typer.Option("laptop", help="laptop (two cores, embedded model), gpu (the paper's tasks) or smoke."),
    only: list[str] = ONLY,
    out: Path = typer.Option(None, help="Folder for items and tables. Default: results/SCALE."),
    work: Path = typer.Option(None, help="Folder for checkpoints and adapters. Default: in the user's cache."),
    data_dir: Path = typer.Option(None, help="Local JSONL data instead of the hub."),
    allow_code: bool = typer.Option(False, "--allow-code", help="Let code tasks run the model's programs."),
    base: str = typer.Option(None, help="Another base than the scale's."),
    larger: str = typer.Option(None, help="Base of the stage larger: a hub name, a folder or a .gguf file."),
    jobs: int = typer.Option(1, min=1, help="Stages at once, each with its share of the cores."),
    tables: bool = typer.Option(True, help="Write the tables at the end."),
    report_only: bool = typer.Option(False, "--report", help="Only write the tables again, from what is stored."),
) -> None:
    """The paper's tables and our own experiments on a real model, resumable; what is stored is not measured again."""
    from dataclasses import replace

    from reproduction.jobs import run_jobs, stage_command
    from reproduction.lab import Lab
    from reproduction.page import write_page
    from reproduction.scale import get_scale
    from reproduction.stages import chosen
    from reproduction.store import Store
    from sigmix.utils.cache import cache_dir
    from sigmix.utils.io import check_writable

    wanted = get_scale(scale)
    todo = chosen(only)
    wanted = replace(wanted, base=wanted.base if base is None else base)
    wanted = replace(wanted, larger=wanted.larger if larger is None else larger)
    store = Store(out or Path("results") / scale)
    check_writable(store.folder / "README.md")
    work = work or cache_dir() / "reproduce" / scale
    if not report_only:
        lab = Lab(wanted, store, work, data_dir, allow_code, typer.echo)
        lab.begin()
        if jobs > 1:
            given = {"--scale": scale, "--out": store.folder, "--work": work, "--data-dir": data_dir, "--base": base,
                     "--larger": larger}  # fmt: skip
            flags = [str(part) for pair in given.items() if pair[1] is not None for part in pair]
            command = stage_command([*flags, *(["--allow-code"] if allow_code else [])])
            run_jobs([(stage.name, stage.needs) for stage in todo], command, jobs)
        else:
            for stage in todo:
                typer.echo(f"{stage.name}: {stage.title}")
                with lab.held(f"stage-{stage.name}"):
                    stage.run(lab)
    if tables:
        typer.echo(f"tables: {write_page(Store(store.folder), wanted)}")


if __name__ == "__main__":
    run(app, "reproduction")
