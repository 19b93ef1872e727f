"""Connections whose clients are too slow to be waited for."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


def patient(seconds: float) -> type[H11Protocol]:
    """A protocol that gives up connections on which nothing has moved for ``seconds``, or for twice as long at most.

    uvicorn itself waits for ever for a request's head, and for a client that does not read its answer. Between those
    two it is the application that a client waits for; that is left alone, and bodies have a limit of their own
    (`access.Gate`).
    """

    class Patient(H11Protocol):
        _tick: asyncio.TimerHandle | None = None
        _before: Any = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            found = transport.get_extra_info("socket")
            if found is not None and found.family in (socket.AF_INET, socket.AF_INET6):
                # asyncio does so only where a socket names its protocol; else an answer's body waits 40 ms for an ACK
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._tick = self.loop.call_later(seconds, self._look)

        def connection_lost(self, exc: Exception | None) -> None:
            if self._tick is not None:
                self._tick.cancel()
            super().connection_lost(exc)

        def _look(self) -> None:
            waits = self.cycle is None or self.cycle.response_complete
            stuck = self.flow.write_paused
            now = (id(self.cycle), waits, stuck, self.transport.get_write_buffer_size() if stuck else 0)
            if (waits or stuck) and now == self._before:
                self.transport.abort()
                return
            self._before = now
            self._tick = self.loop.call_later(seconds, self._look)

    return Patient
