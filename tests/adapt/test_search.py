"""Searchers on functions whose best point is known, and spaces of mixtures."""

from __future__ import annotations

import numpy as np
import pytest

from sigmix.adapt.few_shot import AlphaSpace
from sigmix.adapt.search import CEM, CMAES, SEARCHERS, Swarm
from sigmix.errors import ConfigError
from sigmix.experts.mix import Mix

AIM = np.array([0.2, 0.9, 0.55])


def run(searcher, value, rounds=40):
    for _ in range(rounds):
        candidates = searcher.ask()
        assert ((candidates >= searcher.low) & (candidates <= searcher.high)).all()
        searcher.tell(candidates, [value(vector) for vector in candidates])
    return searcher


@pytest.mark.parametrize("kind", SEARCHERS)
def test_finds_the_best_point_of_a_bowl(kind):
    searcher = run(SEARCHERS[kind](3, seed=1), lambda vector: -float(((vector - AIM) ** 2).sum()))
    assert np.abs(searcher.best - AIM).max() < 0.05


@pytest.mark.parametrize("kind", SEARCHERS)
def test_ties_are_broken_by_the_second_value(kind):
    """The first value is a step that 16 % of the cube reaches, the second leads to a point inside of it."""
    searcher = run(
        SEARCHERS[kind](3, seed=2),
        lambda vector: (float(vector[0] < 0.4 and vector[1] > 0.6), -float(((vector - AIM) ** 2).sum())),
    )
    assert searcher.best_value[0] == 1.0
    assert np.abs(searcher.best - AIM).max() < 0.05


@pytest.mark.parametrize("kind", SEARCHERS)
def test_starts_are_tried_first_and_the_best_is_never_forgotten(kind):
    start = [np.zeros(3), AIM]
    searcher = SEARCHERS[kind](3, population=8, start=start, seed=0)
    first = searcher.ask()
    assert len(first) == 8
    assert (first[:2] == np.stack(start)).all()
    searcher.tell(first, [float((vector == AIM).all()) for vector in first])
    run(searcher, lambda vector: 0.0, rounds=5)  # nothing is ever better
    assert (searcher.best == AIM).all()


@pytest.mark.parametrize("kind", SEARCHERS)
def test_a_seed_decides_everything(kind):
    def best(seed):
        return run(SEARCHERS[kind](3, seed=seed), lambda vector: -float(((vector - AIM) ** 2).sum()), 3).best

    assert (best(4) == best(4)).all()
    assert (best(4) != best(5)).any()


@pytest.mark.parametrize("kind", SEARCHERS)
def test_values_that_are_all_equal_do_not_freeze_the_search(kind):
    searcher = run(SEARCHERS[kind](2, seed=0), lambda vector: 0.0, rounds=30)
    assert searcher.spread > 0
    assert len(np.unique(searcher.ask(), axis=0)) > 1


@pytest.mark.parametrize("kind", SEARCHERS)
def test_one_dimension(kind):
    searcher = run(SEARCHERS[kind](1, seed=0), lambda vector: -abs(float(vector[0]) - 0.7))
    assert searcher.best == pytest.approx([0.7], abs=0.05)


def test_a_swarm_moves_by_its_equation():
    """Two particles, every coefficient known: v = (r_p φ_p (p - x) + …) / Σ r φ, x += λ v."""
    start = [[0.0], [10.0]]
    swarm, away = (Swarm(1, -100.0, 100.0, population=2, start=start) for _ in range(2))
    swarm.coefficients, swarm.step = np.array([0, 0, 1, 0]), 0.5
    swarm.tell(swarm.ask(), [0.0, 1.0])  # the second is the best: the first goes half of the way to it
    assert swarm.ask() == pytest.approx(np.array([[5.0], [10.0]]))
    away.coefficients, away.step = np.array([0, 1e-9, 0, 1]), 0.5
    away.tell(away.ask(), [0.0, 1.0])  # the first is the worst: the second flees from it
    assert away.ask()[1] == pytest.approx([15.0], abs=0.01)


def test_bad_searches():
    for make in (lambda: CEM(0), lambda: CEM(2, 1.0, 1.0), lambda: CEM(2, population=1)):
        with pytest.raises(ConfigError):
            make()
    with pytest.raises(ConfigError, match="1 values for 32"):
        searcher = CMAES(2)
        searcher.tell(searcher.ask(), [0.0])


# ---------------------------------------------------------------------- spaces

PATHS = ("layers.0.q", "layers.0.mlp", "layers.1.q", "layers.1.mlp")


def test_a_vector_per_model_layer_and_matrix():
    two = ("a", "b")
    assert AlphaSpace(two).mix([0.5, 0.25]) == Mix.parse("a:0.5+b:0.25")
    layer = AlphaSpace(two, PATHS, "layer")
    assert (layer.size, layer.mix([1, 0, 0.5, 0.5])) == (4, Mix({"a": [1, 0], "b": [0.5, 0.5]}))
    matrix = AlphaSpace(two, PATHS, "matrix")
    assert matrix.size == 8
    mix = matrix.mix(np.arange(8) / 10)
    assert mix.alpha("a", "layers.1.q") == pytest.approx(0.2)
    assert mix.alpha("b", "layers.0.mlp") == pytest.approx(0.5)


def test_normalised_weights_sum_to_one_everywhere_and_zeros_are_the_base():
    space = AlphaSpace(("a", "b"), PATHS, "layer", normalised=True)
    mix = space.mix([0.2, 0.0, 0.6, 0.0])
    assert [mix.alpha(name, "layers.0.q") for name in "ab"] == pytest.approx([0.25, 0.75])
    assert [mix.alpha(name, "layers.1.q") for name in "ab"] == [0, 0]
    assert AlphaSpace(("a",), normalised=True).mix([0]) == Mix.base()


def test_corners_are_the_base_each_alone_and_equal_shares():
    for space in (
        AlphaSpace(("a", "b")),
        AlphaSpace(("a", "b"), PATHS, "layer"),
        AlphaSpace(("a", "b"), PATHS, "matrix"),
    ):
        zs = {"a": dict.fromkeys(PATHS, np.e), "b": dict.fromkeys(PATHS, 1.0)}
        alphas = [[mix.alpha(name, path) for name in zs for path in PATHS] for mix in map(space.mix, space.corners())]
        assert alphas == [[0] * 8, [1] * 4 + [0] * 4, [0] * 4 + [1] * 4, [0.5] * 8]


def test_weights_are_clamped_and_bad_vectors_refused():
    space = AlphaSpace(("a",), low=-1, high=2)
    assert space.mix([5]) == Mix.parse("a:2")
    for vector in ([np.nan], [1, 2]):
        with pytest.raises(ConfigError, match="finite"):
            space.mix(vector)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": ()}, "bank"),
        ({"granularity": "head"}, "granularity"),
        ({"low": 1, "high": 0}, "bounds"),
        ({"high": float("nan")}, "bounds"),
        ({"normalised": True, "low": -1}, "normalised"),
        ({"granularity": "layer", "matrices": ("head",)}, "no layer"),
    ],
)
def test_bad_spaces(options, message):
    with pytest.raises(ConfigError, match=message):
        AlphaSpace(**{"experts": ("a",), **options})
