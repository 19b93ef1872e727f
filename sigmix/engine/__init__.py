"""Inference under mixtures of experts: generation, streaming, scoring and continuous batching."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sigmix.engine.engine import Engine
    from sigmix.engine.generation import Generation

__all__ = ["Engine", "Generation"]


def __getattr__(name: str) -> Any:  # training imports parts of this package without the engine
    if name in __all__:
        from sigmix.engine import engine

        return getattr(engine, name)
    raise AttributeError(f"module 'sigmix.engine' has no attribute {name!r}")
