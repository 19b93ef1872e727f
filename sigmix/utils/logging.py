"""Silence the libraries around sigmix."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_depth = 0
_before: tuple[int, bool] = (logging.NOTSET, True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress log records up to WARNING and transformers' progress bars, for the whole process, then restore both.

    transformers, torchao and bitsandbytes log about kernels and options that do not apply here. Can be nested, and
    entered from several threads.
    """
    from transformers.utils import logging as transformers_logging

    global _depth, _before
    with _lock:
        if _depth == 0:
            _before = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
            logging.disable(max(_before[0], logging.WARNING))
            transformers_logging.disable_progress_bar()
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                logging.disable(_before[0])
                if _before[1]:
                    transformers_logging.enable_progress_bar()
