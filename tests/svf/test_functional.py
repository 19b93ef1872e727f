"""Mixing of gains and the reference parameterization, against their definitions."""

from __future__ import annotations

import pytest
import torch

from sigmix.errors import ConfigError
from sigmix.svf.functional import mix_z, reference_z

R = 12


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def zs() -> list[torch.Tensor]:
    return [1 + normal(R, seed=i, scale=0.4) for i in range(3)]


@pytest.mark.parametrize("one", [0, 1, 2])
def test_one_hot_gives_the_expert_bit_for_bit(zs, one):
    mixed = mix_z(zs, [float(i == one) for i in range(3)])
    assert torch.equal(mixed, zs[one])
    assert mixed.data_ptr() != zs[one].data_ptr(), "a copy: changing the mixture leaves the expert alone"
    assert torch.equal(mix_z([zs[one]], [1]), zs[one])


def test_one_hot_is_exact_where_one_plus_z_minus_one_would_round():
    z = torch.tensor([1e-9, 1 / 3, -3e-8, 1e-30])
    assert torch.equal(mix_z([z, z + 1], [1.0, 0.0]), z)


@pytest.mark.parametrize("alphas", [[0.0, 0.0, 0.0], [0, 0, 0], [-0.0, 0.0, 0.0]])
def test_all_zero_is_exactly_the_base(zs, alphas):
    assert torch.equal(mix_z(zs, alphas), torch.ones(R))


def test_an_expert_at_zero_counts_for_nothing_even_if_it_is_broken(zs):
    assert torch.equal(mix_z([zs[0], torch.full((R,), float("nan"))], [1.0, 0.0]), zs[0])


@pytest.mark.parametrize("alphas", [[0.7, 0.3, 0.0], [0.5, 0.5, 0.5], [1.0, 1.0, 0.0], [-1.0, 2.0, 0.25], [0.1, 0, 0]])
def test_gains_add(zs, alphas):
    expected = 1 + sum(a * (z.double() - 1) for a, z in zip(alphas, zs, strict=True))
    # summed in float64, so the only error is the rounding to float32
    assert torch.equal(mix_z(zs, alphas), expected.float())


def test_weights_that_sum_to_one_give_the_papers_interpolation(zs):
    expected = 0.2 * zs[0].double() + 0.5 * zs[1].double() + 0.3 * zs[2].double()
    assert torch.allclose(mix_z(zs, [0.2, 0.5, 0.3]).double(), expected, rtol=0, atol=1e-6)


def test_the_order_of_experts_does_not_matter(zs):
    forward, backward = mix_z(zs, [0.2, 0.5, 0.9]), mix_z(zs[::-1], [0.9, 0.5, 0.2])
    assert torch.allclose(forward, backward, rtol=0, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 2])
def test_a_weight_that_is_no_number(zs, bad, place):
    alphas = [0.0, 1.0, 0.0]
    alphas[place] = bad
    with pytest.raises(ConfigError, match="finite"):
        mix_z(zs, alphas)


def test_as_many_weights_as_experts(zs):
    with pytest.raises(ConfigError, match="3"):
        mix_z(zs, [1.0])


@pytest.fixture
def s() -> torch.Tensor:
    return normal(R, seed=5).abs().sort(descending=True).values + 0.05


def test_reference_z_keeps_the_sum_of_singular_values(s):
    p = normal(R, seed=4, scale=2.0)
    z = reference_z(p, s)
    assert torch.allclose((s * z).sum(), s.sum(), rtol=1e-6)
    assert torch.allclose(z / z[0], torch.sigmoid(p) / torch.sigmoid(p[0]), rtol=1e-5)
    assert (z > 0).all()


def test_reference_z_does_not_depend_on_the_scale_of_the_weight(s):
    p = normal(R, seed=4)
    assert torch.allclose(reference_z(p, s), reference_z(p, 1000 * s), rtol=1e-6)


def test_equal_logits_are_the_base_under_the_reference_parameterisation(s):
    for value in (-3.0, 0.0, 4.0):
        assert torch.allclose(reference_z(torch.full((R,), value), s), torch.ones(R), atol=1e-6)


def test_reference_z_has_the_gradient_of_its_formula(s):
    p = normal(R, seed=4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda q: reference_z(q, s.double()), p)
