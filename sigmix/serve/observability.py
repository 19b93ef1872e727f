"""Prometheus metrics, in a registry of each server's own."""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sigmix.serve.scheduler import Job

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


MIXES = 50
"""Mixes with a label of their own; more are counted together, so that clients cannot fill the memory with names."""


class Metrics:
    """What a server counts.

    Args:
        load: called for (rows under way, requests that wait).
    """

    def __init__(self, load: Callable[[], tuple[int, int]]) -> None:
        self.registry = made = CollectorRegistry()
        self.requests = Counter("sigmix_requests", "Requests by route and status.", ["route", "status"], registry=made)
        self.seconds = Histogram(
            "sigmix_request_seconds", "Seconds of a request.", ["route"], buckets=SECONDS, registry=made
        )
        self.waited = Histogram(
            "sigmix_queue_seconds", "Seconds that a request waited.", buckets=SECONDS, registry=made
        )
        self.first = Histogram(
            "sigmix_first_token_seconds", "Seconds to the first token.", buckets=SECONDS, registry=made
        )
        self.batch = Histogram("sigmix_batch_rows", "Answers that shared a step.", buckets=ROWS, registry=made)
        self.distinct = Histogram("sigmix_batch_mixes", "Mixes that shared a step.", buckets=ROWS, registry=made)
        self.tokens = Counter("sigmix_tokens", "Tokens read and written.", ["kind"], registry=made)
        self.mixes = Counter("sigmix_mix_requests", "Requests by the mix that answered.", ["mix"], registry=made)
        self.feedback = Counter("sigmix_feedback", "Rewards by sign.", ["sign"], registry=made)
        Gauge("sigmix_rows", "Answers under way.", registry=made).set_function(lambda: load()[0])
        Gauge("sigmix_waiting", "Requests that wait.", registry=made).set_function(lambda: load()[1])
        self._known: set[str] = set()

    def stepped(self, rows: int, tokens: int, waiting: int, mixes: int) -> None:
        """A step of the batch."""
        self.batch.observe(rows)
        self.distinct.observe(mixes)
        self.tokens.labels("written").inc(tokens)

    def started(self, job: Job, waited: float) -> None:
        """A request is under way."""
        self.waited.observe(waited)
        self.tokens.labels("read").inc(len(job.ids))
        mix = "" if job.mix is None else job.mix.id
        if mix not in self._known and len(self._known) >= MIXES:
            mix = "(others)"
        self._known.add(mix)
        self.mixes.labels(mix).inc()

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


# --- Structured logs: one JSON object a line, with the request's id. No prompt, answer or key is ever logged.


REQUEST: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="")


OWN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonLines(logging.Formatter):
    """A record as JSON: time, level, logger, message, request id, and what was given as ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage(),
        }  # fmt: skip
        if REQUEST.get():
            line["request"] = REQUEST.get()
        line |= {key: value for key, value in vars(record).items() if key not in OWN}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def set_up(level: str, form: str) -> None:
    """Send the logs of this package and of uvicorn to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonLines() if form == "json" else logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s")
    )
    for name in ("sigmix", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
