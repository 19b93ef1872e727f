"""The fine-tuning benchmark on a tiny base: a server, a job that trains beside its requests, and the figures."""

from __future__ import annotations

from collections import Counter

import pytest
from helpers_fine_tuning import save_base

from benchmarks import fine_tuning


def test_rows_have_as_many_requests_of_each_task():
    found = fine_tuning.rows(21)
    assert Counter(row["label"] for row in found) == dict.fromkeys(fine_tuning.TASKS, 3)
    assert len({row["text"] for row in found}) == 21
    assert found == fine_tuning.rows(21)
    assert len(fine_tuning.rows(1000)) == 1000


@pytest.mark.slow
def test_the_figures_are_those_of_a_server_that_trains(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # compiling takes minutes
    monkeypatch.setenv("SIGMIX_SERVE_LOG_LEVEL", "warning")  # which the benchmark sets
    (tmp_path / "bank").mkdir()
    monkeypatch.setenv("SIGMIX_SERVE_BANK", str(tmp_path / "bank"))  # the bundled experts are of another base
    base = str(save_base(tmp_path / "tiny-llama"))
    options = {"clients": 2, "new_tokens": 16, "count": 1000, "minutes": 0.4}
    result = fine_tuning.run(repeats=1, dtype="float32", base=base, **options)
    assert result["bench"] == "fine-tuning"
    assert result["device"]["dtype"] == "float32"
    raw = result["raw"]
    assert {name: raw[name] for name in ("base", "clients", "rows", "training_minutes", "compiled")} == {
        "base": base, "clients": 2, "rows": 1000, "training_minutes": 0.4, "compiled": False
    }  # fmt: skip
    rates = raw["pieces_per_second"]
    assert rates.keys() == raw["latency"].keys() == {"at_rest", "while_training", "after"}
    assert all(len(values) == 1 and min(values) > 0 for values in rates.values())
    for name, state in (("tokens_while_training", "while_training"), ("tokens_after", "after")):
        values = [one / other for one, other in zip(rates[state], rates["at_rest"], strict=True)]
        assert raw["ratios_by_repeat"][name] == pytest.approx(values)
        assert result["ratios"][name]["min"] == pytest.approx(min(values))
    assert result["met"] == {"tokens_while_training": result["ratios"]["tokens_while_training"]["median"] >= 0.5}
    job = raw["job"]
    assert sum(job["data"].values()) == 1000
    assert job["verdict"]
    assert job["test"]["n"] == job["data"]["test"]
    assert raw["seconds_from_upload_to_first_token"] > job["seconds"] > 0
