"""Matplotlib figures without global state, and atomic PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sigmix.errors import ConfigError
from sigmix.utils.io import atomic_file


def figure(width: float, height: float) -> Any:
    """Return an empty `matplotlib.figure.Figure` of a size in inches.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib", remedy='pip install "sigmix[train]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def save_png(canvas: Any, path: str | Path) -> None:
    """Write a figure as PNG, atomically.

    Raises:
        OutputError: the file cannot be written.
    """
    with atomic_file(path) as temporary:
        canvas.savefig(temporary, format="png", dpi=120)
