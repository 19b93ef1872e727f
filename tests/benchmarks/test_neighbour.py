"""Decoding beside a busy core."""

from __future__ import annotations

import pytest

from benchmarks import neighbour
from sigmix.errors import SigmixError

SOME = {name: neighbour.SETTINGS[name] for name in ("default", "spin_0")}


def test_ratios_are_to_the_default_alone(monkeypatch):
    environments = []

    def fake(environment, options):
        environments.append(environment)
        speed = 100.0 if environment else 50.0
        return {"alone_1": speed, "beside_1": speed / 4, "alone_8": 4 * speed, "beside_8": speed}

    monkeypatch.setattr(neighbour, "measure", fake)
    result = neighbour.run(repeats=2, settings=SOME)
    assert environments == [SOME["default"], SOME["spin_0"]] * 2  # the settings take turns
    medians = {name: value["median"] for name, value in result["ratios"].items()}
    assert medians == {
        "default_beside_1_vs_default_alone": 0.25,
        "default_beside_8_vs_default_alone": 0.25,
        "spin_0_alone_1_vs_default_alone": 2.0,
        "spin_0_beside_1_vs_default_alone": 0.5,
        "spin_0_alone_8_vs_default_alone": 2.0,
        "spin_0_beside_8_vs_default_alone": 0.5,
    }
    assert result["raw"]["median_tokens_per_second"]["spin_0"]["alone_8"] == 400.0
    assert result["raw"]["settings"]["spin_0"] == {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "0"}


@pytest.mark.slow
def test_a_child_that_fails_is_named(tmp_path):
    with pytest.raises(SigmixError, match="GOMP_SPINCOUNT"):
        neighbour.measure(SOME["spin_0"], {"base": str(tmp_path), "dtype": "float32", "new_tokens": 2})


@pytest.mark.slow
def test_every_setting_runs_in_a_child(model_folder, cache):
    result = neighbour.run(repeats=1, base=str(model_folder), new_tokens=2, settings=SOME)
    assert all(value["median"] > 0 for value in result["ratios"].values())
