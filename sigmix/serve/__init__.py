"""An OpenAI-compatible server that adapts itself to each request; `sigmix serve` starts it.

    from sigmix.serve import Server, Service, load_settings

What it does not do: several processes. One process owns one model; run one server for each GPU.
"""

from __future__ import annotations

from sigmix.serve.app import Server, create_app
from sigmix.serve.service import Service
from sigmix.serve.settings import Settings, load_settings

__all__ = ["Server", "Service", "Settings", "create_app", "load_settings"]
