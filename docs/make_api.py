"""Writes api.md from the docstrings of the public names: `python docs/make_api.py`. A test holds the page to them."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "api.md"
INTRODUCTION = """\
# API

The public names, made from their docstrings by `python docs/make_api.py`. What is not here may change without notice.
B is a batch's rows, T its tokens, V the vocabulary, r = min(m, n) the singular values of a matrix [m, n] (out×in).
"""
NAMES = {
    "sigmix": ["load_base", "SVFConfig", "Expert", "Bank", "Mix", "Engine", "SigmixError"],
    "sigmix.engine.engine": ["Generation"],
    "sigmix.adapt": [
        "Decision", "PromptDispatch", "ClassifierDispatch", "FewShotSearch", "Example", "ProbeDispatch", "Probe",
        "TwoPass",
    ],
    "sigmix.tasks.base": ["Sample", "Score", "Task"],
    "sigmix.tasks.skills.base": ["skill", "Item"],
    "sigmix.tasks.registry": ["get_task", "register"],
    "sigmix.evals.accuracy": ["evaluate", "Result"],
    "sigmix.train.config": ["TrainConfig"],
    "sigmix.train.trainer": ["Trainer"],
    "sigmix.train.distributed": ["Processes"],
    "sigmix.integrations.trl": ["prompt_dataset", "gold_dataset", "reward_function", "KeepZ", "finish"],
    "sigmix.export.source": ["Source"],
    "sigmix.export.merged": ["export_merged"],
    "sigmix.export.lora": ["export_lora"],
    "sigmix.export.gguf": ["export_gguf"],
    "sigmix.experts.transfer": ["carry"],
    "sigmix.experts.original_basis": ["use_original_basis"],
    "sigmix.models.memory": ["model_plan", "budget", "Load", "Rates", "measure_rates"],
    "sigmix.utils.safetensors": ["Shards"],
    "sigmix.svf.checkpoint": ["Stream"],
    "sigmix.svf.decomposition": ["decompose", "cached_decompose", "Factors"],
    "sigmix.svf.functional": ["mix_z", "truncate"],
    "sigmix.svf.tuner": ["svf_layers", "coverage"],
}  # fmt: skip


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for module, names in NAMES.items():
        home = importlib.import_module(module)
        parts += [f"## `{module}`\n", *(_entry(name, getattr(home, name)) for name in names)]
    return "\n".join(parts)


def _entry(name: str, thing: Any) -> str:
    """A heading with the signature, the docstring, and a class's own public methods and properties."""
    parts = [f"### `{name}`\n", _code(name, thing)]
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            value = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
            if member.startswith("_") or not (inspect.isfunction(value) or isinstance(value, property)):
                continue
            if value.__doc__:
                parts.append(_code(f"{name}.{member}", value))
    return "\n".join(parts)


def _code(name: str, thing: Any) -> str:
    head = name
    if not isinstance(thing, property) and not (inspect.isclass(thing) and issubclass(thing, Exception)):
        head += _signature(thing)
    return f"```text\n{head}\n\n{inspect.getdoc(thing) or ''}\n```\n"


def _signature(thing: Any) -> str:
    signature = inspect.signature(thing)
    kept = [p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name not in ("self", "cls")]
    shown = str(signature.replace(parameters=kept, return_annotation=signature.empty))
    shown = re.sub(r"<function .* at 0x\w+>", "…", shown)  # an address changes from run to run
    return shown if len(shown) < 200 else "(…)"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
