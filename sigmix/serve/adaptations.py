"""Few-shot searches in the background, one at a time, between the steps of the batch (strategy C)."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sigmix.adapt import Example, FewShotSearch
from sigmix.errors import ConfigError, SigmixError, UnknownNameError
from sigmix.serve.catalogue import Catalogue
from sigmix.serve.fair import QueueFull
from sigmix.serve.turnstile import SharedEngine

log = logging.getLogger("sigmix.serve")
Judge = Callable[[str, str], float]
"""(reply, right answer) -> how right the reply is, in [0, 1]."""
WAITING, EACH, REMEMBERED = 8, 2, 256
"""Searches that wait in all, and of one client; searches that are remembered."""
BATCH = 32
"""Rows of a search's pass: the answers under way wait for one at most."""


@dataclass(eq=False)
class Adaptation:
    """One search.

    Attributes:
        state: "waiting", "running", "done", "failed" or "cancelled". trace: the search's, round by round.
        rounds: that it has at most. mix: what was found, saved under ``name``.
    """

    id: str
    client: str | None
    name: str
    examples: Sequence[Example]
    judge: Judge
    options: Mapping[str, Any]
    state: str = "waiting"
    rounds: int = 0
    trace: list[dict[str, Any]] = field(default_factory=list)
    mix: dict[str, Any] | None = None
    evidence: dict[str, Any] | None = None
    error: str | None = None
    made: float = field(default_factory=time.time)

    def to_json(self) -> dict[str, Any]:
        """As clients see it."""
        last = self.trace[-1] if self.trace else None
        return {
            "id": self.id, "object": "sigmix.adaptation", "created": int(self.made), "name": self.name,
            "status": self.state, "examples": len(self.examples),
            "progress": {"round": len(self.trace), "rounds": self.rounds, "best": last and last["best"]},
            "trace": self.trace, "mix": self.mix, "evidence": self.evidence, "error": self.error,
        }  # fmt: skip


class _Cancelled(Exception):
    pass


class Adaptations:
    """The thread that searches.

    Args:
        engine: shared with the batcher. catalogue: where mixes are saved. judges: by name.
    """

    def __init__(self, engine: SharedEngine, catalogue: Catalogue, judges: Mapping[str, Judge]) -> None:
        self.engine, self.catalogue, self.judges = engine, catalogue, dict(judges)
        self._queue: queue.Queue[Adaptation | None] = queue.Queue()
        self._known: OrderedDict[str, Adaptation] = OrderedDict()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._loop, name="sigmix-adaptations", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """End: what is under way is cancelled."""
        for found in list(self._known.values()):
            self.cancel(found)
        self._queue.put(None)
        self._thread.join()

    def submit(
        self, id: str, client: str | None, name: str, pairs: Sequence[tuple[str, str]], score: str, **options: Any
    ) -> Adaptation:
        """Queue a search for a client (None: an administrator); ``options`` are those of `FewShotSearch`.

        Raises:
            UnknownNameError: no such way to judge. QueueFull: too many wait. ConfigError, ExpertError: the name.
        """
        if score not in self.judges:
            raise UnknownNameError("way to judge replies", score, self.judges)
        if not len(self.catalogue):
            raise ConfigError("there are no experts to mix", remedy="load some first")
        self.catalogue.check_free(name, client)
        made = Adaptation(id, client, name, [Example(*pair) for pair in pairs], self.judges[score], options)
        with self._lock:
            waiting = [one for one in self._known.values() if one.state == "waiting"]
            own = client is not None and sum(one.client == client for one in waiting) >= EACH
            if own or len(waiting) >= WAITING:
                raise QueueFull(own)
            self._known[id] = made
            for old in [key for key, one in self._known.items() if one.state not in ("waiting", "running")]:
                if len(self._known) <= REMEMBERED:
                    break
                del self._known[old]
        self._queue.put(made)
        return made

    def get(self, id: str, client: str | None) -> Adaptation:
        """A search by its id; a client sees its own (None: all).

        Raises:
            UnknownNameError: there is none.
        """
        found = self._known.get(id)
        if found is None or client not in (None, found.client):
            raise UnknownNameError("adaptation", id, [])
        return found

    def cancel(self, found: Adaptation) -> None:
        """End a search after the pass that it is in."""
        if found.state in ("waiting", "running"):
            found.state = "cancelled"

    def _loop(self) -> None:
        while (job := self._queue.get()) is not None:
            if job.state != "waiting":
                continue
            job.state = "running"
            try:
                self._run(job)
            except _Cancelled:
                pass
            except SigmixError as error:
                job.state, job.error = "failed", str(error)
            except Exception:
                log.exception("an adaptation failed")
                job.state, job.error = "failed", "the server failed on this search"

    def _run(self, job: Adaptation) -> None:
        def judge(example: Example, reply: str) -> float:
            if job.state == "cancelled":
                raise _Cancelled
            return job.judge(reply, example.gold)

        search = FewShotSearch(
            self.engine, job.examples, judge, batch_size=BATCH, progress=job.trace.append, **job.options
        )
        job.rounds = search.limits["iterations"]
        mix = search.fit()
        evidence = search.evidence()
        about = {"made_by": "adapt", "examples": len(job.examples), "accuracy": evidence["accuracy"]}
        self.catalogue.save_mix(job.name, mix, about, job.client)
        job.mix, job.evidence = {"id": mix.id, **mix.to_json()}, evidence
        job.state = "done"
