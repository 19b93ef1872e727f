"""One model, several threads: whoever wants the engine gets it in the order of asking."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from sigmix.engine import Engine
from sigmix.engine.prefix import StoredPrefix
from sigmix.engine.prefixes import Entry
from sigmix.experts.expert import Expert
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

    A thread must not enter it twice, nor call what takes the turnstile while it has entered.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.turnstile = Turnstile()
        super().__init__(*args, **kwargs)

    def z(self, mix: Mix) -> dict[str, torch.Tensor]:
        """See `Engine.z`; an expert is checked against the base's own weights, which no other thread may have moved."""
        with self.turnstile:
            return super().z(mix)

    def check(self, expert: Expert) -> None:
        """Check an expert that is in no bank yet; see `Expert.check`."""
        with self.turnstile:
            expert.check(self.model)

    def known_beginning(self, ids: Sequence[int], mix: Mix, form: str | None = None) -> StoredPrefix | None:
        """See `Engine.known_beginning`."""
        with self.turnstile:
            return super().known_beginning(ids, mix, form)

    def keep_beginning(self, ids: Sequence[int], mix: Mix, entry: Entry, form: str | None = None) -> None:
        """See `Engine.keep_beginning`."""
        with self.turnstile:
            super().keep_beginning(ids, mix, entry, form)

    @contextmanager
    def _turn_of(self, mixes: list[Mix], form: str | None) -> Iterator[tuple[Any, int]]:
        with self.turnstile, super()._turn_of(mixes, form) as entered:
            yield entered
