"""GGUF files as bases: dequantised once into a cached folder of plain safetensors, always loaded from there.

The folder is ``cache_dir()/models/<sha256 of the .gguf>/``: config, generation config, tokenizer, bfloat16 weights and
a manifest with the SHA-256 of every file. So the weights are plain ``nn.Linear``, ``save_pretrained`` works, loading is
as fast as from any checkpoint, and the .gguf itself is not needed again. The base *is* these bfloat16 weights: rounding
the dequantised values to bfloat16 happens here, once, and is part of the base's fingerprint.

Not done: keeping the weights quantised in memory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from sigmix.errors import BaseModelError, UnknownNameError
from sigmix.utils.cache import cache_dir, write_manifest
from sigmix.utils.io import atomic_dir


def models_dir() -> Path:
    """Where the dequantised bases lie."""
    return cache_dir() / "models"


def dequantised(path: Path, digest: str) -> Path:
    """The folder with the weights of the GGUF file ``path`` (SHA-256 ``digest``), made on first use.

    Several processes may ask at once: one makes it, the others wait for it.

    Raises:
        BaseModelError: not a GGUF file, truncated, or of an architecture that cannot be converted.
        CacheError: the cached folder is damaged.
        OutputError: the cache cannot be written or the disk is full.
    """
    folder = models_dir() / digest
    with lock(digest):
        if not folder.is_dir():
            _convert(path, folder, digest)
    return folder


@contextlib.contextmanager
def lock(digest: str) -> Any:
    """Hold the lock of one cached model across processes."""
    from filelock import FileLock

    from sigmix.utils.io import writing

    file = models_dir() / f".{digest}.lock"
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(file)
        held.acquire()
    try:
        yield
    finally:
        held.release()


def inspect(path: Path) -> str:
    """The architecture name in the header of a GGUF file, after checking that every tensor's bytes are there.

    Raises:
        BaseModelError: not a GGUF file, truncated, or an architecture that cannot be converted.
    """
    from gguf import GGUFReader

    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise BaseModelError(
            f"{path} is not a GGUF file: it begins with {magic!r}, expected b'GGUF'",
            remedy="download it again, or give a model folder or hub name",
        )
    try:
        reader = GGUFReader(path)
        architecture = str(reader.fields["general.architecture"].contents())
    except KeyError as error:
        raise BaseModelError(
            f"{path} has no 'general.architecture', so it holds no whole model", remedy="choose the model's own file"
        ) from error
    except Exception as error:  # the reader has no error of its own: numpy's and struct's come through
        raise BaseModelError(
            f"{path} is truncated or damaged ({path.stat().st_size} bytes): {error}", remedy="download it again"
        ) from error
    if not reader.tensors:
        raise BaseModelError(f"{path} holds no weights (a vocabulary only?)", remedy="choose the model's own file")
    check_architecture(architecture, path)
    return architecture


def check_architecture(architecture: str, path: Path) -> None:
    """Raise BaseModelError unless transformers converts this GGUF architecture."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    # transformers spells some of the file's names with an underscore
    known = {name for name in GGUF_SUPPORTED_ARCHITECTURES if name not in {"general", "tokenizer", "t5", "umt5"}}
    if architecture.replace("-", "_") in known or architecture in {name.replace("_", "") for name in known}:
        return
    try:
        raise UnknownNameError("architecture", architecture, known)
    except UnknownNameError as hint:
        raise BaseModelError(
            f"{path} has an architecture that cannot be converted: {hint.message}",
            remedy="use the model's original safetensors checkpoint (a hub name or a folder)",
        ) from None


def _convert(path: Path, folder: Path, digest: str) -> None:
    """Dequantise ``path`` into ``folder``: all weights bfloat16, tied ones stored once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    architecture = inspect(path)
    print(f"converting {path.name} once (a small model takes about half a minute)", file=sys.stderr)
    try:
        with quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:
        raise BaseModelError(
            f"{path} (architecture {architecture}) cannot be converted: {type(error).__name__}: {error}",
            remedy="use the model's original safetensors checkpoint (a hub name or a folder)",
        ) from error
    # what is saved is no longer a GGUF: without this the folder would ask for one, and save_pretrained refuses
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    if limit := getattr(model.config, "max_position_embeddings", None):
        tokenizer.model_max_length = limit
    with atomic_dir(folder) as temporary, disk_errors(), quiet():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for file in temporary.iterdir():  # safetensors writes for the owner alone, which a shared cache cannot use
            shutil.copymode(temporary / "config.json", file)
        write_manifest(temporary, {"kind": "gguf", "file": path.name, "sha256": digest, "architecture": architecture})


@contextlib.contextmanager
def disk_errors() -> Any:
    """Turn safetensors' own I/O error, which is no OSError, into one, so that a full disk is named as such."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        text = str(error)
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            if f"os error {code}" in text:
                raise OSError(code, os.strerror(code)) from error
        raise OSError(errno.EIO, text) from error


@contextlib.contextmanager
def quiet() -> Any:
    """Silence transformers' progress bars and warnings for a moment; its own settings come back afterwards."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
