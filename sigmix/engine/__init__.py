"""Generation and log-probabilities under experts: rows of (token ids, mix) -> tokens, log-probs, stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sigmix.engine.engine import Engine
    from sigmix.engine.generation import Generation

__all__ = ["Engine", "Generation"]


def __getattr__(name: str) -> Any:  # training uses the parts below without the experts that Engine needs
    if name in __all__:
        from sigmix.engine import engine

        return getattr(engine, name)
    raise AttributeError(f"module 'sigmix.engine' has no attribute {name!r}")
