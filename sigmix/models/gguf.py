"""GGUF files as bases: dequantized once into a cached folder of safetensors, which is always loaded instead.

The folder is ``cache_dir()/models/<key>/``: config, generation config, tokenizer, bfloat16 weights and a manifest with
the SHA-256 of every file. The base *is* these bfloat16 weights: the dequantized values are rounded here, once, and the
base's fingerprint covers the result.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sigmix.errors import BaseModelError, reraised
from sigmix.models.gguf_config import MODEL_TYPES, ORIGINAL, ROPE_TENSORS, config_of, splits_of
from sigmix.utils.cache import cache_dir, write_manifest
from sigmix.utils.io import atomic_dir, file_lock, sha256_file, write_json, writing
from sigmix.utils.logging import quiet

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor
    from transformers import PreTrainedConfig

FORMAT = 2  # part of the cache's key: raise it when a file would be converted otherwise than before
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
"""Name of a part of a split model, as llama.cpp's gguf-split writes it."""


@dataclass(frozen=True)
class Contents:
    """Header and tensors of a model, from all of its files.

    Attributes:
        architecture: llama.cpp's name.
        fields: header of the first file.
        tensors: by name.
        readers: one for each file.
    """

    architecture: str
    fields: dict[str, Any]
    tensors: dict[str, ReaderTensor]
    readers: list[GGUFReader]


def models_dir() -> Path:
    """Return the folder of converted bases."""
    return cache_dir() / "models"


