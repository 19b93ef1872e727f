"""The harness's options, of the model and of generation, as the engine's; what it does not have is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from sigmix.adapt.opening import AUTO
from sigmix.errors import ConfigError

PASSED = ("max_length", "truncation", "add_bos_token", "prefix_token_id", "chat_template_args")
"""Options of the harness's ``hf`` model that mean the same here."""
OWN = ("base", "mix", "strategy", "bank", "dtype", "device", "form", "decisions", "batch_size", "max_batch_size",
       "quantization", "basis")  # fmt: skip
BUDGET = 8192
"""Tokens in a batch, padding included, with batch_size "auto"."""
NOTHING: dict[str, tuple[Any, ...]] = {
    "num_beams": (1, None), "num_return_sequences": (1, None), "repetition_penalty": (1, 1.0, None),
    "length_penalty": (1, 1.0, None), "use_cache": (True, None), "top_k": (0, None), "min_p": (0, 0.0, None),
}  # fmt: skip
"""Generation options that the engine does not have, with the values that ask for nothing."""


def generation(given: Mapping[str, Any], most: int, tokenizer: Any) -> tuple[dict[str, Any], list[str], list[int]]:
    """The engine's options, stop strings, and stop tokens (special ones, which no decoded text shows).

    Args:
        given: a request's generation arguments. most: tokens of an answer where they do not say.

    Raises:
        ConfigError: an option that the engine does not have.
    """
    wanted = dict(normalize_gen_kwargs(dict(given), most))
    stop = [mark for mark in handle_stop_sequences(wanted.pop("until", None), eos=None) if mark]
    wanted.pop("do_sample", None)  # without it the temperature is 0 by now
    options = {
        "max_new_tokens": int(wanted.pop("max_gen_toks")), "temperature": float(wanted.pop("temperature", 0) or 0),
        "top_p": float(wanted.pop("top_p", 1) or 1),
    }  # fmt: skip
    if not options["temperature"]:
        wanted.pop("top_k", None)  # of no effect on greedy answers
    for name, value in wanted.items():
        if value not in NOTHING.get(name, ()):
            raise ConfigError(
                f"generation option {name}={value!r} is not supported",
                remedy="supported are until, max_gen_toks, do_sample, temperature and top_p",
            )
    special = [mark for mark in stop if mark in tokenizer.all_special_tokens]
    ids = [int(tokenizer.convert_tokens_to_ids(mark)) for mark in special]
    return options, [mark for mark in stop if mark not in special], ids


def device_of(name: str | None) -> str | None:
    """The harness says cuda:0 where nobody said anything."""
    if name is None or torch.cuda.is_available() or not name.startswith("cuda"):
        return name
    if name == "cuda:0":
        return None
    raise ConfigError(f"there is no CUDA device for --device {name}", remedy="leave it out")


def rows_of(batch_size: int | str) -> int | None:
    """Rows of a batch; None by tokens."""
    if str(batch_size).startswith(AUTO):
        return None
    try:
        rows = int(batch_size)
    except ValueError:
        rows = 0
    if rows < 1:
        raise ConfigError(f"batch_size must be auto or a number of at least 1, not {batch_size!r}")
    return rows
