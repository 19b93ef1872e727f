"""What commands open: a bank, mixes, a base, an engine; and what their options mean as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sigmix.cli._console import Ticker, working


def read_targets(text: str | None) -> list[str] | str | None:
    """``target_modules`` from --targets: a word, a regular expression, or names with commas between them."""
    return text.split(",") if text and "," in text else text


def read_layers(text: str | None) -> list[int] | str | None:
    """``layers_to_transform`` from --layers.

    Raises:
        ConfigError: neither "half" nor numbers.
    """
    from sigmix.errors import ConfigError

    if not text or text == "half":
        return text
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"--layers must be half or numbers like 0,2,4, not {text!r}") from None


def open_bank(folder: Path | None) -> Any:
    """The bank in a folder or of a collection on the hub, or the bundled one."""
    from sigmix.experts.bank import Bank

    with working("opening the experts"):
        # as text, which can name a collection where there is no such folder
        return Bank(folder.as_posix()) if folder is not None else Bank.bundled()


def read_mix(text: str, bank: Any = None) -> Any:
    """A `Mix` from "a:0.7+b:0.3" or from a file that holds one as JSON; its experts are looked up in ``bank``.

    Raises:
        ConfigError: neither. UnknownNameError: an expert that the bank does not have.
    """
    from sigmix.experts.mix import read_mix as read

    return read(text, bank)


def open_mixes(texts: Sequence[str], folder: Path | None, wanted: bool = False) -> tuple[list[Any], Any]:
    """The mixes and the bank that they need (None if no bank was asked for or is ``wanted``, and all are the base)."""
    mixes = [read_mix(text) for text in texts]
    needed = wanted or folder is not None or any(mix.weights for mix in mixes)
    bank: Any = open_bank(folder) if needed else None
    for name in [name for mix in mixes for name in mix.weights]:
        bank.path(name)  # there is a bank if any mix has an expert
    return mixes, bank


def read_device_map(text: str | None) -> Any:
    """What ``--device-map`` says, as `load_base` takes it: None, "auto", or the {module: device} of a JSON file.

    Raises:
        ConfigError: no such file, or another content.
    """
    from sigmix.errors import ConfigError

    if text is None or text == "auto":
        return text
    remedy = 'auto, or a file like {"model.embed_tokens": 0, "model.layers.0": 0, …, "lm_head": "cpu"}'
    try:
        made = json.loads(Path(text).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"--device-map {text} cannot be read: {why}", remedy=remedy) from error
    devices = made.values() if isinstance(made, dict) else ()
    if not devices or not all(isinstance(one, (str, int)) and not isinstance(one, bool) for one in devices):
        raise ConfigError(f"--device-map {text} holds no object of modules and devices", remedy=remedy)
    return made


def open_base(
    base: str, dtype: str | None = None, quantization: str | None = None, basis: str = "own",
    device_map: str | None = None,
) -> Any:  # fmt: skip
    """(model, tokenizer) of a base, quantised or not, in the basis asked for; shown as work on stderr.

    Args:
        device_map: see `read_device_map`.

    Raises:
        ConfigError: a basis that there is not, or "original" for a base that is not quantised. Others: see `load_base`.
    """
    from sigmix.experts.original_basis import check_basis

    check_basis(basis, quantization)
    placed = read_device_map(device_map)
    with working(f"loading {base}"):
        from sigmix.models.loading import load_base

        model, tokenizer = load_base(base, dtype, quantization_config=quantization, device_map=placed)
    if basis == "original":
        from sigmix.experts.original_basis import use_original_basis

        with Ticker("reading the original weights", 0) as ticker:
            use_original_basis(model, lambda *_: ticker.advance())
    else:
        _decompose(model)
    return model, tokenizer


def base_of(base: str, experts: Sequence[Any], dtype: str | None = None, quantization: str | None = None) -> Any:
    """The model of a base, for comparing it with experts: without more words in the dtype and quantisation in which the
    first of them that says so was made; shown as work on stderr.

    Raises:
        See `load_base`.
    """
    from sigmix.svf.linears import dtype_and_quantization

    told = [(expert.meta.get("base") or {}).get("dtype") for expert in experts]
    made, kept = dtype_and_quantization(next((one for one in told if one), None))
    with working(f"loading {base}"):
        from sigmix.models.loading import load_base

        return load_base(base, dtype or made, quantization_config=quantization or kept)[0]


def open_engine(
    base: str, bank: Any, mixes: Sequence[Any] = (), quantization: str | None = None, basis: str = "own",
    device_map: str | None = None,
) -> Any:  # fmt: skip
    """An `Engine` on a base, see `open_base`; experts in ``mixes`` are checked against the base at once."""
    model, tokenizer = open_base(base, None, quantization, basis, device_map)
    with working("checking the experts"):
        from sigmix.engine import Engine

        engine = Engine(model, tokenizer, bank)
        for mix in mixes:
            engine.z(mix)
    return engine


def _decompose(model: Any) -> None:
    """Fill the cache of decompositions with a progress bar; the engine would do the same in silence."""
    from sigmix.models.digests import weight_digest
    from sigmix.models.multimodal import backbone
    from sigmix.svf.decomposition import cache_path, cached_decompose
    from sigmix.svf.linears import linears, matrix_of

    head, inside = model.get_output_embeddings(), backbone(model)
    root = f"{inside[0]}." if inside is not None else ""
    layers = [module for path, module in linears(model).items() if path.startswith(root) and module is not head]
    if layers and not cache_path(weight_digest(matrix_of(layers[-1]))).exists():
        with Ticker("decomposing the base, once", len(layers)) as ticker:
            for module in layers:
                cached_decompose(matrix_of(module))
                ticker.advance()


# --- What the name of an expert on the command line means.


def folder_of(name: str, bank: Path | None) -> Path | str:
    """Resolve an expert argument to a folder, a name in the bank, or a hub id.

    Raises:
        UnknownNameError: neither. ExpertError: a folder without an expert.
    """
    from sigmix.errors import ExpertError
    from sigmix.experts.hub import is_repo_id

    path = Path(name).expanduser()
    if is_repo_id(name):
        return name
    if (path / "adapter_config.json").is_file():
        return path
    if path.is_absolute() or len(path.parts) > 1 or name.startswith("."):
        what = "has no adapter_config.json" if path.is_dir() else "does not exist"
        raise ExpertError(f"there is no expert at {path}: it {what}", remedy="give an expert's folder, or a name")
    return open_bank(bank).path(name)


# --- What commands share about strategies: opening one by its letter, and saying what it decided.


AUTO = "auto"


LETTERS = {"A": "prompt", "B": "classifier", "D": "probe"}


def open_strategy(engine: Any, choice: str = AUTO) -> Any:
    """A strategy for an engine's bank, by letter, name or "auto".

    Raises:
        UnknownNameError: no such strategy. Others: see the strategies.
    """
    from sigmix.adapt.two_pass import open_strategy as opened

    return opened(engine, choice)


def explained(decision: Any) -> str:
    """ "larger: the probe says comparing (99%)"."""
    return f"{decision.mix.id}: {decision.reason}"