def model_files(path: Path) -> list[Path]:
    """Return all files of a GGUF model: ``path`` alone, or in order the parts of a split model that it belongs to.

    Names may differ in case. A link leads to the parts beside it, else to those beside its target.

    Raises:
        BaseModelError: parts are missing.
    """
    missing: list[str] = []
    for place in (path, path.resolve()):
        if (match := PART.fullmatch(place.name)) is not None:
            stem, count = match["stem"], int(match["count"])
            names = [f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
            there = {file.name.casefold(): file for file in place.parent.iterdir() if file.is_file()}
            missing = [name for name in names if name.casefold() not in there]
            if not missing:
                return [there[name.casefold()] for name in names]
    if missing:
        raise BaseModelError(
            f"{path.name} is a part of a split model, of which {len(missing)} of {count} files are missing in "
            f"{place.parent}: {', '.join(missing[:5])}{', …' if missing[5:] else ''}",
            remedy="download all parts into one folder",
        )
    return [path]


def convert_gguf(files: Sequence[Path], folder: Path | None = None) -> Path:
    """Return the folder of safetensors of a GGUF model; the first call converts it.

    Safe to call from several processes at once.

    Args:
        files: see `model_files`.
        folder: default: a folder of the cache, named by the digests of the files.

    Raises:
        BaseModelError: not a GGUF model, incomplete, or one that transformers cannot represent.
        OutputError: the cache cannot be written or the disk is full.
    """
    digests = [sha256_file(file) for file in files]
    if folder is None:
        folder = models_dir() / hashlib.sha256(f"{FORMAT} {' '.join(digests)}".encode()).hexdigest()
    with file_lock(models_dir() / f".{folder.name}.lock"):
        if not folder.is_dir():
            _convert(files, folder, digests)
    return folder


def read_contents(files: Sequence[Path]) -> Contents:
    """Return header and tensors of a GGUF model, after checking that the bytes of every tensor are there.

    Raises:
        BaseModelError: not a GGUF file, truncated, not a language model, an incomplete split, or an unsupported
            architecture.
    """
    readers = [_open(file) for file in files]
    fields = {name: field.contents() for name, field in readers[0].fields.items()}
    architecture = fields.get("general.architecture")
    tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    _check_kind(files[0], fields, tensors)
    if architecture is None or not tensors:
        lacking = "no general.architecture" if architecture is None else "no weights (a vocabulary only?)"
        raise BaseModelError(f"{files[0]} has {lacking}", remedy="choose the model's own file")
    if (total := fields.get("split.tensors.count", len(tensors))) != len(tensors):
        raise BaseModelError(
            f"{files[0]} is a part of a split model of {total} tensors, and {len(files)} files hold {len(tensors)}",
            remedy="download all parts into one folder, named NAME-00001-of-00002.gguf and so on",
        )
    if architecture not in MODEL_TYPES:
        near = difflib.get_close_matches(architecture, MODEL_TYPES, n=3, cutoff=0.5)
        raise BaseModelError(
            f"{files[0]} has the unsupported architecture {architecture!r}; nearest: {', '.join(near) or 'none'}",
            remedy=ORIGINAL,
        )
    return Contents(architecture, fields, tensors, readers)


def read_config(contents: Contents, path: Path) -> PreTrainedConfig:
    """Return transformers' configuration of a GGUF model; ``path`` is for messages.

    Raises:
        BaseModelError: a key that changes the logits and has no counterpart in transformers.
    """
    values = {name: tensor.data for name, tensor in contents.tensors.items()}
    try:
        return config_of(contents.fields, values, _tied(contents))
    except BaseModelError as error:
        raise BaseModelError(
            f"{path} (architecture {contents.architecture}) cannot be converted: {error.message}", remedy=error.remedy
        ) from error


def _open(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    remedy = "download it again (in a git clone: git lfs pull), or give a model folder or hub name"
    with reraised(BaseModelError, f"{path} is no GGUF file of version 2 or 3, or truncated", remedy):
        return GGUFReader(path)


def _check_kind(path: Path, fields: dict[str, Any], tensors: dict[str, ReaderTensor]) -> None:
    """Raise BaseModelError for a GGUF file that holds something else than a language model."""
    kind, architecture = fields.get("general.type", "model"), fields.get("general.architecture")
    if kind == "adapter" or "adapter.type" in fields or any(".lora_" in name for name in tensors):
        base = fields.get("general.base_model.0.name", "the model that it was made for")
        mix = fields.get("sigmix.mix")
        own = f"give {base}" if mix is None else f"sigmix loads the experts themselves: --base BASE --mix {mix}"
        raise BaseModelError(
            f"{path} is an adapter for {base}, not a model",
            remedy=f"{own}; llama.cpp loads this file beside its base: llama-server -m BASE.gguf --lora {path.name}",
        )
    names = {"clip": "mmproj", "controlvector": "control vector", "imatrix": "imatrix"}
    kind = names.get(str(architecture), kind)
    if kind == "mmproj" or any(name.startswith("clip.") for name in fields):
        raise BaseModelError(
            f"{path} is the image or audio projector (mmproj) of a model, not a language model",
            remedy="give the model's own .gguf file, which lies beside it",
        )
    if kind != "model":
        raise BaseModelError(f"{path} has the type {kind!r}, not a model", remedy="give the model's own .gguf file")


def _convert(files: Sequence[Path], folder: Path, digests: Sequence[str]) -> None:
    """Dequantize ``files`` into ``folder``: all weights bfloat16, tied ones stored once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    contents = read_contents(files)
    config = read_config(contents, files[0])
    label = f"{files[0]} (architecture {contents.architecture})"
    print(f"converting {files[0].name} once (a small model takes about half a minute)", file=sys.stderr)
    with _merged(contents, files) as file, reraised(BaseModelError, f"{label} cannot be converted", ORIGINAL), quiet():
        if unused := _unused(contents, config):
            raise _differing(label, f"{len(unused)} tensors have no place in the model, such as {unused[0]}")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, config=config, dtype=torch.bfloat16, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
        model, report = loaded
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        if (splits := splits_of(contents.fields)) is not None:
            tokenizer.backend_tokenizer.pre_tokenizer = splits
    if missing := sorted(report["missing_keys"]):  # transformers initializes these at random
        raise BaseModelError(
            f"{label} is incomplete: {len(missing)} tensors are missing, such as {', '.join(missing[:3])}",
            remedy="download it again, all parts of it",
        )
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise _differing(label, f"{name} has the shape {tuple(stored)}, expected {tuple(expected)}")
    if unexpected := sorted(report["unexpected_keys"]):
        raise _differing(label, f"{len(unexpected)} tensors have no place in the model, such as {unexpected[0]}")
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
        _drop_tokens(temporary / "tokenizer.json", model.config.vocab_size)
        for path in temporary.iterdir():  # safetensors writes for the owner alone, which breaks a shared cache
            shutil.copymode(temporary / "config.json", path)
        source = {"kind": "gguf", "file": files[0].name, "sha256": " ".join(digests)}
        write_manifest(temporary, source | {"architecture": contents.architecture})


def _drop_tokens(file: Path, size: int) -> None:
    """Remove the tokens beyond the embedding: transformers adds GPT-2's ``<|endoftext|>`` to every byte-level BPE."""
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    kept = [token for token in tokenizer["added_tokens"] if token["id"] < size]
    if len(kept) < len(tokenizer["added_tokens"]):
        write_json(file, tokenizer | {"added_tokens": kept})


def _differing(label: str, difference: str) -> BaseModelError:
    return BaseModelError(f"{label} differs from transformers' model: {difference}", remedy=ORIGINAL)


def _tied(contents: Contents) -> bool:
    """Return whether the output projection is the embedding matrix."""
    output, embedding = (contents.tensors.get(name) for name in ("output.weight", "token_embd.weight"))
    if output is None or embedding is None:
        return True
    return output.tensor_type == embedding.tensor_type and bool((output.data == embedding.data).all())


def _unused(contents: Contents, config: PreTrainedConfig) -> list[str]:
    """Return the tensors that transformers' older reader would drop; the newer one reports them itself."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations.gguf.utils import is_gguf_arch_supported
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    if is_gguf_arch_supported(contents.architecture):
        return []
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    processor = TENSOR_PROCESSORS.get(contents.architecture, TensorProcessor)(config=config.to_dict())
    used = get_gguf_hf_weights_map(model, processor).keys() | {"output.weight"}
    if hasattr(config, "rope_parameters"):
        used |= set(ROPE_TENSORS)  # part of the configuration
    return sorted(name for name in contents.tensors if not {name, name.removesuffix(".weight")} & used)


@contextlib.contextmanager
def _merged(contents: Contents, files: Sequence[Path]) -> Iterator[Path]:
    """Yield the path of the whole model in one file that transformers reads rightly.

    It does not read split files, and it leaves q and k of a Llama permuted unless the header states both numbers of
    heads, each as one number.
    """
    numbers: dict[str, int] = {}
    if contents.architecture == "llama":
        for name in ("llama.attention.head_count", "llama.attention.head_count_kv"):
            value = contents.fields.get(name, contents.fields["llama.attention.head_count"])
            numbers[name] = value[0] if isinstance(value, list) else value
    if len(files) == 1 and all(contents.fields.get(name) == value for name, value in numbers.items()):
        yield files[0]
        return
    from gguf import GGUFValueType, GGUFWriter
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

    first, tensors = contents.readers[0], list(contents.tensors.values())
    whole: Any = SimpleNamespace(fields=first.fields, tensors=tensors, endianess=first.endianess)
    changed = {name: MetadataDetails(GGUFValueType.UINT32, value) for name, value in numbers.items()}
    dropped = [name for name in first.fields if name.startswith("split.") or name in changed]
    scratch = tempfile.TemporaryDirectory(dir=models_dir(), prefix=".merge.", suffix=".tmp")
    with writing(models_dir()), scratch as folder:
        path = Path(folder) / "model.gguf"
        with quiet():
            writer = GGUFWriter(path, contents.architecture, endianess=first.endianess)
            writer.data_alignment = first.alignment
            copy_with_new_metadata(whole, writer, changed, dropped)
        yield path
