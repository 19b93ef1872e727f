"""OpenAI-compatible server that chooses a mixture of experts for each request; started by `sigmix serve`.

One process serves one model; run one server per GPU.
"""

from __future__ import annotations

from sigmix.serve.app import Server, create_app
from sigmix.serve.service import Service
from sigmix.serve.settings import Settings, load_settings

__all__ = ["Server", "Service", "Settings", "create_app", "load_settings"]
