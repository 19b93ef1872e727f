"""The large matrix has the spectrum that it should have, and errors are measured, not assumed."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks import decompose as bench
from sigmix.errors import ConfigError


@pytest.mark.parametrize("shape", [(24, 60), (60, 24)])
def test_the_matrix_has_the_given_singular_values_and_dense_vectors(shape):
    s = bench.stretch(torch.tensor([9.0, 3.0, 1.0, 0.05]), 24)
    weight = bench.with_spectrum(shape, s)
    u, found, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(found, s, rtol=1e-5, atol=1e-6)
    assert u[:, 0].abs().max() < 0.8
    assert vt[0].abs().max() < 0.8


def test_a_stretched_spectrum_keeps_its_ends_and_its_decay():
    s = torch.tensor([8.0, 2.0, 0.5])
    found = bench.stretch(s, 5)
    torch.testing.assert_close(found, torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5], dtype=torch.float64))


def test_errors_see_a_wrong_factor():
    s = bench.stretch(torch.tensor([9.0, 3.0, 1.0]), 24)
    weight = bench.with_spectrum((24, 60), s)
    u, found, v = bench.lapack(weight)
    good = bench.errors(weight, (u, found, v), s)
    assert max(good.values()) < 1e-5
    assert bench.errors(weight, (u, found * 1.01, v), s)["reconstruction"] == pytest.approx(0.01, rel=1e-3)
    assert bench.errors(weight, (u, found * 1.01, v), s)["singular_values"] == pytest.approx(0.01, rel=1e-3)
    assert bench.errors(weight, (u, found, v * 1.01), s)["orthogonality"] == pytest.approx(0.0201, rel=1e-3)


def test_the_whole_report_on_a_tiny_model_leaves_the_users_cache_alone(model_folder, cache):
    result = bench.run(repeats=2, base=str(model_folder), large=(40, 120))
    assert set(result["ratios"]) == {"speedup_large", "error_ratio_large"}
    assert set(result["met"]) == {"speedup_large", "error_ratio_large", "warm_seconds"}
    large, base = result["raw"]["large"], result["raw"]["base"]
    assert large["spectrum_of"].endswith("down_proj")  # wide, as the large matrix is
    assert len(large["seconds"]["sigmix"]) == len(large["seconds"]["torch"]) == 2
    assert large["errors"]["sigmix"]["reconstruction"] < 1e-5
    assert base["matrices"] == 14
    assert len(base["cold_seconds"]) == 2
    assert len(base["warm_seconds_by_read"]) == 2 * bench.WARM_READS
    assert not (cache / "svd").exists()
    assert os.environ["SIGMIX_CACHE"] == str(cache)


def test_another_dtype_is_refused():
    with pytest.raises(ConfigError, match="float32"):
        bench.run(dtype="bfloat16")
