"""What the commands of `sigmix export` share: options read, the place held, the comparison, lines of text."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sigmix.cli.opening import open_bank, read_mix
from sigmix.cli.shared import Ticker, note, size, working


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
    from sigmix.export.lowrank import LowRank

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
    from sigmix.cli.diagnose import machine
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
    from sigmix.export.lowrank import check_choice

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
    from sigmix.files import check_writable, claimed, writing

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
