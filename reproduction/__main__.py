"""``python -m reproduction --scale smoke|laptop|half-billion|gpu|…``: the paper's tables and further experiments."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import typer

from sigmix.cli import run

HERE = Path(__file__).parent
ONLY = typer.Option([], help="A stage; may be repeated. Default: all.")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(epilog="Example: python -m reproduction --scale laptop --only table1")
def reproduce(
    scale: str = typer.Option(
        "laptop",
        help="laptop (two cores, default model), positions, positions-float32, positions-mixtures, half-billion (the "
        "paper's tasks on two cores), gpu (those on a GPU) or smoke.",
    ),
    only: list[str] = ONLY,
    out: Path = typer.Option(None, help="Folder for items (OUT/SCALE) and tables. Default: reproduction."),
    work: Path = typer.Option(None, help="Folder for checkpoints and adapters. Default: in the user's cache."),
    data_dir: Path = typer.Option(None, help="Local JSONL data instead of the hub."),
    allow_code: bool = typer.Option(False, "--allow-code", help="Let code tasks run the model's programs."),
    base: str = typer.Option(None, help="Another base model than the scale's."),
    larger: str = typer.Option(None, help="Base model of larger and gsm8k: a hub name, a folder or a .gguf file."),
    seeds: int = typer.Option(None, min=1, help="Only the first training seeds."),
    jobs: int = typer.Option(1, min=1, help="Stages in parallel, each with its share of the cores."),
    tables: bool = typer.Option(True, help="Write the tables at the end."),
    plan: bool = typer.Option(False, "--plan", help="Rehearse the stages on a tiny model; write SCALE-plan.md."),
    tflops: float = typer.Option(0.2, min=0, help="Effective rate of --plan, in 10^12 FLOPs a second."),
    report_only: bool = typer.Option(False, "--report", help="Write the tables from stored results, and run nothing."),
    pack: bool = typer.Option(False, "--pack", help="Pack the items into SCALE.tar.xz with an entry in manifest.json."),
) -> None:
    """The paper's tables and further experiments on a real model, resumable; stored results are not measured again."""
    from reproduction.archive import pack as pack_archive
    from reproduction.jobs import run_jobs, stage_command
    from reproduction.lab import Lab
    from reproduction.page import write_page
    from reproduction.plan import plan_page, rehearse
    from reproduction.scale import get_scale
    from reproduction.stages import chosen
    from reproduction.store import Store
    from reproduction.studies import write_studies
    from sigmix.utils.cache import cache_dir
    from sigmix.utils.io import check_writable, write_text

    settings = get_scale(scale)
    todo = chosen(settings, only)
    settings = replace(settings, base=settings.base if base is None else base)
    settings = replace(settings, larger=settings.larger if larger is None else larger, seeds=settings.seeds[:seeds])
    pages = out or HERE / "tables"
    if plan:
        with tempfile.TemporaryDirectory() as folder:
            works = rehearse(settings, Path(folder), data_dir, allow_code)
            lab = Lab(settings, Store(Path(folder) / "none"), Path(folder), data_dir, allow_code)
            write_text(pages / f"{scale}-plan.md", plan_page(settings, works, lab, tflops))
        typer.echo(f"plan: {pages / f'{scale}-plan.md'}")
        return
    store = Store((out or HERE / "results") / scale)
    check_writable(pages / f"{scale}.md")
    work = work or cache_dir() / "reproduce" / scale
    if not report_only:
        lab = Lab(settings, store, work, data_dir, allow_code, typer.echo)
        lab.begin()
        if jobs > 1:
            given = {"--scale": scale, "--out": out, "--work": work, "--data-dir": data_dir, "--base": base,
                     "--larger": larger, "--seeds": seeds}  # fmt: skip
            flags = [str(part) for pair in given.items() if pair[1] is not None for part in pair]
            command = stage_command([*flags, *(["--allow-code"] if allow_code else [])])
            run_jobs([(stage.name, stage.needs) for stage in todo], command, jobs)
        else:
            for stage in todo:
                typer.echo(f"{stage.name}: {stage.title}")
                with lab.held(f"stage-{stage.name}"):
                    stage.run(lab)
    store = Store(store.folder)  # other processes may have written
    if tables:
        paths = [write_page(store, settings, pages), *(write_studies(pages) if out is None else [])]
        typer.echo("\n".join(f"tables: {path}" for path in paths))
    if pack:
        store.unpack()
        command = f"python -m reproduction --scale {scale}"
        facts = {"command": command, "seed": settings.seeds[0], "commit": store.commits()}
        typer.echo(f"archive: {pack_archive(store.folder, store.archive, facts)['archive']}")


if __name__ == "__main__":
    run(app, "reproduction")
