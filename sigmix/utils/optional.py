"""Import of optional dependencies."""

from __future__ import annotations

import importlib
from typing import Any

from sigmix.errors import ConfigError, SigmixError


def optional(module: str, install: str, purpose: str, error: type[SigmixError] = ConfigError) -> Any:
    """Import a module for a purpose; if it is missing, raise ``error`` with ``pip install`` and ``install``."""
    try:
        return importlib.import_module(module)
    except ImportError as failure:
        name = module.partition(".")[0].replace("_", "-").replace("PIL", "pillow")
        message = f"{purpose} needs {name}, which is not installed: {failure}"
        raise error(message, remedy=f"pip install {install}") from failure
