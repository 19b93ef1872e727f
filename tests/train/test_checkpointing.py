"""Metrics on disk survive what a crash or a diverged step leaves behind."""

from __future__ import annotations

import json

from sigmix.train.checkpointing import RunDir


def test_a_torn_last_line_is_left_out_and_does_not_stop_a_resume(tmp_path):
    run = RunDir(tmp_path)
    for step in range(3):
        run.log({"kind": "step", "step": step, "loss": 0.5})
    with open(run.metrics, "a") as file:
        file.write('{"kind": "step", "st')
    assert [entry["step"] for entry in run.history()] == [0, 1, 2]
    run.forget_after(2)
    run.log({"kind": "step", "step": 2, "loss": 0.25})
    assert [(entry["step"], entry["loss"]) for entry in run.history()] == [(0, 0.5), (1, 0.5), (2, 0.25)]


def test_what_is_not_finite_is_null(tmp_path):
    run = RunDir(tmp_path)
    run.log({"kind": "step", "step": 0, "loss": float("nan"), "grad_norm": float("inf"), "kl": 0.5})
    line = json.loads(run.metrics.read_text(), parse_constant=lambda name: f"not JSON: {name}")
    assert (line["loss"], line["grad_norm"], line["kl"]) == (None, None, 0.5)
