"""sigmix: self-adaptive language models (after Transformer², arXiv 2501.06252).

The public names are imported on first use, so that ``import sigmix`` and ``sigmix --help`` stay light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sigmix.svf.registration import register_lazily

__version__ = "0.1.0"

_MODULES = {
    "Bank": "sigmix.experts.bank",
    "BaseCheckpoint": "sigmix.export.base",
    "ClassifierDispatch": "sigmix.adapt.classifier",
    "Decision": "sigmix.adapt.base",
    "Engine": "sigmix.engine.engine",
    "Example": "sigmix.adapt.few_shot",
    "Expert": "sigmix.experts.expert",
    "FewShotSearch": "sigmix.adapt.few_shot",
    "Generation": "sigmix.engine.generation",
    "LowRank": "sigmix.export.low_rank",
    "Mix": "sigmix.experts.mix",
    "PromptDispatch": "sigmix.adapt.prompt",
    "RouterDispatch": "sigmix.adapt.router",
    "SamplingParams": "sigmix.engine.generation",
    "SVFConfig": "sigmix.svf.tuner",  # imports the tuner, which registers SVF
    "SVFModel": "sigmix.svf.tuner",
    "SigmixError": "sigmix.errors",
    "StructuredOutput": "sigmix.engine.structured_output",
    "TrainConfig": "sigmix.train.config",
    "Trainer": "sigmix.train.trainer",
    "TwoPass": "sigmix.adapt.two_pass",
    "export_gguf": "sigmix.export.gguf",
    "export_lora": "sigmix.export.lora",
    "export_merged": "sigmix.export.merged",
    "load_base": "sigmix.models.loading",
}

__all__ = ["__version__", *_MODULES]

if TYPE_CHECKING:  # `as` marks a re-export for type checkers
    from sigmix.adapt.base import Decision as Decision
    from sigmix.adapt.classifier import ClassifierDispatch as ClassifierDispatch
    from sigmix.adapt.few_shot import Example as Example
    from sigmix.adapt.few_shot import FewShotSearch as FewShotSearch
    from sigmix.adapt.prompt import PromptDispatch as PromptDispatch
    from sigmix.adapt.router import RouterDispatch as RouterDispatch
    from sigmix.adapt.two_pass import TwoPass as TwoPass
    from sigmix.engine.engine import Engine as Engine
    from sigmix.engine.generation import Generation as Generation
    from sigmix.engine.generation import SamplingParams as SamplingParams
    from sigmix.engine.structured_output import StructuredOutput as StructuredOutput
    from sigmix.errors import SigmixError as SigmixError
    from sigmix.experts.bank import Bank as Bank
    from sigmix.experts.expert import Expert as Expert
    from sigmix.experts.mix import Mix as Mix
    from sigmix.export.base import BaseCheckpoint as BaseCheckpoint
    from sigmix.export.gguf import export_gguf as export_gguf
    from sigmix.export.lora import export_lora as export_lora
    from sigmix.export.low_rank import LowRank as LowRank
    from sigmix.export.merged import export_merged as export_merged
    from sigmix.models.loading import load_base as load_base
    from sigmix.svf.config import SVFConfig as SVFConfig
    from sigmix.svf.tuner import SVFModel as SVFModel
    from sigmix.train.config import TrainConfig as TrainConfig
    from sigmix.train.trainer import Trainer as Trainer


register_lazily()  # so that PEFT loads SVF adapters after ``import sigmix``


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'sigmix' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
