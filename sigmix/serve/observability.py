"""Prometheus metrics and structured logs. Prompts, replies and API keys are never logged."""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from sigmix.serve.upstream import Upstream

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)

MAX_MIX_LABELS = 50  # mixtures with their own time series; others are counted together, to bound memory


class Metrics:
    """Metrics of one server, in a registry of its own.

    Args:
        load: returns (running sequences, queued requests).
    """

    def __init__(self, load: Callable[[], tuple[int, int]]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "sigmix_requests", "HTTP requests by route and status.", ["route", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "sigmix_request_seconds", "Duration of HTTP requests.", ["route"], buckets=SECONDS, registry=registry
        )
        self.queue_seconds = Histogram("sigmix_queue_seconds", "Time in the queue.", buckets=SECONDS, registry=registry)
        self.first_token_seconds = Histogram(
            "sigmix_first_token_seconds", "Time to first token.", buckets=SECONDS, registry=registry
        )
        self.batch_size = Histogram("sigmix_batch_rows", "Sequences per step.", buckets=SIZES, registry=registry)
        self.batch_mixes = Histogram("sigmix_batch_mixes", "Mixtures per step.", buckets=SIZES, registry=registry)
        self.tokens = Counter("sigmix_tokens", "Prompt and generated tokens.", ["kind"], registry=registry)
        self.mixes = Counter("sigmix_mix_requests", "Requests by mixture.", ["mix"], registry=registry)
        self.feedback = Counter("sigmix_feedback", "Rewards by sign.", ["sign"], registry=registry)
        self.upstream_requests = Counter(
            "sigmix_upstream_requests", "Requests sent to an upstream.", ["upstream"], registry=registry
        )
        self.upstream_failures = Counter(
            "sigmix_upstream_failures", "Requests without an answer, with a cut one, or with status 5xx.", ["upstream"],
            registry=registry,
        )  # fmt: skip
        Gauge("sigmix_rows", "Running sequences.", registry=registry).set_function(lambda: load()[0])
        Gauge("sigmix_waiting", "Queued requests.", registry=registry).set_function(lambda: load()[1])
        self._upstream_healthy = Gauge(
            "sigmix_upstream_healthy", "1 if an upstream receives requests.", ["upstream"], registry=registry
        )
        self._upstream_in_flight = Gauge(
            "sigmix_upstream_in_flight", "Unanswered requests of an upstream.", ["upstream"], registry=registry
        )
        self._mix_labels: set[str] = set()

    def on_start(self, mix_id: str, prompt_tokens: int, queue_seconds: float) -> None:
        """Record a request that leaves the queue."""
        self.queue_seconds.observe(queue_seconds)
        self.tokens.labels("prompt").inc(prompt_tokens)
        if len(self._mix_labels) < MAX_MIX_LABELS:
            self._mix_labels.add(mix_id)
        self.mixes.labels(mix_id if mix_id in self._mix_labels else "(others)").inc()

    def watch_upstream(self, upstream: Upstream) -> None:
        """Add the metrics of an upstream."""
        self.upstream_requests.labels(upstream.url)
        self.upstream_failures.labels(upstream.url)
        self._upstream_healthy.labels(upstream.url).set_function(lambda: not upstream.problem)
        self._upstream_in_flight.labels(upstream.url).set_function(lambda: upstream.in_flight)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


REQUEST_ID: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")

_RECORD_FIELDS = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time, level, logger, message, request id, and the fields of ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage(),
        }  # fmt: skip
        if REQUEST_ID.get():
            entry["request"] = REQUEST_ID.get()
        entry |= {key: value for key, value in vars(record).items() if key not in _RECORD_FIELDS}
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


class StderrHandler(logging.StreamHandler[TextIO]):
    """Handler that resolves `sys.stderr` for each record: it may be replaced or closed while threads still log."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """Current standard error."""
        return sys.stderr


def configure_logging(level: str, format: str) -> None:
    """Send the logs of sigmix and uvicorn to stderr.

    Args:
        level: debug, info, warning or error.
        format: "json" or "text".
    """
    handler = StderrHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s")
    handler.setFormatter(JsonFormatter() if format == "json" else text)
    for name in ("sigmix", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
