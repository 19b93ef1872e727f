"""Registration of SVF with PEFT without importing PEFT, which takes seconds."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

TUNER = "sigmix.svf.tuner"


def register_lazily() -> None:
    """Register SVF at once if PEFT is imported already, else when PEFT first looks it up."""
    if "peft.mapping" in sys.modules:
        importlib.import_module(TUNER)
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Meta-path finder that replaces PEFT's mapping of configs by `_Mapping` when ``peft.mapping`` is imported."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if name != "peft.mapping":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                module.PEFT_TYPE_TO_CONFIG_MAPPING = _Mapping(module.PEFT_TYPE_TO_CONFIG_MAPPING)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class _Mapping(dict):
    """PEFT's mapping of configs, which every use of an adapter reads first; imports the tuner when it is needed."""

    def __missing__(self, key: object) -> Any:
        # not when PEFT is imported: that can happen in the middle of importing a module that the tuner imports
        if key != "SVF" or TUNER in sys.modules:
            raise KeyError(key)
        importlib.import_module(TUNER)
        return self[key]
