"""Matplotlib figures without global state, and atomic PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sigmix.utils.io import atomic_file
from sigmix.utils.optional import optional


def figure(width: float, height: float) -> Any:
    """Return an empty `matplotlib.figure.Figure` of a size in inches.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure_class = optional("matplotlib.figure", "'sigmix[train]'", "plotting").Figure
    return figure_class(figsize=(width, height), layout="constrained")


def save_png(canvas: Any, path: str | Path) -> None:
    """Write a figure as PNG, atomically.

    Raises:
        OutputError: the file cannot be written.
    """
    with atomic_file(path) as temporary:
        canvas.savefig(temporary, format="png", dpi=120)
