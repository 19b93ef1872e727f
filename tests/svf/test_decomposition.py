"""`decompose` against LAPACK's float64 SVD, over shapes, dtypes and conditions."""

from __future__ import annotations

import pytest
import torch

from sigmix.errors import ConfigError
from sigmix.svf import decomposition as module
from sigmix.svf.decomposition import decompose, svd

SHAPES = {"wide": (20, 48), "tall": (48, 20), "square": (32, 32), "row": (1, 7), "column": (7, 1), "one": (1, 1)}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_values(m: int, n: int, s: torch.Tensor) -> torch.Tensor:
    """A float32 matrix [m, n] with (up to its rounding) the given singular values."""
    u, v = torch.linalg.qr(normal(m, len(s), seed=1))[0], torch.linalg.qr(normal(n, len(s), seed=2))[0]
    return ((u * s.double()) @ v.T).float()


def check(weight: torch.Tensor, tolerance: float = 2e-6) -> None:
    """Everything that must hold of any decomposition. 2e-6 is some 30 roundoffs of float32, for sums over r."""
    factors = decompose(weight)
    u, s, v = factors.usv(weight)
    m, n = weight.shape
    r, top = min(m, n), float(torch.linalg.svdvals(weight.double()).max()) or 1.0
    assert (u.shape, s.shape, v.shape) == ((m, r), (r,), (n, r))
    assert {t.dtype for t in (u, s, v)} == {torch.float32}
    assert factors.short.shape == (r, r)
    assert factors.side == ("in" if m >= n else "out")
    eye = torch.eye(r, dtype=torch.float64)
    long, short = (u, v) if factors.side == "in" else (v, u)
    assert (short.double().T @ short.double() - eye).abs().max() < tolerance
    # the long side comes from W times the short side as float32 holds it, so a column with a small singular value has
    # the rounding of the largest one in it, until `usv` makes those below SMALL orthogonal again
    floor = s.double().clamp_min(module.SMALL * top)
    bound = tolerance + 4e-7 * top / torch.minimum(floor[:, None], floor[None, :])
    assert ((long.double().T @ long.double() - eye).abs() < bound).all()
    assert ((u.double() * s.double()) @ v.double().T - weight.double()).abs().max() < tolerance * top
    assert (s >= 0).all()
    assert (s[:-1] >= s[1:]).all()
    peak = factors.short.gather(0, factors.short.abs().argmax(0, keepdim=True))
    assert (peak > 0).all(), "the largest entry of every column of the short side is positive"
    assert (s.double() - torch.linalg.svdvals(weight.double())).abs().max() < 1e-6 * top


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_shape_and_dtype(shape, dtype):
    check(normal(*shape).to(dtype))


@pytest.mark.parametrize("shape", [(20, 48), (48, 20), (32, 32)])
def test_vectors_are_those_of_lapack_up_to_the_sign(shape):
    weight = normal(*shape)
    u, _, v = svd(weight)
    eu, _, evt = torch.linalg.svd(weight, full_matrices=False)
    # both are float64 inside; what remains is the rounding of the result to float32
    assert ((u.double() * eu).sum(0).abs() - 1).abs().max() < 1e-6
    assert ((v.double() * evt.T).sum(0).abs() - 1).abs().max() < 1e-6
    assert torch.equal(torch.sign((u.double() * eu).sum(0)), torch.sign((v.double() * evt.T).sum(0)))


@pytest.mark.parametrize("shape", [(20, 48), (48, 20), (24, 24)])
@pytest.mark.parametrize("rank", [0, 1, 7])
def test_rank_deficient(shape, rank):
    s = torch.cat([torch.linspace(3, 1, rank), torch.zeros(min(shape) - rank)]) if rank else torch.zeros(min(shape))
    weight = with_values(*shape, s)
    check(weight)
    # the matrix itself is rounded to float32, which leaves traces in the null components
    assert decompose(weight).s[rank:].max() < 1e-5


@pytest.mark.parametrize("shape", [(20, 48), (48, 20), (24, 24)])
def test_exactly_dependent_rows_and_columns(shape):
    weight = normal(*shape).float()
    weight[1] = weight[0]
    weight[:, 2] = 2 * weight[:, 3]
    weight[:, 5] = 0
    check(weight)


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (24, 24)])
def test_ill_conditioned_values_are_as_exact_as_a_direct_svd(shape):
    s = torch.logspace(0, -12, 24, dtype=torch.float64)
    u, v = torch.linalg.qr(normal(shape[0], 24, seed=1))[0], torch.linalg.qr(normal(shape[1], 24, seed=2))[0]
    weight = (u * s) @ v.T
    found = decompose(weight).s.double()
    expected = torch.linalg.svdvals(weight)
    # relative, not just against the largest: squaring alone would lose everything below 1e-8
    assert ((found - expected).abs() / expected)[s > 1e-6].max() < 1e-5
    assert ((found - expected).abs())[s <= 1e-6].max() < 1e-11
    check(weight)


def test_equal_singular_values():
    check(torch.linalg.qr(normal(30, 16))[0].float() * 3)
    check(torch.eye(12))


def test_scale_does_not_matter():
    weight = normal(24, 40).float()
    for factor in (2.0**-60, 2.0**60):  # their squares are out of float32's range
        small = decompose(weight * factor)
        base = decompose(weight)
        assert torch.allclose(small.s, base.s * factor, rtol=1e-6, atol=0)
        assert torch.allclose(small.short, base.short, atol=1e-6)


def test_the_same_weight_gives_the_same_bits_and_is_not_changed():
    weight = normal(40, 24).float()
    copy = weight.clone()
    first, second = decompose(weight), decompose(copy.T.contiguous().T)  # the same values, strided otherwise
    assert torch.equal(first.short, decompose(weight).short)
    assert torch.equal(weight, copy)
    assert torch.allclose(first.short, second.short, atol=1e-6)


def test_negating_the_weight_negates_only_the_long_side():
    weight = normal(40, 24)
    one, other = decompose(weight), decompose(-weight)
    assert torch.equal(one.short, other.short)
    assert torch.equal(one.s, other.s)


def test_no_gradient_flows_into_the_weight():
    weight = torch.nn.Parameter(normal(6, 4).float())
    assert not decompose(weight).s.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_not_finite(bad, shape):
    weight = torch.ones(shape)
    weight[2, 3] = bad
    with pytest.raises(ConfigError, match="NaN"):
        decompose(weight)


@pytest.mark.parametrize(
    "weight",
    [torch.ones(3), torch.ones(2, 3, 4), torch.ones(3, 3, dtype=torch.int64), torch.ones(0, 3), torch.ones(3, 0)],
    ids=["vector", "3-d", "integers", "no rows", "no columns"],
)
def test_no_float_matrix(weight):
    with pytest.raises(ConfigError, match="float") as caught:
        decompose(weight)
    assert str(tuple(weight.shape)) in str(caught.value)
