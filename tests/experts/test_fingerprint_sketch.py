"""A sketch notices another basis, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sigmix.errors import ExpertError
from sigmix.experts.fingerprint import PROBES, TOLERANCE, Sketch, compare, deviation, probes, sketch
from sigmix.svf.decomposition import decompose

FIRST = [-1.3500489312345667, 0.8868029944714887]
PATH = "model.layers.0.mlp.up_proj"


def near_equal(rows: int, columns: int):
    """A weight whose singular values 3 and 4 differ by 1e-7, its factors, and a z that differs there."""
    generator = torch.Generator().manual_seed(5)
    r = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, r, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(columns, r, generator=generator, dtype=torch.float64))[0]
    s = torch.linspace(2, 0.5, r, dtype=torch.float64)
    s[4] = s[3] * (1 - 1e-7)
    weight = (u * s) @ v.T
    z = 1 + 0.4 * (torch.rand(r, generator=generator) - 0.5)
    z[3], z[4] = 1.3, 0.8
    return weight, decompose(weight), z


def turned(factors, degrees: float):
    angle = torch.tensor(degrees).deg2rad()
    short = factors.short.clone()
    short[:, 3] = factors.short[:, 3] * angle.cos() + factors.short[:, 4] * angle.sin()
    short[:, 4] = factors.short[:, 4] * angle.cos() - factors.short[:, 3] * angle.sin()
    return replace(factors, short=short)


SHAPES = pytest.mark.parametrize("rows,columns", [(48, 20), (20, 48), (32, 32)])


@SHAPES
def test_values_are_probes_of_the_dense_delta(rows, columns):
    weight, factors, z = near_equal(rows, columns)
    u, s, v = factors.usv(weight)
    delta = (u.double() * s * (z.double() - 1)) @ v.double().T
    left, right = probes(PATH, rows, columns)
    found = sketch(PATH, weight, factors, z)
    torch.testing.assert_close(
        torch.tensor(found.values).double(), ((left @ delta) * right).sum(1), rtol=1e-5, atol=1e-6
    )
    assert found.norm == pytest.approx(float(delta.norm()), rel=1e-5)


@SHAPES
@pytest.mark.parametrize("degrees", [90, 45, 5])
def test_a_rotation_of_near_equal_singular_vectors_is_caught(rows, columns, degrees):
    weight, factors, z = near_equal(rows, columns)
    stored, found = (sketch(PATH, weight, f, z) for f in (factors, turned(factors, degrees)))
    with pytest.raises(ExpertError, match=rf"'math'.*{PATH}.*deviates by"):
        compare("math", PATH, stored, found)


@SHAPES
def test_a_rotation_among_equal_gains_is_no_change_and_passes(rows, columns):
    weight, factors, z = near_equal(rows, columns)
    z[4] = z[3]
    stored, found = (sketch(PATH, weight, f, z) for f in (factors, turned(factors, 45)))
    assert compare("math", PATH, stored, found) < 1e-6


@SHAPES
def test_signs_cancel(rows, columns):
    weight, factors, z = near_equal(rows, columns)
    signs = torch.ones(len(z))
    signs[::3] = -1
    flipped = replace(factors, short=factors.short * signs)
    assert deviation(*(sketch(PATH, weight, f, z) for f in (factors, flipped))) < 1e-12


def test_the_deviation_estimates_the_relative_error_of_the_delta():
    weight, factors, z = near_equal(48, 20)
    other = turned(factors, 45)
    deltas = [((weight @ f.short.double()) * (z.double() - 1)) @ f.short.double().T for f in (factors, other)]
    truth = float((deltas[0] - deltas[1]).norm() / deltas[0].norm())
    figures = [deviation(*(sketch(f"layer.{i}", weight, f, z) for f in (factors, other))) ** 2 for i in range(200)]
    assert np.mean(figures) ** 0.5 == pytest.approx(truth, rel=0.15)


def test_rounding_of_factors_to_float32_stays_far_below_the_tolerance():
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    factors = decompose(weight)
    z = 1 + 0.2 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    wide = torch.linalg.svd(weight.double(), full_matrices=False)  # another algorithm, in float64
    exact = replace(factors, short=wide.Vh.T.contiguous(), s=wide.S)
    assert deviation(sketch(PATH, weight, factors, z), sketch(PATH, weight, exact, z)) < TOLERANCE / 1000


def test_z_of_one_gives_zeros_and_matches_any_basis():
    weight, factors, z = near_equal(48, 20)
    stored = sketch(PATH, weight, factors, torch.ones_like(z))
    assert stored == Sketch(0.0, (0.0,) * PROBES)
    assert compare("math", PATH, stored, sketch(PATH, weight, turned(factors, 90), torch.ones_like(z))) == 0


def test_probes_are_standard_normal_and_depend_on_path_and_shape():
    left, right = probes(PATH, 3000, 2000)
    for side, n in ((left, 3000), (right, 2000)):
        assert side.shape == (PROBES, n)
        assert side.dtype == torch.float64
        assert float(side.mean()) == pytest.approx(0, abs=0.03)
        assert float(side.std()) == pytest.approx(1, abs=0.03)
        assert (side @ side.T / n - torch.eye(PROBES)).abs().max() < 0.12
    assert torch.equal(probes(PATH, 3000, 2000)[0], left)
    assert not torch.equal(probes("another", 3000, 2000)[0], left)
    # part of the file format: another stream would make every stored sketch wrong
    assert probes("a", 2, 3)[0][0].tolist() == pytest.approx(FIRST, abs=1e-12)


def test_json_keeps_every_bit_and_refuses_what_is_no_sketch():
    weight, factors, z = near_equal(48, 20)
    stored = sketch(PATH, weight, factors, z)
    assert Sketch.from_json(stored.to_json()) == stored
    for bad in ({}, {"norm": 1}, {"norm": 1, "values": [1.0]}, {"norm": "x", "values": [0] * 8}):
        with pytest.raises(ExpertError, match="sketch"):
            Sketch.from_json(bad)
