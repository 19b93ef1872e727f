"""`sigmix decompose`."""

from __future__ import annotations

from typing import Any

import typer

from sigmix.cli._console import Ticker, emit, size, working
from sigmix.cli._loading import read_layers, read_targets
from sigmix.cli._options import BASE, JSON


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: sigmix decompose --base smollm2-135m --targets attention")(decompose)


def decompose(
    base: str = BASE,
    dtype: str = typer.Option(None, help="That the base will be loaded in, such as bfloat16."),
    device: str = typer.Option(None, help="Where it is done, such as cuda:0. Default: a GPU if there is one."),
    targets: str = typer.Option("all-linear", help="all-linear, attention, mlp, or comma-separated module names."),
    layers: str = typer.Option(None, help="half, or comma-separated layer numbers. Default: all."),
    as_json: bool = JSON,
) -> None:
    """Decompose a base's matrices into the cache, one after the other: memory for a few of them, whatever the model.

    Loading the base later finds them there. Stopped in the middle, it goes on from where it was.
    """
    from sigmix.errors import ConfigError

    modules: Any = read_targets(targets)
    chosen: Any = read_layers(layers)
    with working(f"reading {base}'s config and headers"):
        import torch

        from sigmix.svf.checkpoint import Stream
        from sigmix.utils.cache import cache_dir

        try:
            where = torch.device(device) if device else None
        except RuntimeError as error:
            raise ConfigError(f"there is no device {device!r}", remedy="cpu, cuda or cuda:1, say") from error
        if where is not None and where.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"no GPU for --device {device} here", remedy="leave --device out")
        if where is not None and not _computes(where):
            remedy = "cpu, or a GPU that is here, such as cuda:0"
            raise ConfigError(f"nothing can be decomposed on --device {device} here", remedy=remedy)
        stream = Stream.open(base, dtype, modules, chosen)
    with Ticker(f"decomposing {base}", len(stream.matrices)) as ticker:
        done = stream.decompose(where, lambda matrix, _: ticker.advance())
    figures = {
        "base": stream.label,
        "dtype": str(stream.dtype).removeprefix("torch."),
        "matrices": len(stream.matrices),
        "computed": done.computed,
        "cached": done.cached,
        "bytes_written": done.bytes,
        "seconds": round(done.seconds, 2),
        "checkpoint_bytes": stream.shards.bytes,
        "cache": str(cache_dir() / "svd"),
    }
    text = (
        f"{stream.label} in {figures['dtype']}: {done.computed} of {len(stream.matrices)} matrices decomposed, "
        f"{done.cached} were there; {size(done.bytes)} written in {done.seconds:.1f} s"
    )
    emit(figures, as_json, text)


def _computes(device: Any) -> bool:
    """Whether a device is here and computes in float64, as decomposing does."""
    import torch

    try:
        return bool(torch.ones(2, dtype=torch.float64, device=device).sum().item() == 2)
    except Exception:  # each kind of device has its own
        return False
