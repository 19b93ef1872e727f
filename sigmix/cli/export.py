"""`sigmix export merged | lora | gguf`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import typer

from sigmix.cli.exporting import (
    bytes_of,
    compare,
    floats,
    held,
    how_read,
    lost,
    low_rank,
    measured,
    no_file,
    open_source,
    rank_of,
    server_line,
    ticking,
)  # fmt: skip
from sigmix.cli.shared import BANK, BASE, JSON, emit, note, size

MIX = typer.Option(..., help="What to export: a name, a:0.7+b:0.3, or a .json file.")
FOLDER = typer.Option(..., help="Folder to write; it must not exist yet.")
DTYPE = typer.Option(
    None, help="Read the base in this dtype, such as bfloat16. Default: as stored, or as it was for the experts."
)
VERIFY = typer.Option(True, "--verify/--no-verify", help="Load the export in the other program and compare logits.")
RANK = typer.Option("exact", help="Most components of a matrix that are kept, or exact: all that the mix moves.")
ERROR = typer.Option(None, help="Keep as few components as lose at most this share of the change, such as 0.05.")


def add(app: typer.Typer) -> None:
    """Register the commands."""
    group = typer.Typer(
        help="Write a mix for other programs: a checkpoint, a PEFT LoRA, a GGUF adapter.", no_args_is_help=True,
        rich_markup_mode=None, epilog="Example: sigmix export merged --mix addition --out merged-addition",
    )  # fmt: skip
    group.command(epilog="Example: sigmix export merged --mix addition:0.7+larger:0.3 --out merged")(merged)
    group.command(epilog="Example: sigmix export lora --mix addition --rank 64 --out addition-lora")(lora)
    group.command(epilog="Example: sigmix export gguf --mix addition --out addition.gguf --gguf base.gguf")(gguf)
    app.add_typer(group, name="export")


def merged(
    mix: str = MIX,
    out: Path = FOLDER,
    shard_size: str = typer.Option("5GB", help="Largest file, such as 500MB or 5GB."),
    dtype: str = DTYPE,
    verify: bool = VERIFY,
    base: str = BASE,
    bank: Path = BANK,
    as_json: bool = JSON,
) -> None:
    """A checkpoint with the mix merged into its weights, in the base's dtype, which plain transformers loads."""
    from sigmix.export.merged import export_merged
    from sigmix.export.verify import Ours, verify_merged
    from sigmix.files import check_new

    most = bytes_of(shard_size)
    with held(out, check_new):
        source, parsed, experts = open_source(base, dtype, mix, bank)
        with ticking("merging", len(source.shards)) as tick:
            figures = export_merged(source, parsed, experts, out, most, tick)
        if verify:
            compare(figures, source, lambda: verify_merged(out, Ours(source, parsed, experts)), "transformers")
    where = f"{out}: {len(figures['files'])} file(s), {size(figures['bytes'])}, {figures['dtype']}"
    text = f"{where}; {figures['changed']} of {figures['tensors']} tensors changed"
    emit({"out": str(out), **figures}, as_json, "\n".join([text, *how_read(source), *measured(figures)]))


def lora(
    mix: str = MIX,
    out: Path = FOLDER,
    rank: str = RANK,
    error: float = ERROR,
    vllm: bool = typer.Option(False, "--vllm", help="One rank for all matrices, of those that vLLM takes."),
    precision: str = typer.Option("float32", help="Of the numbers in the file: float32, bfloat16 or float16."),
    dtype: str = DTYPE,
    verify: bool = VERIFY,
    base: str = BASE,
    bank: Path = BANK,
    as_json: bool = JSON,
) -> None:
    """A PEFT LoRA of the mix: exact where the rank fits, else truncated under an error that is told beforehand."""
    from sigmix.errors import UnknownNameError
    from sigmix.export.lora import export_lora
    from sigmix.export.lowrank import vllm_rank
    from sigmix.export.verify import Ours, verify_lora
    from sigmix.files import check_new

    if precision not in (known := ("float32", "bfloat16", "float16")):
        raise UnknownNameError("precision", precision, known)
    count = rank_of(rank, error)
    if vllm and count is not None:
        vllm_rank(count)
    with held(out, check_new):
        source, parsed, experts = open_source(base, dtype, mix, bank)
        low = low_rank(source, parsed, experts)
        low.choose(count, error, vllm)
        note(lost(low.describe()))
        with ticking("writing", len(low.paths)) as tick:
            figures = export_lora(low, out, precision, tick)
        if verify:
            compare(
                figures, source, lambda: verify_lora(out, source, Ours(source, parsed, experts, wide=True)), "PEFT",
                exact=not figures["dropped"], wide=True, adapter=figures["bytes"],
            )  # fmt: skip
    text = f"{out}: rank {figures['rank']}, {size(figures['bytes'])} in {precision}"
    emit({"out": str(out), **figures}, as_json, "\n".join([text, *how_read(source), *measured(figures)]))


