"""A mix as users write it: "a:0.7+b:0.3", or a file that holds one as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sigmix.errors import ConfigError
from sigmix.experts.mix import Mix


def read_mix(text: str, bank: Any = None) -> Mix:
    """A `Mix` from its text or from a ``.json`` file; its experts are looked up in ``bank``.

    Args:
        bank: a `Bank`; None looks nothing up.

    Raises:
        ConfigError: neither. UnknownNameError: an expert that the bank does not have.
    """
    path = Path(text).expanduser()
    if path.suffix == ".json":
        try:
            mix = Mix.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise ConfigError(f"cannot read the mix {path}: {why}", remedy="give a file, or a:0.7+b:0.3") from error
    else:
        mix = Mix.parse(text)
    for name in mix.weights if bank is not None else ():
        bank.path(name)
    return mix
