"""`sigmix export merged | lora | gguf`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from sigmix.cli.shared import BANK, BASE, JSON, Ticker, emit, note, open_bank, read_mix, size, working

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

    most = _bytes(shard_size)
    with _place(out, check_new):
        source, parsed, experts = _open(base, dtype, mix, bank)
        with _ticking("merging", len(source.shards)) as tick:
            figures = export_merged(source, parsed, experts, out, most, tick)
        if verify:
            with working("comparing with transformers"):
                figures["verified"] = verify_merged(out, Ours(source, parsed, experts))
    where = f"{out}: {len(figures['files'])} file(s), {size(figures['bytes'])}, {figures['dtype']}"
    text = f"{where}; {figures['changed']} of {figures['tensors']} tensors changed"
    emit({"out": str(out), **figures}, as_json, "\n".join([text, *_read(source), *_measured(figures)]))


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
    count = _rank(rank, error)
    if vllm and count is not None:
        vllm_rank(count)
    with _place(out, check_new):
        source, parsed, experts = _open(base, dtype, mix, bank)
        low = _low(source, parsed, experts)
        low.choose(count, error, vllm)
        note(_lost(low.describe()))
        with _ticking("writing", len(low.paths)) as tick:
            figures = export_lora(low, out, precision, tick)
        if verify:
            with working("comparing with PEFT"):
                figures["verified"] = verify_lora(out, source, Ours(source, parsed, experts, wide=True))
    text = f"{out}: rank {figures['rank']}, {size(figures['bytes'])} in {precision}"
    emit({"out": str(out), **figures}, as_json, "\n".join([text, *_read(source), *_measured(figures)]))


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
    count = _rank(rank, error)
    if gguf_base is not None and not gguf_base.is_file():
        raise ConfigError(f"there is no file {gguf_base}", remedy="give the base's GGUF file with --gguf")
    with _place(out, check_new if each else _no_file):
        source, parsed, experts = _open(base, dtype, mix, bank)
        weights = _floats(parsed) if each else {}
        jobs = [(Mix.one(name), out / f"{name}.gguf", alpha) for name, alpha in weights.items()] or [(parsed, out, 1.0)]
        files, scales = [], {file: alpha for _, file, alpha in jobs}
        place: Any = atomic_dir(out, new=True) if each else contextlib.nullcontext(out.parent)
        with place as folder:
            for one, file, alpha in jobs:
                low = _low(source, one, experts)
                low.choose(count, error)
                note(_lost(low.describe()))
                with _ticking(f"writing {file.name}", len(low.paths)) as tick:
                    made = export_gguf(low, folder / file.name, number, tick)
                files.append({"file": str(file), "scale": alpha, **made})
        figures: dict[str, Any] = {"out": str(out), "mix": parsed.id, "files": files}
        if verify:
            found = base_gguf(source, gguf_base)
            if isinstance(found, Path):
                with working("comparing with llama.cpp"):
                    figures["verified"] = verify_gguf(scales, found, Ours(source, parsed, experts, wide=True))
            else:
                figures["not_verified"] = found
    lines = [f"{one['file']}: rank {one['rank']}, {size(one['bytes'])} in {number}" for one in files]
    emit(figures, as_json, "\n".join([*lines, *_read(source), *_measured(figures), _server(scales)]))


# ---------------------------------------------------------------------- what they share


def _open(base: str, dtype: str | None, mix: str, bank: Path | None) -> tuple[Any, Any, Any]:
    from sigmix.errors import ConfigError
    from sigmix.export.source import Source

    experts = open_bank(bank)
    parsed = read_mix(mix, experts)
    if not parsed.weights:
        raise ConfigError("the base itself needs no export", remedy="name an expert: --mix addition")
    with working(f"reading {base}"):
        source = Source(base, dtype)
    source.adopt(experts[name] for name in parsed.weights)
    return source, parsed, experts


def _low(source: Any, mix: Any, experts: Any) -> Any:
    from sigmix.export.lowrank import LowRank

    with _ticking("checking the experts", len(source.linears)) as tick:
        return LowRank.of(source, mix, experts, tick)


def _lost(figures: dict[str, Any]) -> str:
    if not figures["dropped"]:
        return f"{figures['mix']}: exact, rank {figures['rank']}"
    worst, most = figures["worst"]
    return (
        f"{figures['mix']}: {figures['dropped']} of {figures['components']} components are left out at rank "
        f"{figures['rank']}: {figures['error']:.2%} of the change is lost ({figures['error_of_weights']:.2g} of the "
        f"weights), most in {worst}, {most:.2%}"
    )


def _read(source: Any) -> list[str]:
    if source.cast is None:
        return []
    return [f"the base was read in {source.dtype}, as it was when the experts were made, or as --dtype asked"]


def _measured(figures: dict[str, Any]) -> list[str]:
    found = figures.get("verified")
    if found is None:
        why = figures.get("not_verified", "--no-verify")
        return [f"not verified: {why}"]
    line = (
        f"verified with {found['tool']}: logits differ by {found['max']:.2g} at most, KL {found['kl']:.2g}, same first "
        f"token at {found['same_top']:.1%} (the mix itself moves the base by KL {found['effect_kl']:.2g})"
    )
    if "base" in found:
        base = found["base"]
        line += f"; the base alone differs there by {base['max']:.2g}, KL {base['kl']:.2g}"
    return [line]


def _server(scales: dict[Path, float]) -> str:
    files = " ".join(f"--lora {file}" for file in scales)
    asked = ", ".join(f'{{"id": {number}, "scale": {scale:g}}}' for number, scale in enumerate(scales.values()))
    return f'llama-server -m BASE.gguf {files} --lora-init-without-apply; in a request: "lora": [{asked}]'


def _rank(text: str, error: float | None) -> int | None:
    from sigmix.errors import ConfigError

    if text == "exact":
        return None
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"--rank must be exact or a number from 1, not {text!r}", remedy="for example --rank 64")
    if error is not None:
        raise ConfigError("--rank and --error cannot both be given", remedy="leave one out")
    return int(text)


def _floats(mix: Any) -> dict[str, float]:
    from sigmix.errors import ConfigError

    for name, alpha in mix.weights.items():
        if not isinstance(alpha, float):
            raise ConfigError(
                f"{name} has weights per layer or matrix, and llama.cpp takes one scale for a whole adapter",
                remedy="export the mix as one file, without --each",
            )
    return dict(mix.weights)


@contextlib.contextmanager
def _place(out: Path, check: Callable[[Path], None]) -> Iterator[None]:
    """Hold the place against other runs, until what was written there is verified."""
    from sigmix.files import check_writable, claimed, writing

    with claimed(out):
        with writing(out):
            check(out)
        check_writable(out)
        yield


def _no_file(out: Path) -> None:
    from sigmix.errors import ConfigError, OutputError

    if out.suffix != ".gguf":
        raise ConfigError(f"--out must name a .gguf file, not {out}", remedy="or give --each, and a folder")
    if out.exists():
        raise OutputError(f"{out} exists already", remedy="give another --out, or remove it first")


def _bytes(text: str) -> int:
    """ "500MB" -> 500,000,000."""
    from sigmix.errors import ConfigError

    units = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    number, unit = text[:-2].strip(), text[-2:].upper()
    try:
        found = int(float(number) * units[unit])
    except (KeyError, ValueError, OverflowError):
        found = 0
    if found < 1:
        raise ConfigError(f"{text!r} is no size", remedy="for example --shard-size 5GB")
    return found


@contextlib.contextmanager
def _ticking(title: str, total: int) -> Iterator[Callable[[], None]]:
    with Ticker(title, total) as ticker:
        yield ticker.advance
