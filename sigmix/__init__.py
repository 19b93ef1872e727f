"""sigmix: self-adaptive language models (after Transformer², arXiv 2501.06252).

The public names are imported on first use, so that ``import sigmix`` and ``sigmix --help`` stay light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sigmix.svf.registration import register_lazily

__version__ = "0.1.0"

_HOMES = {
    "load_base": "sigmix.models.loading",
    "SVFConfig": "sigmix.svf.tuner",
    "SVFModel": "sigmix.svf.tuner",
    "Expert": "sigmix.experts.expert",
    "Bank": "sigmix.experts.bank",
    "Mix": "sigmix.experts.mix",
    "Engine": "sigmix.engine",
    "Trainer": "sigmix.train.trainer",
    "TrainConfig": "sigmix.train.config",
    "BaseCheckpoint": "sigmix.export.base",
    "LowRank": "sigmix.export.low_rank",
    "export_merged": "sigmix.export.merged",
    "export_lora": "sigmix.export.lora",
    "export_gguf": "sigmix.export.gguf",
    "SigmixError": "sigmix.errors",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:  # `as`, so that strict checkers see a public name
    from sigmix.engine import Engine
    from sigmix.errors import SigmixError
    from sigmix.experts.bank import Bank
    from sigmix.experts.expert import Expert
    from sigmix.experts.mix import Mix
    from sigmix.export import BaseCheckpoint, LowRank, export_gguf, export_lora, export_merged
    from sigmix.models.loading import load_base
    from sigmix.svf.config import SVFConfig
    from sigmix.svf.tuner import SVFModel
    from sigmix.train.config import TrainConfig
    from sigmix.train.trainer import Trainer


register_lazily()  # so that PEFT loads SVF adapters after ``import sigmix``


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'sigmix' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
