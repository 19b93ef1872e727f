"""The subspaces of what experts do: exact at full size, and wrong by just what they predict below it."""

from __future__ import annotations

import pytest
import torch

from sigmix.svf.subspace import subspace

SHAPES = {
    "queries, keys, values": [(24, 16), (6, 16), (6, 16)],
    "wide": [(16, 40)],
    "tall": [(40, 16)],
    "square": [(16, 16)],
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def problem(shape, experts=3, tokens=200, seed=0):
    """Factors, gains [K, r] and output sizes of random layers, the inputs' second moment, and D(g) of all layers."""
    draw = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(*size, generator=draw, dtype=torch.float64)

    n = shape[0][1]
    inputs = random(tokens, n) @ random(n, n)
    second = inputs.T @ inputs / tokens
    factors, gains, sizes = [], [], []
    for m, _ in shape:
        weight = random(m, n)
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        factors.append((u * s, v.T) if m >= n else (u, v.T * s))
        gains.append(0.1 * random(experts, len(s)))
        sizes.append(torch.trace(weight @ second @ weight.T))

    def delta(gain):
        return [(left * g) @ right.T for (left, right), g in zip(factors, gain, strict=True)]

    return factors, gains, sizes, second, delta


@shapes
def test_at_full_size_nothing_is_lost_for_any_mixture(shape):
    factors, gains, sizes, second, delta = problem(shape)
    made = subspace(factors, gains, sizes, second, 99, 99)
    part = made.cut(99, 99, gains, second)
    alphas = torch.tensor([0.3, 0.0, -0.8])
    mixed = [0.3 * gain[0] - 0.8 * gain[2] for gain in gains]
    found = part.outputs @ part.core(alphas[None, :, None].expand(1, 3, len(shape)))[0] @ part.inputs
    torch.testing.assert_close(found, torch.cat(delta(mixed)), rtol=1e-5, atol=1e-5)
    assert made.lost(*(size - 1 for size in made.captured.shape)) < 1e-9


@shapes
@pytest.mark.parametrize(("j", "k"), [(8, 8), (3, 8), (8, 3), (1, 1), (5, 2)])
def test_the_error_is_what_it_predicts(shape, j, k):
    factors, gains, sizes, second, delta = problem(shape)
    made = subspace(factors, gains, sizes, second, 8, 8)
    part = made.cut(j, k, gains, second)
    lost = whole = 0.0
    for number in range(3):
        own = [gain[number] for gain in gains]
        change = part.outputs @ part.core(torch.eye(3)[number][None, :, None].expand(1, 3, len(shape)))[0] @ part.inputs
        for true, found, size in zip(delta(own), change.split([m for m, _ in shape]), sizes, strict=True):
            lost += float(torch.trace((true - found) @ second @ (true - found).T) / size)
            whole += float(torch.trace(true @ second @ true.T) / size)
    assert made.lost(j, k) == pytest.approx(lost / whole, rel=2e-2)  # the ridge counts a little too
    assert 0 < made.lost(j, k) < 1


@shapes
def test_more_directions_never_lose_more(shape):
    factors, gains, sizes, second, _ = problem(shape)
    made = subspace(factors, gains, sizes, second, 12, 10)
    table = made.captured
    assert (table[1:] >= table[:-1] - 1e-12).all()
    assert (table[:, 1:] >= table[:, :-1] - 1e-12).all()
    assert made.lost(0, 5) == made.lost(5, 0) == 1.0


def test_a_calibrated_choice_is_better_on_its_inputs_than_one_that_knows_nothing():
    factors, gains, sizes, _, delta = problem([(30, 30)])
    draw = torch.Generator().manual_seed(9)
    few = torch.randn(300, 4, generator=draw, dtype=torch.float64) @ torch.randn(4, 30, generator=draw).double()
    second = few.T @ few / 300  # inputs fill 4 of 30 dimensions
    errors = []
    for known in (second, torch.eye(30, dtype=torch.float64)):
        made = subspace(factors, gains, sizes, known, 30, 4)
        own = [gain[0] for gain in gains]
        change = made.outputs @ made.cores([gain[None] for gain in own])[0][0] @ made.inputs
        errors.append(float((few @ (delta(own)[0] - change).T).norm() / (few @ delta(own)[0].T).norm()))
    assert errors[0] < 0.02 < 0.3 < errors[1]


def test_layers_of_a_group_may_have_weights_of_their_own():
    factors, gains, sizes, second, delta = problem([(24, 16), (6, 16)])
    part = subspace(factors, gains, sizes, second, 99, 99).cut(99, 99, gains, second)
    alphas = torch.tensor([[[0.5, 0.0], [0.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    cores = part.core(alphas)
    wanted = torch.cat(delta([0.5 * gains[0][0], 2 * gains[1][1]]))
    torch.testing.assert_close(part.outputs @ cores[0] @ part.inputs, wanted, rtol=1e-5, atol=1e-5)
    assert not cores[1].any(), "no expert is no change at all"
