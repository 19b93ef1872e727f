"""Read option values, and open the base models, banks, mixtures and engines that they name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sigmix.cli._console import Progress, note, working
from sigmix.errors import ConfigError, UnknownNameError, reraised
from sigmix.utils.io import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sigmix.engine import Engine
    from sigmix.engine.base import InferenceEngine
    from sigmix.experts.bank import Bank
    from sigmix.experts.expert import Expert
    from sigmix.experts.mix import Mix
    from sigmix.tasks.base import Task
    from sigmix.tasks.dataset import DataConfig


def read_targets(text: str | None) -> list[str] | str | None:
    """Return ``target_modules`` from --targets: a keyword or regular expression, or comma-separated names."""
    if not text or "," not in text:
        return text
    return [name.strip() for name in text.split(",") if name.strip()]


def read_layers(text: str | None) -> list[int] | str | None:
    """Return ``layers_to_transform`` from --layers.

    Raises:
        ConfigError: neither "half" nor numbers.
    """
    if not text or text == "half":
        return text
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"--layers must be half or numbers such as 0,2,4, not {text!r}") from None


def read_device_map(text: str | None) -> str | dict[str, str | int] | None:
    """Return ``device_map`` of `load_base` from --device-map: None, "auto", or {module: device} from a JSON file.

    Raises:
        ConfigError: unreadable file or invalid content.
    """
    if text is None or text == "auto":
        return text
    remedy = 'give auto, or a file such as {"model.embed_tokens": 0, "model.layers.0": 0, …, "lm_head": "cpu"}'
    with reraised(ConfigError, f"--device-map {text} is not JSON", remedy):
        places = json.loads(read_text(text, ConfigError, remedy))
    devices = places.values() if isinstance(places, dict) else ()
    if not devices or not all(isinstance(one, (str, int)) and not isinstance(one, bool) for one in devices):
        raise ConfigError(f"--device-map {text} holds no object of modules and devices", remedy=remedy)
    return places


def read_data_options(options: dict[str, Any]) -> DataConfig:
    """Remove the options of `DataConfig` from ``options`` and return them.

    Raises:
        ConfigError: some are given without --data.
    """
    from sigmix.tasks.dataset import DataConfig

    given = {one: options.pop(one.name) for one in dataclasses.fields(DataConfig) if one.name in options}
    config = DataConfig(**{one.name: value for one, value in given.items() if value is not None})
    for one, value in given.items():
        if config.data is None and value is not None:
            flag = one.metadata.get("option", f"--{one.name.replace('_', '-')}")
            raise ConfigError(f"{flag} describes data", remedy="give the data with --data")
    return config


def open_task(
    task: str | None, options: dict[str, Any], data_dir: Path | None = None, allow_code: bool = False
) -> Task:
    """Return the task of --task or --data; removes the options of `DataConfig` from ``options``.

    Raises:
        ConfigError: none of the two, or both.
    """
    from sigmix.tasks.registry import get_task

    config = read_data_options(options)
    if (task is None) == (config.data is None):
        raise ConfigError("give one of --task and --data", remedy="sigmix tasks lists the tasks; --data reads a file")
    if config.data is not None:
        return get_task(f"data:{config.data}", allow_code=allow_code, **config.task_options())
    assert task is not None
    return get_task(task, data_dir=data_dir, allow_code=allow_code)


def open_bank(folder: Path | None) -> Bank:
    """Return the bank in a folder or of a collection on the hub, or the bundled one."""
    with working("loading the experts"):
        from sigmix.experts.bank import Bank

        return Bank(folder.as_posix()) if folder is not None else Bank.bundled()  # text may name a collection


def open_mixes(texts: Sequence[str], folder: Path | None, need_bank: bool = False) -> tuple[list[Mix], Bank | None]:
    """Return mixtures and their bank; the bank is None if it is not given and every mixture is the base model.

    Raises:
        ConfigError: invalid expression. UnknownNameError: expert that is not in the bank.
    """
    from sigmix.experts.mix import read_mix

    mixes = [read_mix(text) for text in texts]
    if not (need_bank or folder is not None or any(mix.weights for mix in mixes)):
        return mixes, None
    bank = open_bank(folder)
    for name in [name for mix in mixes for name in mix.weights]:
        bank.path(name)
    return mixes, bank


def expert_source(name: str, bank: Path | None) -> Path | str:
    """Resolve an expert argument to a folder or a hub id: a path, user/name, or a name in the bank.

    Raises:
        UnknownNameError: no such name in the bank. ExpertError: a folder without an expert.
    """
    from sigmix.experts.hub import is_repo_id

    if is_repo_id(name):
        return name
    path = Path(name).expanduser()
    if path.is_absolute() or len(path.parts) > 1 or name.startswith(".") or (path / "adapter_config.json").is_file():
        return path
    return open_bank(bank).path(name)


def open_expert(name: str, bank: Path | None) -> Expert:
    """Load the expert that an argument names; see `expert_source`."""
    from sigmix.experts.expert import Expert

    return Expert.from_pretrained(expert_source(name, bank))


def open_base(
    base: str, dtype: str | None = None, quantization: str | None = None, basis: str = "own",
    device_map: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:  # fmt: skip
    """Load a base model and its tokenizer, and compute decompositions that are missing in the cache.

    Raises:
        ConfigError: invalid basis or device map. Others: see `load_base`.
    """
    places = read_device_map(device_map)
    with working(f"loading {base}"):
        from sigmix.experts.original_basis import check_basis, use_original_basis
        from sigmix.models.loading import load_base

        check_basis(basis, quantization)
        model, tokenizer = load_base(base, dtype, quantization_config=quantization, device_map=places)
    if basis == "original":
        with Progress("reading the original checkpoint, once", 0) as progress:
            use_original_basis(model, lambda *_: progress.advance())
    else:
        _decompose(model)
    return model, tokenizer


def open_model_of(
    experts: Sequence[Expert], base: str, dtype: str | None = None, quantization: str | None = None
) -> PreTrainedModel:
    """Load a base model in the dtype and quantization that the experts record, unless others are given."""
    from sigmix.models.loading import load_base
    from sigmix.svf.linears import dtype_and_quantization

    recorded = [(expert.meta.get("base") or {}).get("dtype") for expert in experts]
    own_dtype, own_quantization = dtype_and_quantization(next((one for one in recorded if one), None))
    with working(f"loading {base}"):
        return load_base(base, dtype or own_dtype, quantization_config=quantization or own_quantization)[0]


def open_engine(
    base: str, bank: Bank | None, mixes: Sequence[Mix] = (), quantization: str | None = None, basis: str = "own",
    device_map: str | None = None, decode_weights: str | None = None, compile: bool = False,
) -> Engine:  # fmt: skip
    """Return an `Engine` on a base model; the experts in ``mixes`` are checked against the base model at once."""
    if decode_weights is not None:
        from sigmix.engine.cpu.native import check_decode_weights

        check_decode_weights(decode_weights, quantization)
    model, tokenizer = open_base(base, None, quantization, basis, device_map)
    with working("checking the experts"):
        from sigmix.engine import Engine

        engine = Engine(model, tokenizer, bank, decode_weights=decode_weights, compile=compile)
        _check_mixes(engine, mixes)
    return engine


def open_inference_engine(
    engine: str, base: str, bank: Bank | None, mixes: Sequence[Mix] = (), **options: Any
) -> InferenceEngine:
    """Return one of `ENGINES`; the experts in ``mixes`` are checked against the base model at once.

    Args:
        options: of `open_engine`, which vLLM does not have.

    Raises:
        UnknownNameError: another engine. ConfigError: vLLM with such an option, or vLLM is missing.
    """
    from sigmix.engine.base import ENGINES

    if engine not in ENGINES:
        raise UnknownNameError("engine", engine, ENGINES, remedy="--engine own or --engine vllm")
    if engine == "own":
        return open_engine(base, bank, mixes, **options)
    for name, value in options.items():
        if value not in (None, False, "own"):
            raise ConfigError(
                f"--{name.replace('_', '-')} cannot be combined with --engine vllm", remedy="use --engine own"
            )
    with working(f"loading {base} in vLLM"):
        from sigmix.integrations.vllm.engine import VllmEngine

        opened = VllmEngine(base, bank)
        _check_mixes(opened, mixes)
    return opened


def _check_mixes(engine: InferenceEngine, mixes: Sequence[Mix]) -> None:
    """Check mixtures against the base model, and note what they do to answer tokens."""
    from sigmix.experts.mix import answer_note

    for mix in dict.fromkeys(mixes):
        engine.check_mix(mix)
        if text := answer_note(mix, engine.bank):
            note(text)


def _decompose(model: Any) -> None:
    """Decompose the matrices of a base model that are missing in the cache, with a progress bar."""
    from sigmix.models.digests import weight_digest
    from sigmix.svf.decomposition import cache_path, cached_decompose
    from sigmix.svf.linears import matrix_of
    from sigmix.svf.tuner import target_layers

    layers = list(target_layers(model).values())
    if layers and not cache_path(weight_digest(matrix_of(layers[-1]))).exists():
        with Progress("decomposing the base model, once", len(layers)) as progress:
            for layer in layers:
                cached_decompose(matrix_of(layer))
                progress.advance()