def gguf(
    mix: str = MIX,
    out: Path = typer.Option(..., help="The .gguf file to write; with --each the folder for one file of each expert."),
    each: bool = typer.Option(False, "--each", help="One file of each expert, for llama.cpp to mix per request."),
    rank: str = RANK,
    error: float = ERROR,
    number: str = typer.Option("f32", "--type", help="Of the numbers in the file: f32 or f16."),
    gguf_base: Path = typer.Option(None, "--gguf", help="The base's GGUF file, to verify with. Default: see below."),
    dtype: str = DTYPE,
    verify: bool = VERIFY,
    base: str = BASE,
    bank: Path = BANK,
    as_json: bool = JSON,
) -> None:
    """A LoRA adapter for llama.cpp: of the mix, or with --each of every expert in it, to be mixed per request.

    Verifying takes llama-cpp-python and the base as a GGUF file: --gguf, else --base if it is one; that of the default
    base is fetched (93 MB, kept in the cache).
    """
    from sigmix.errors import ConfigError, UnknownNameError
    from sigmix.experts.mix import Mix
    from sigmix.export.gguf_lora import TYPES, export_gguf
    from sigmix.export.llamacpp import base_gguf
    from sigmix.export.verify import Ours, verify_gguf
    from sigmix.files import atomic_dir, check_new

    if number not in TYPES:
        raise UnknownNameError("number type", number, TYPES)
    count = rank_of(rank, error)
    if gguf_base is not None and not gguf_base.is_file():
        raise ConfigError(f"there is no file {gguf_base}", remedy="give the base's GGUF file with --gguf")
    with held(out, check_new if each else no_file):
        source, parsed, experts = open_source(base, dtype, mix, bank)
        weights = floats(parsed) if each else {}
        jobs = [(Mix.one(name), out / f"{name}.gguf", alpha) for name, alpha in weights.items()] or [(parsed, out, 1.0)]
        files, scales = [], {file: alpha for _, file, alpha in jobs}
        place: Any = atomic_dir(out, new=True) if each else contextlib.nullcontext(out.parent)
        with place as folder:
            for one, file, alpha in jobs:
                low = low_rank(source, one, experts)
                low.choose(count, error)
                note(lost(low.describe()))
                with ticking(f"writing {file.name}", len(low.paths)) as tick:
                    made = export_gguf(low, folder / file.name, number, tick)
                files.append({"file": str(file), "scale": alpha, **made})
        figures: dict[str, Any] = {"out": str(out), "mix": parsed.id, "files": files}
        if verify:
            found = base_gguf(source, gguf_base)
            if isinstance(found, Path):
                compare(
                    figures, source, lambda: verify_gguf(scales, found, Ours(source, parsed, experts, wide=True)),
                    "llama.cpp", exact=not any(one["dropped"] for one in files), wide=True,
                    adapter=sum(one["bytes"] for one in files),
                )  # fmt: skip
            else:
                figures["not_verified"] = found
    lines = [f"{one['file']}: rank {one['rank']}, {size(one['bytes'])} in {number}" for one in files]
    emit(figures, as_json, "\n".join([*lines, *how_read(source), *measured(figures), server_line(scales)]))
