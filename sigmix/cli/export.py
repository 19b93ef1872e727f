"""`sigmix export merged | lora | gguf`."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from sigmix.cli._console import Ticker, emit, note, size, working
from sigmix.cli._loading import open_bank, read_mix
from sigmix.cli._options import BANK, BASE, JSON

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
    from sigmix.utils.io import check_new

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
    from sigmix.export.low_rank import vllm_rank
    from sigmix.export.verify import Ours, verify_lora
    from sigmix.utils.io import check_new

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
    from sigmix.export.gguf import TYPES, export_gguf
    from sigmix.export.verify import Ours, base_gguf, verify_gguf
    from sigmix.utils.io import atomic_dir, check_new

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


# --- What the commands of `sigmix export` share: options read, the place held, the comparison, lines of text.


def open_source(base: str, dtype: str | None, mix: str, bank: Path | None) -> tuple[Any, Any, Any]:
    """(source, mix, bank) as the options name them, in the dtype of the experts.

    Raises:
        ConfigError: the mix is the base. Others: see `Source`, `open_bank` and `read_mix`.
    """
    from sigmix.errors import ConfigError
    from sigmix.export.source import Source

    experts = open_bank(bank)
    parsed = read_mix(mix, experts)
    if not parsed.weights:
        raise ConfigError("the base itself needs no export", remedy="name an expert: --mix addition")
    with working(f"reading {base}"):
        source = Source(base, dtype)
    source.adopt(experts[name] for name in parsed.weights)
    if source.loads_whole and any((experts[name].meta.get("base") or {}).get("fingerprint") for name in parsed.weights):
        note(f"{base} does not store all tensors as its model has them: it is loaded whole once, to check the experts")
    return source, parsed, experts


def low_rank(source: Any, mix: Any, experts: Any) -> Any:
    """A `LowRank`, with progress on stderr."""
    from sigmix.export.low_rank import LowRank

    with ticking("checking the experts", len(source.linears)) as tick:
        return LowRank.of(source, mix, experts, tick)


def lost(figures: dict[str, Any]) -> str:
    """What a truncation costs, in a line; ``figures`` are `LowRank.describe`'s."""
    if not figures["dropped"]:
        return f"{figures['mix']}: exact, rank {figures['rank']}"
    worst, most = figures["worst"]
    return (
        f"{figures['mix']}: {figures['dropped']} of {figures['components']} components are left out at rank "
        f"{figures['rank']}: {figures['error']:.2%} of the change is lost ({figures['error_of_weights']:.2g} of the "
        f"weights), most in {worst}, {most:.2%}"
    )


def how_read(source: Any) -> list[str]:
    """A line where the base was read in another dtype than it is stored in."""
    if source.cast is None:
        return []
    return [f"the base was read in {source.dtype}, as it was when the experts were made, or as --dtype asked"]


def compare(
    figures: dict[str, Any],
    source: Any,
    run: Callable[[], dict[str, Any]],
    tool: str,
    exact: bool = True,
    wide: bool = False,
    adapter: int = 0,
) -> None:
    """Add ``verified`` to the figures, or ``not_verified``, the reason, where the memory is too small for it.

    Args:
        run: one of `sigmix.export.verify`'s. exact, wide, adapter: see `hold` and `memory_needed` there.

    Raises:
        SigmixError: see `hold`.
    """
    from sigmix.cli.doctor import machine
    from sigmix.export.verify import hold, memory_needed

    needed, free = memory_needed(source, wide, adapter), machine()["memory_available_bytes"]
    if free is not None and needed > free:
        figures["not_verified"] = f"that needs {size(needed)} of memory, and {size(free)} are available"
        return
    with working(f"comparing with {tool}"):
        figures["verified"] = run()
    hold(figures["verified"], exact)


def measured(figures: dict[str, Any]) -> list[str]:
    """The result of `compare`, or why there is none."""
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


def server_line(scales: dict[Path, float]) -> str:
    """How llama-server takes these files, each with its scale: a command that a shell takes, and JSON."""
    files = " ".join(f"--lora {shlex.quote(str(file))}" for file in scales)
    asked = json.dumps([{"id": number, "scale": scale} for number, scale in enumerate(scales.values())])
    return f'llama-server -m BASE.gguf {files} --lora-init-without-apply; in a request: "lora": {asked}'


def rank_of(text: str, error: float | None) -> int | None:
    """--rank as a number, None where it is exact; --error is checked with it.

    Raises:
        ConfigError: no such rank or error, or both.
    """
    from sigmix.errors import ConfigError
    from sigmix.export.low_rank import check_choice

    if text != "exact" and not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= 1):
        raise ConfigError(f"--rank must be exact or a number from 1, not {text!r}", remedy="for example --rank 64")
    rank = None if text == "exact" else int(text)
    check_choice(rank, error)
    return rank


def floats(mix: Any) -> dict[str, float]:
    """{expert: weight} of a mix with one weight for each.

    Raises:
        ConfigError: weights per layer or matrix.
    """
    from sigmix.errors import ConfigError

    for name, alpha in mix.weights.items():
        if not isinstance(alpha, float):
            raise ConfigError(
                f"{name} has weights per layer or matrix, and llama.cpp takes one scale for a whole adapter",
                remedy="export the mix as one file, without --each",
            )
    return dict(mix.weights)


@contextlib.contextmanager
def held(out: Path, check: Callable[[Path], None]) -> Iterator[None]:
    """Hold the place against other runs, until what was written there is verified."""
    from sigmix.utils.cache import claimed
    from sigmix.utils.io import check_writable, writing

    with claimed(out):
        with writing(out):
            check(out)
        check_writable(out)
        yield


def no_file(out: Path) -> None:
    """Raise unless ``out`` names a .gguf file that is not there yet."""
    from sigmix.errors import ConfigError, OutputError

    if out.suffix != ".gguf":
        raise ConfigError(f"--out must name a .gguf file, not {out}", remedy="or give --each, and a folder")
    if out.exists():
        raise OutputError(f"{out} exists already", remedy="give another --out, or remove it first")


def bytes_of(text: str) -> int:
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
def ticking(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Progress on stderr: what is yielded counts one."""
    with Ticker(title, total) as ticker:
        yield ticker.advance
