"""`sigmix decompose`: decompositions of a base model, computed one matrix at a time."""

from __future__ import annotations

from typing import Any

import typer

from sigmix.cli import app
from sigmix.cli._console import Progress, emit, size, working
from sigmix.cli._loading import read_layers, read_targets
from sigmix.cli._options import BASE, JSON, LAYERS, TARGETS
from sigmix.errors import ConfigError


@app.command(epilog="Example: sigmix decompose --base smollm2-135m --targets attention")
def decompose(
    base: str = BASE,
    dtype: str = typer.Option(None, help="dtype in which the base model will be loaded, such as bfloat16."),
    device: str = typer.Option(None, help="Device, such as cuda:0. Default: a GPU if there is one."),
    targets: str = TARGETS, layers: str = LAYERS, as_json: bool = JSON,
) -> None:  # fmt: skip
    """Decompose the matrices of a base model into the cache, reading one at a time; resumes after an interruption."""
    target_modules: Any = read_targets(targets)
    layers_to_transform: Any = read_layers(layers)
    with working(f"reading the config of {base}"):
        from sigmix.svf.checkpoint import Checkpoint, decompose_checkpoint
        from sigmix.svf.config import SVFConfig
        from sigmix.utils.cache import cache_dir

        where = _device(device)
        checkpoint = Checkpoint(base, dtype or "auto")
        config = SVFConfig(target_modules=target_modules, layers_to_transform=layers_to_transform)
        matrices = checkpoint.matrices(config)
    with Progress(f"decomposing {base}", len(matrices)) as progress:
        done = decompose_checkpoint(checkpoint, matrices, where, progress=lambda *_: progress.advance())
    figures = {
        "base": checkpoint.name, "dtype": str(checkpoint.dtype).removeprefix("torch."), "matrices": len(matrices),
        "computed": done.computed, "cached": done.cached, "bytes_written": done.bytes,
        "seconds": round(done.seconds, 2), "checkpoint_bytes": checkpoint.shards.bytes,
        "cache": str(cache_dir() / "svd"),
    }  # fmt: skip
    text = (
        f"{checkpoint.name} in {figures['dtype']}: {done.computed} of {len(matrices)} matrices decomposed, "
        f"{done.cached} were cached; {size(done.bytes)} written in {done.seconds:.1f} s"
    )
    emit(figures, as_json, text)


def _device(name: str | None) -> Any:
    """Return a device that computes in float64, as decompositions are.

    Raises:
        ConfigError: unknown or unusable device.
    """
    import torch

    if name is None:
        return None
    try:
        device = torch.device(name)
        usable = torch.ones(2, dtype=torch.float64, device=device).sum().item() == 2
    except Exception:  # the class depends on the device
        usable = False
    if not usable:
        raise ConfigError(f"--device {name} cannot be used on this machine", remedy="give cpu, or a GPU such as cuda:0")
    return device
