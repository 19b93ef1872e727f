"""Background few-shot searches (strategy C), one at a time, interleaved with decoding steps."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from sigmix.adapt import Example, FewShotSearch
from sigmix.engine.cpu.openmp import release_thread_pool
from sigmix.errors import ConfigError, SigmixError, UnknownNameError
from sigmix.serve.fair_queue import QueueFullError
from sigmix.serve.protocol.requests import AdaptRequest
from sigmix.serve.registry import ModelRegistry
from sigmix.serve.scheduler import SharedEngine

log = logging.getLogger("sigmix.serve")

Grader = Callable[[str, str], float]  # (reply, reference answer) -> score in [0, 1]

MAX_QUEUED, MAX_QUEUED_PER_CLIENT, MAX_FINISHED = 8, 2, 256
"""Queued searches, queued searches per client, and finished searches that are kept."""

BATCH_SIZE = 32  # rows per pass of a search: running requests wait for at most one pass


class _Cancelled(Exception):
    pass


@dataclass(eq=False)
class Adaptation:
    """One search, of an administrator if ``client`` is None; ``trace`` has an entry per round of at most ``rounds``."""

    id: str
    request: AdaptRequest
    client: str | None
    name: str
    status: Literal["waiting", "running", "done", "failed", "cancelled"] = "waiting"
    rounds: int = 0
    trace: list[dict[str, Any]] = field(default_factory=list)
    mix: dict[str, Any] | None = None
    evidence: dict[str, Any] | None = None
    error: str | None = None
    created: float = field(default_factory=time.time)

    @property
    def active(self) -> bool:
        """True if the search is queued or running."""
        return self.status in ("waiting", "running")

    def to_json(self) -> dict[str, Any]:
        """Return the API's representation."""
        best = self.trace[-1]["best"] if self.trace else None
        return {
            "id": self.id, "object": "sigmix.adaptation", "created": int(self.created), "name": self.name,
            "status": self.status, "examples": len(self.request.examples),
            "progress": {"round": len(self.trace), "rounds": self.rounds, "best": best},
            "trace": self.trace, "mix": self.mix, "evidence": self.evidence, "error": self.error,
        }  # fmt: skip


class AdaptationWorker:
    """Thread that runs searches and saves their mixtures.

    Args:
        engine: shared with the scheduler.
        registry: receives the mixtures.
        graders: by name.
    """

    def __init__(self, engine: SharedEngine, registry: ModelRegistry, graders: Mapping[str, Grader]) -> None:
        self.engine, self.registry, self.graders = engine, registry, dict(graders)
        self._adaptations: dict[str, Adaptation] = {}  # oldest first
        self._lock = threading.RLock()
        self._closed = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sigmix-adaptation")

    def close(self) -> None:
        """Cancel all searches and stop the thread."""
        with self._lock:
            self._closed = True
            for adaptation in self._adaptations.values():
                self.cancel(adaptation)
        self._thread.shutdown(cancel_futures=True)

    def submit(self, request: AdaptRequest, client: str | None) -> Adaptation:
        """Queue a search of a client; None: an administrator.

        Raises:
            UnknownNameError: unknown grader.
            ConfigError, ExpertError: no experts, an answer that no reply can match, or see
                `ModelRegistry.check_mix_name`.
            QueueFullError: too many queued searches.
        """
        if request.score not in self.graders:
            raise UnknownNameError("grader", request.score, self.graders)
        for number, example in enumerate(request.examples):
            grade = self.graders[request.score]
            if grade(example.answer, example.answer) < 1 or grade("", example.answer):
                raise ConfigError(f"examples[{number}]: no reply can match the answer {example.answer[:40]!r}")
        if not len(self.registry):
            raise ConfigError("no experts to mix", remedy="POST /v1/experts loads one")
        id = f"adapt-{uuid.uuid4().hex}"
        adaptation = Adaptation(id, request, client, request.name or f"adapted-{id[-8:]}")
        self.registry.check_mix_name(adaptation.name, client)
        with self._lock:
            queued = [other.client for other in self._adaptations.values() if other.status == "waiting"]
            per_client = client is not None and queued.count(client) >= MAX_QUEUED_PER_CLIENT
            if per_client or self._closed or len(queued) >= MAX_QUEUED:
                raise QueueFullError(per_client)
            self._adaptations[id] = adaptation
            finished = [other.id for other in self._adaptations.values() if not other.active]
            for old in finished[: max(len(finished) - MAX_FINISHED, 0)]:
                del self._adaptations[old]
            self._thread.submit(self._run, adaptation)
        return adaptation

    def get(self, id: str, client: str | None) -> Adaptation:
        """Return a search of a client; None: of any client.

        Raises:
            UnknownNameError: no such search.
        """
        adaptation = self._adaptations.get(id)
        if adaptation is None or client not in (None, adaptation.client):
            raise UnknownNameError("adaptation", id, [])
        return adaptation

    def cancel(self, adaptation: Adaptation) -> None:
        """Stop a search after its current pass."""
        with self._lock:
            if adaptation.active:
                adaptation.status = "cancelled"

    def _run(self, adaptation: Adaptation) -> None:
        with self._lock:
            if adaptation.status != "waiting":
                return
            adaptation.status = "running"
        try:
            self._search(adaptation)
        except _Cancelled:
            pass
        except SigmixError as error:
            adaptation.status, adaptation.error = "failed", str(error)
        except Exception:
            log.exception("adaptation failed")
            adaptation.status, adaptation.error = "failed", "internal server error"
        finally:
            release_thread_pool()

    def _search(self, adaptation: Adaptation) -> None:
        request, grader = adaptation.request, self.graders[adaptation.request.score]

        def score(example: Example, reply: str) -> float:
            if adaptation.status == "cancelled":
                raise _Cancelled
            return grader(reply, example.gold)

        search = FewShotSearch(
            self.engine, [Example(example.prompt, example.answer) for example in request.examples], score,
            batch_size=BATCH_SIZE, progress=adaptation.trace.append, max_new_tokens=request.max_tokens,
            **request.model_dump(include={"method", "settings", "granularity", "seed"}),
        )  # fmt: skip
        adaptation.rounds = search.limits["iterations"]
        mix, evidence = search.fit(), search.evidence()
        metadata = {"made_by": "adapt", "examples": len(request.examples), "accuracy": evidence["accuracy"]}
        with self._lock:
            if adaptation.status == "cancelled":
                return
            self.registry.save_mix(adaptation.name, mix, metadata, adaptation.client)
            adaptation.mix, adaptation.evidence = {"id": mix.id, **mix.to_json()}, evidence
            adaptation.status = "done"
