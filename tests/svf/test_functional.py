"""The algebra of gains, against its definition and dense float64 weights."""

from __future__ import annotations

import itertools

import pytest
import torch

from sigmix.errors import ConfigError
from sigmix.svf.functional import mix_z, reference_z, truncate

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
    with pytest.raises(ConfigError, match="3 experts need 3"):
        mix_z(zs, [1.0])


def dense(gain: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    u, v = torch.linalg.qr(normal(20, R, seed=8).double())[0], torch.linalg.qr(normal(R, R, seed=9).double())[0]
    return (u * (s.double() * gain.double())) @ v.T


def applied(gain: torch.Tensor, index: torch.Tensor, common: torch.Tensor) -> torch.Tensor:
    """The gains that a truncated form applies in effect."""
    out = common.expand_as(gain).clone()
    out[..., index] = gain[..., index]
    return out


@pytest.fixture
def s() -> torch.Tensor:
    return normal(R, seed=5).abs().sort(descending=True).values + 0.05


@pytest.mark.parametrize("k", range(R + 1))
def test_the_predicted_error_is_that_of_the_dense_weight(s, k):
    gain = normal(R, seed=3, scale=0.3)
    index, common, error = truncate(gain, s, k)
    assert index.tolist() == sorted(set(index.tolist()))
    assert len(index) == k
    found = (dense(gain, s) - dense(applied(gain, index, common), s)).square().sum()
    # float32 gains and mean; 1e-6 is a few of their roundoffs, the absolute part is for k = r
    assert torch.allclose(error.double(), found, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("k", range(R + 1))
def test_the_common_gain_is_the_best_for_the_components_kept(s, k):
    gain = 0.5 + normal(R, seed=3, scale=0.3)
    index, common, error = truncate(gain, s, k)
    dropped = torch.ones(R, dtype=torch.bool)
    dropped[index] = False
    for other in (0.0, float(common) + 1e-2, float(common) - 1e-2):
        worse = (s[dropped] ** 2 * (gain[dropped] - other) ** 2).sum()
        assert error <= worse + 1e-6


def test_the_components_kept_have_the_most_energy(s):
    gain = normal(R, seed=3, scale=0.3)
    index, _, _ = truncate(gain, s, 4)
    energy = (s * gain).abs()
    best = max(itertools.combinations(range(R), 4), key=lambda kept: float(energy[list(kept)].square().sum()))
    assert index.tolist() == list(best)


def test_full_k_is_exact_and_the_error_falls_with_k(s):
    gain = normal(R, seed=3, scale=0.3)
    index, _, error = truncate(gain, s, R)
    assert index.tolist() == list(range(R))
    assert float(error) == 0
    errors = [float(truncate(gain, s, k)[2]) for k in range(R + 1)]
    assert errors[0] > errors[R // 2] > errors[R]


def test_k_zero_leaves_one_scale(s):
    gain = normal(R, seed=3, scale=0.3)
    index, common, error = truncate(gain, s, 0)
    assert index.numel() == 0
    assert torch.allclose(common, ((s**2 * gain).sum() / (s**2).sum()).reshape(1))
    assert float(error) > 0


def test_one_gain_for_all_components_needs_no_components(s):
    gain = torch.full((R,), 0.25)
    _, common, error = truncate(gain, s, 0)
    assert torch.allclose(common, torch.tensor([0.25]), atol=1e-7)
    assert float(error) < 1e-12
    zero = truncate(torch.zeros(R), s, 3)
    assert torch.equal(zero[1], torch.zeros(1))
    assert float(zero[2]) == 0


@pytest.mark.parametrize("shape", [(4, R), (4, 1, R)])
def test_rows_share_components_and_have_their_own_scale_and_error(s, shape):
    gain = normal(*shape, seed=6, scale=0.3)
    index, common, error = truncate(gain, s, 5)
    assert common.shape == (*shape[:-1], 1)
    assert error.shape == shape[:-1]
    flat = gain.reshape(-1, R)
    energy = (s**2 * flat**2).sum(0)
    assert set(index.tolist()) == set(energy.topk(5).indices.tolist())
    for row, c, e in zip(flat, common.reshape(-1, 1), error.reshape(-1), strict=True):
        found = (dense(row, s) - dense(applied(row, index, c), s)).square().sum()
        assert torch.allclose(e.double(), found, rtol=1e-5)


def test_components_without_weight_cost_nothing():
    s = torch.tensor([2.0, 1.0, 0.0, 0.0])
    index, common, error = truncate(torch.tensor([0.5, -0.5, 9.0, -9.0]), s, 2)
    assert index.tolist() == [0, 1]
    assert torch.isfinite(common).all()
    assert float(error) == 0


@pytest.mark.parametrize("k", [-1, R + 1])
def test_k_out_of_range(s, k):
    with pytest.raises(ConfigError, match=f"k = {k}"):
        truncate(torch.zeros(R), s, k)


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
