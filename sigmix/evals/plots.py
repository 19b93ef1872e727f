"""Pictures: a matplotlib figure without its global state, and PNG files that are whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sigmix.errors import ConfigError
from sigmix.utils.io import atomic_file


def figure(width: float, height: float) -> Any:
    """An empty `matplotlib.figure.Figure`, in inches.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib", remedy='pip install "sigmix[train]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def save_png(canvas: Any, path: str | Path) -> None:
    """Write a figure, atomically.

    Raises:
        OutputError: the file cannot be written.
    """
    with atomic_file(path) as temporary:
        canvas.savefig(temporary, format="png", dpi=120)
