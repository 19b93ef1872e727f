"""OpenAI-compatible server that chooses a mixture of experts for each request; started by `sigmix serve`.

One process serves one model; run one server per GPU. Names are imported on first use: `sigmix serve --help` reads the
settings without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sigmix.serve.app import Server as Server
    from sigmix.serve.app import create_app as create_app
    from sigmix.serve.service import Service as Service
    from sigmix.serve.settings import Settings as Settings
    from sigmix.serve.settings import load_settings as load_settings

_MODULES = {
    "Server": "app", "create_app": "app", "Service": "service", "Settings": "settings", "load_settings": "settings",
}  # fmt: skip

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
