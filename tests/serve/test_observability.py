"""Metrics and logs."""

from __future__ import annotations

import io
import json
import logging
import sys

from sigmix.serve.observability import MAX_MIX_LABELS, Metrics, configure_logging


def test_json_lines(capsys):
    configure_logging("info", "json")
    log = logging.getLogger("sigmix.serve")
    log.debug("hidden")
    log.info("request", extra={"status": 200})
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("failed")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["level"], first["message"], first["status"]) == ("info", "request", 200)
    assert "ValueError: broken" in second["error"]


def test_records_follow_a_replaced_stderr(monkeypatch):
    closed, current = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", closed)
    configure_logging("info", "text")
    monkeypatch.setattr(sys, "stderr", current)
    closed.close()
    logging.getLogger("sigmix.serve").info("later")
    assert "later" in current.getvalue()
    assert "Logging error" not in current.getvalue()


def test_the_number_of_mixture_labels_is_bounded():
    metrics = Metrics(lambda: (0, 0))
    for number in range(2 * MAX_MIX_LABELS):
        metrics.on_start(f"math:{number}", 3, 0.1)
    text = metrics.text().decode()
    assert text.count("sigmix_mix_requests_total{") == MAX_MIX_LABELS + 1
    assert f'mix="(others)"}} {float(MAX_MIX_LABELS)}' in text
