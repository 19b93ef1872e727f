"""Silence the libraries around sigmix."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

LIBRARIES = ("accelerate", "bitsandbytes", "huggingface_hub", "kernels", "peft", "torch", "torchao", "transformers")

_lock = threading.Lock()
_depth = 0
_levels: list[int] = []
_progress_bars = True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress log records up to WARNING of other libraries and transformers' progress bars, then restore both.

    transformers, torchao and bitsandbytes log about kernels and options that do not apply here. Acts on the whole
    process; records of sigmix and of the program around it pass. Can be nested, and entered from several threads.
    """
    from transformers.utils import logging as transformers_logging

    global _depth, _levels, _progress_bars
    transformers_logging.get_verbosity()  # configures its logger, which sets the level
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    with _lock:
        if _depth == 0:
            _levels = [logger.level for logger in loggers]
            _progress_bars = transformers_logging.is_progress_bar_enabled()
            for logger in loggers:
                logger.setLevel(max(logger.level, logging.ERROR))
            transformers_logging.disable_progress_bar()
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                for logger, level in zip(loggers, _levels, strict=True):
                    logger.setLevel(level)
                if _progress_bars:
                    transformers_logging.enable_progress_bar()
