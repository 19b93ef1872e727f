"""GGUF files as bases: dequantized once into a cached folder of safetensors, which is always loaded instead.

The folder is ``cache_dir()/models/<sha256 of the .gguf>/``: config, generation config, tokenizer, bfloat16 weights and
a manifest with the SHA-256 of every file. The base *is* these bfloat16 weights: the dequantized values are rounded
here, once, and the base's fingerprint covers the result.
"""

from __future__ import annotations

import difflib
import shutil
import sys
from pathlib import Path
from typing import Any

from sigmix.errors import BaseModelError
from sigmix.utils.cache import cache_dir, write_manifest
from sigmix.utils.io import atomic_dir, file_lock
from sigmix.utils.logging import quiet

ORIGINAL = "use the model's original safetensors checkpoint (a hub name or a folder)"


def models_dir() -> Path:
    """Return the folder of converted bases."""
    return cache_dir() / "models"


def convert_gguf(path: Path, digest: str) -> Path:
    """Return the folder of safetensors of a GGUF file with SHA-256 ``digest``; the first call converts it.

    Safe to call from several processes at once.

    Raises:
        BaseModelError: not a GGUF file, truncated, or an unsupported architecture.
        OutputError: the cache cannot be written or the disk is full.
    """
    folder = models_dir() / digest
    with file_lock(models_dir() / f".{digest}.lock"):
        if not folder.is_dir():
            _convert(path, folder, digest)
    return folder


def read_architecture(path: Path) -> str:
    """Return the architecture in the header of a GGUF file, after checking that the bytes of every tensor are there.

    Raises:
        BaseModelError: not a GGUF file, truncated, or an architecture that transformers does not convert.
    """
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise BaseModelError(
            f"{path} is not a GGUF file: it begins with {magic!r}, expected b'GGUF'",
            remedy="download it again, or give a model folder or hub name",
        )
    try:
        reader = GGUFReader(path)
        field = reader.fields.get("general.architecture")
        architecture = None if field is None else str(field.contents())
    except Exception as error:  # the reader has no error of its own: numpy's and struct's propagate
        raise BaseModelError(
            f"{path} is truncated or damaged ({path.stat().st_size} bytes): {error}", remedy="download it again"
        ) from error
    if architecture is None or not reader.tensors:
        lacking = "no general.architecture" if architecture is None else "no weights (a vocabulary only?)"
        raise BaseModelError(f"{path} has {lacking}", remedy="choose the model's own file")
    # transformers spells some of the file's names with an underscore
    supported = {name for name in GGUF_SUPPORTED_ARCHITECTURES if name not in {"general", "tokenizer", "t5", "umt5"}}
    if architecture.replace("-", "_") not in supported | {name.replace("_", "") for name in supported}:
        near = difflib.get_close_matches(architecture, sorted(supported), n=3, cutoff=0.5)
        raise BaseModelError(
            f"{path} has the unsupported architecture {architecture!r}; nearest: {', '.join(near) or 'none'}",
            remedy=ORIGINAL,
        )
    return architecture


def _convert(path: Path, folder: Path, digest: str) -> None:
    """Dequantize ``path`` into ``folder``: all weights bfloat16, tied ones stored once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    architecture = read_architecture(path)
    print(f"converting {path.name} once (a small model takes about half a minute)", file=sys.stderr)
    try:
        with quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:
        raise BaseModelError(
            f"{path} (architecture {architecture}) cannot be converted: {type(error).__name__}: {error}",
            remedy=ORIGINAL,
        ) from error
    # otherwise save_pretrained refuses, and the saved config points at a GGUF file
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    if limit := getattr(model.config, "max_position_embeddings", None):
        tokenizer.model_max_length = limit
    with atomic_dir(folder) as temporary, quiet():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for file in temporary.iterdir():  # safetensors writes for the owner alone, which breaks a shared cache
            shutil.copymode(temporary / "config.json", file)
        write_manifest(temporary, {"kind": "gguf", "file": path.name, "sha256": digest, "architecture": architecture})
