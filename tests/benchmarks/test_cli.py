"""`python -m benchmarks`."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import benchmarks as package
from benchmarks.__main__ import app
from benchmarks.harness import Aim, device, report
from sigmix.errors import ConfigError, UnknownNameError


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(app, [*arguments])


def test_the_list(run):
    shown = run("--list").stdout
    assert all(name in shown for name in package.BENCHES)
    assert json.loads(run("--list", "--json").stdout) == package.BENCHES


def test_an_unknown_name_and_none(run):
    assert isinstance(run("decomposition").exception, UnknownNameError)
    assert isinstance(run().exception, ConfigError)


def test_options_reach_the_bench_and_the_report_is_printed(run, monkeypatch):
    given = {}

    def fake(name, **options):
        given.update(options, name=name)
        return report(name, device(), {"speedup": [2.0]}, {"speedup": Aim(">=", 1.0)}, {})

    monkeypatch.setattr(package, "run", fake)
    out = run("decompose", "--json", "--repeats", "2", "--dtype", "float32").stdout
    assert json.loads(out)["met"] == {"speedup": True}
    assert given == {"name": "decompose", "repeats": 2, "dtype": "float32"}
    assert "speedup: 2 (2 to 2), aim >= 1: met" in run("decompose").stdout
