"""Background searches: cancellation, failures, limits."""

from __future__ import annotations

import threading

import pytest
from helpers_serve import TIMEOUT, bank, make_service, wait_until

from sigmix.errors import ConfigError, UnknownNameError
from sigmix.serve import adaptation as adaptation_module
from sigmix.serve.fair_queue import QueueFullError
from sigmix.serve.protocol.requests import AdaptRequest

pytestmark = pytest.mark.usefixtures("cache")
EXAMPLES = [{"prompt": "one", "answer": "two"}]


def request(**options) -> AdaptRequest:
    return AdaptRequest(**{"examples": EXAMPLES, **options})


@pytest.fixture
def service(tmp_path):
    service = make_service(tmp_path)
    yield service
    service.adaptations.close()
    service.close()


def held_grader(service) -> tuple[threading.Event, threading.Event]:
    """Replace the grader by one that blocks: (set once it is called, to be set to release it)."""
    called, release = threading.Event(), threading.Event()

    def grade(reply: str, reference: str) -> float:
        if reply in ("", reference):  # the check of the examples
            return float(reply == reference)
        called.set()
        release.wait(TIMEOUT)
        return 0.0

    service.adaptations.graders["exact"] = grade
    return called, release


def test_a_cancelled_search_saves_nothing(service):
    called, release = held_grader(service)
    running = service.adaptations.submit(request(name="running"), None)
    queued = service.adaptations.submit(request(name="queued"), None)
    assert called.wait(TIMEOUT)
    assert (running.status, queued.status) == ("running", "waiting")
    for adaptation in (running, queued):
        service.adaptations.cancel(adaptation)
    release.set()
    service.adaptations.close()
    assert (running.status, queued.status) == ("cancelled", "cancelled")
    assert service.registry.mixes == {}


def test_a_failed_search_reports_its_error(service, monkeypatch):
    def fail(*args, **kwargs):
        raise ConfigError("no good")

    monkeypatch.setattr(adaptation_module, "FewShotSearch", fail)
    failed = service.adaptations.submit(request(), None)
    wait_until(lambda: failed.status == "failed")
    assert "no good" in failed.to_json()["error"]


def test_invalid_searches(tmp_path, service):
    with pytest.raises(UnknownNameError) as error:
        service.adaptations.submit(request(score="none"), None)
    assert "exact" in str(error.value)
    service.adaptations.graders["number"] = lambda reply, gold: float(reply == gold and reply.isdigit())
    examples = [{"prompt": "one", "answer": "1"}, {"prompt": "two", "answer": "two"}]
    with pytest.raises(ConfigError, match=r"examples\[1\]"):
        service.adaptations.submit(request(examples=examples, score="number"), None)
    with pytest.raises(ConfigError) as error:
        service.adaptations.submit(request(name=next(iter(bank()))), None)
    assert "math" in str(error.value)
    empty = make_service(tmp_path / "empty", experts={})
    with pytest.raises(ConfigError):
        empty.adaptations.submit(request(), None)
    empty.close()


def test_limits_and_visibility(service):
    called, release = held_grader(service)
    first = service.adaptations.submit(request(), "alice")
    assert called.wait(TIMEOUT)
    for _ in range(adaptation_module.MAX_QUEUED_PER_CLIENT):
        service.adaptations.submit(request(), "alice")
    with pytest.raises(QueueFullError) as full:
        service.adaptations.submit(request(), "alice")
    assert full.value.per_client
    assert service.adaptations.get(first.id, "alice") is service.adaptations.get(first.id, None) is first
    with pytest.raises(UnknownNameError):
        service.adaptations.get(first.id, "bob")
    service.adaptations.cancel(first)
    release.set()


def test_no_searches_after_closing(service):
    service.adaptations.close()
    with pytest.raises(QueueFullError):
        service.adaptations.submit(request(), None)
