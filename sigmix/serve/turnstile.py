"""One model, several threads: whoever wants the engine gets it in the order of asking."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sigmix.engine import Engine
from sigmix.experts.mix import Mix


class Turnstile:
    """A first-come, first-served lock. Python's own lets a busy thread take it again before those who wait wake up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[threading.Event] = deque()
        self._held = False

    @property
    def waiting(self) -> int:
        """How many threads wait."""
        return len(self._queue)

    def __enter__(self) -> None:
        with self._lock:
            if not self._held:
                self._held = True
                return
            mine = threading.Event()
            self._queue.append(mine)
        mine.wait()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._queue:
                self._queue.popleft().set()  # handed over: it stays held
            else:
                self._held = False


class SharedEngine(Engine):
    """An `Engine` for several threads: between entering and leaving `under` it belongs to one of them.

    A thread must not enter it twice.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.turnstile = Turnstile()
        super().__init__(*args, **kwargs)

    @contextmanager
    def _turn_of(self, mixes: list[Mix], form: str | None) -> Iterator[tuple[Any, int]]:
        with self.turnstile, super()._turn_of(mixes, form) as entered:
            yield entered
