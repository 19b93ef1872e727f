"""Mixes: what can be written, that ids are canonical, and what z they give."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError

import pytest
import torch

from sigmix.errors import ConfigError, ExpertError, UnknownNameError
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix

A, B, HEAD = "model.layers.0.q", "model.layers.1.q", "lm_head"
LAYERS = {A: 5, B: 4}


def z(seed: int, r: int) -> torch.Tensor:
    return 1 + 0.3 * torch.randn(r, generator=torch.Generator().manual_seed(seed)).clamp(-2, 2)


@pytest.fixture
def bank():
    return {
        "math": Expert("math", {A: z(0, 5), B: z(1, 4)}),
        "code": Expert("code", {A: z(2, 5), B: z(3, 4)}),
        "half": Expert("half", {B: z(4, 4)}),
    }


@pytest.mark.parametrize(
    "text,weights,id",
    [
        ("math:0.7+code:0.3", {"math": 0.7, "code": 0.3}, "code:0.3+math:0.7"),
        ("  math : .7 +code:3e-1 ", {"math": 0.7, "code": 0.3}, "code:0.3+math:0.7"),
        ("math", {"math": 1.0}, "math"),
        ("math:1", {"math": 1.0}, "math"),
        ("math:1.", {"math": 1.0}, "math"),
        ("base", {}, "base"),
        ("base:0.3+math:0.7", {"math": 0.7}, "math:0.7"),
        ("math:0", {}, "base"),
        ("math:-0.0+code", {"code": 1.0}, "code"),
        ("math:-0.5+code:2", {"math": -0.5, "code": 2.0}, "code:2+math:-0.5"),
        ("math:+0.5", {"math": 0.5}, "math:0.5"),
        ("math:1e+22+7b.v-1_x", {"math": 1e22, "7b.v-1_x": 1.0}, "7b.v-1_x+math:1e22"),
        ("math:1E-9", {"math": 1e-9}, "math:1e-09"),
        ("math:0.1000000000000000055", {"math": 0.1}, "math:0.1"),
    ],
)
def test_parse_and_canonical_id(text, weights, id):
    mix = Mix.parse(text)
    assert dict(mix.weights) == weights
    assert mix.id == str(mix) == id
    assert Mix.parse(mix.id) == mix
    assert hash(Mix.parse(mix.id)) == hash(mix)


@pytest.mark.parametrize(
    "text,says",
    [
        ("", "character 1"),
        ("   ", "character 1"),
        ("math+", "character 6"),
        ("+math", "character 1"),
        ("math++code", "character 6"),
        ("Math:1", "found 'Math:1' at character 1"),
        ("code:0.3+ma th:1", "found 'ma th:1' at character 10"),
        ("math:1:2", "found 'math:1:2' at character 1"),
        ("../x", r"found '\.\./x' at character 1"),
        ("math:", "math.* ''"),
        ("code+math:x", "math.*'x'"),
        ("math:0.5x", "'0.5x'"),
        ("math:nan", "'nan'"),
        ("math:inf", "'inf'"),
        ("math:1e999", "'1e999'"),
        ("math:0.5+math:0.5", "math twice"),
    ],
)
def test_errors_point_at_the_faulty_part(text, says):
    with pytest.raises(ConfigError, match=says) as caught:
        Mix.parse(text)
    assert caught.value.remedy


def test_random_weights_round_trip_exactly():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        exponent = 10.0 ** float(torch.randint(-12, 25, (1,), generator=generator))
        weights = {n: float(torch.randn(1, generator=generator).double()) * exponent for n in ("a", "b", "c")}
        mix = Mix(weights)
        assert dict(Mix.parse(mix.id).weights) == weights
        assert Mix.from_json(json.dumps(mix.to_json())) == mix


def test_makers_and_equality():
    assert Mix.base() == Mix({}) == Mix({"math": 0}) == Mix({"math": [0, 0]}) == Mix({"math": {A: 0}})
    assert Mix.one("math") == Mix({"math": 1}) == Mix({"math": torch.tensor(1.0)})
    assert Mix({"a": 1, "b": 2}) == Mix({"b": 2, "a": 1})
    assert Mix.one("math") != Mix.one("code")
    assert Mix.base() != "base"
    assert len({Mix.one("math"), Mix.parse("math:1"), Mix.base()}) == 2


def test_it_cannot_be_changed():
    mix = Mix.one("math")
    with pytest.raises(FrozenInstanceError):
        mix.weights = {}
    with pytest.raises(TypeError):
        mix.weights["code"] = 1.0


@pytest.mark.parametrize("alpha", [math.nan, math.inf, "0.5", None, True, [1.0, math.nan], {A: "x"}, [[1.0]]])
def test_weights_that_cannot_be(alpha):
    with pytest.raises(ConfigError, match="math"):
        Mix({"math": alpha})


def test_names_that_cannot_be():
    with pytest.raises(ExpertError, match="'a/b'"):
        Mix({"a/b": 1.0})


# --- z


def test_the_base_is_exactly_one_everywhere(bank):
    for mix in (Mix.base(), Mix({"math": 0.0})):
        found = mix.z(bank, LAYERS)
        assert {path: value.tolist() for path, value in found.items()} == {A: [1.0] * 5, B: [1.0] * 4}
    assert Mix.base().z({}, LAYERS)[A].dtype == torch.float32


def test_one_expert_comes_bit_for_bit_and_as_a_copy(bank):
    found = Mix.parse("math+code:0").z(bank, LAYERS)
    assert all(torch.equal(found[path], bank["math"].z[path]) for path in LAYERS)
    found[A].zero_()
    assert bank["math"].z[A].abs().sum() > 0


def test_mixtures_add_gains(bank):
    found = Mix.parse("math:0.7+code:-0.4").z(bank, LAYERS)
    for path in LAYERS:
        expected = 1 + 0.7 * (bank["math"].z[path].double() - 1) - 0.4 * (bank["code"].z[path].double() - 1)
        torch.testing.assert_close(found[path].double(), expected, rtol=0, atol=1e-7)
        assert found[path].dtype == torch.float32


def test_a_matrix_that_an_expert_lacks_is_left_to_the_others(bank):
    found = Mix.parse("half+math").z(bank, LAYERS)
    assert torch.equal(found[A], bank["math"].z[A])
    assert torch.equal(Mix.one("half").z(bank, LAYERS)[A], torch.ones(5))
    assert torch.equal(Mix.one("half").z(bank, LAYERS)[B], bank["half"].z[B])


def test_order_makes_no_difference_to_a_bit(bank):
    first, second = (Mix.parse(text).z(bank, LAYERS) for text in ("math:0.7+code:0.3", "code:0.3+math:0.7"))
    assert all(torch.equal(first[path], second[path]) for path in LAYERS)


def test_plain_mappings_of_z_will_do(bank):
    plain = {name: dict(expert.z) for name, expert in bank.items()}
    assert torch.equal(Mix.one("math").z(plain, LAYERS)[A], bank["math"].z[A])


def test_an_unknown_expert_lists_the_nearest(bank):
    with pytest.raises(UnknownNameError, match="unknown expert 'maths'; nearest: math"):
        Mix.one("maths").z(bank, LAYERS)


def test_a_model_that_does_not_fit(bank):
    with pytest.raises(ExpertError, match=f"'math'.*{B}"):
        Mix.one("math").z(bank, {A: 5})
    with pytest.raises(ExpertError, match=f"'math'.* 4 .*{B}.* 9"):
        Mix.one("math").z(bank, {A: 5, B: 9})


# --- per layer and per matrix


def test_weights_per_layer(bank):
    mix = Mix({"math": [1.0, 0.5], "code": 0.25})
    found = mix.z(bank, LAYERS)
    for path, alpha in ((A, 1.0), (B, 0.5)):
        assert mix.alpha("math", path) == alpha
        expected = Mix({"math": alpha, "code": 0.25}).z(bank, LAYERS)[path]
        assert torch.equal(found[path], expected)
    assert torch.equal(Mix({"math": [1, 0]}).z(bank, LAYERS)[A], bank["math"].z[A])
    assert torch.equal(Mix({"math": [1, 0]}).z(bank, LAYERS)[B], torch.ones(4))


def test_weights_per_matrix(bank):
    mix = Mix({"math": {B: 1.0, A: 0.0}})
    assert mix == Mix({"math": {B: 1.0}})
    assert torch.equal(mix.z(bank, LAYERS)[B], bank["math"].z[B])
    assert torch.equal(mix.z(bank, LAYERS)[A], torch.ones(5))


def test_fine_ids_tell_mixes_apart_and_are_refused_by_parse():
    mixes = [
        Mix({"math": [1.0, 0.5]}),
        Mix({"math": [0.5, 1.0]}),
        Mix({"math": {A: 1.0, B: 0.5}}),
        Mix({"math": {A: 1.0}}),
        Mix({"math": 1.0}),
    ]
    assert len({mix.id for mix in mixes}) == len(set(mixes)) == 5
    assert Mix({"math": {B: 0.5, A: 1.0}}).id == mixes[2].id
    assert mixes[0].id.startswith("math:layers~")
    with pytest.raises(ConfigError, match="math.*'layers~"):
        Mix.parse(mixes[0].id)


def test_fine_mixes_survive_json():
    mix = Mix({"math": [1.0, 0.1], "code": {A: 0.3}, "half": -2})
    for value in (mix.to_json(), json.dumps(mix.to_json())):
        again = Mix.from_json(value)
        assert again == mix
        assert again.id == mix.id


@pytest.mark.parametrize(
    "value,says",
    [
        ("{", "not valid JSON: .* line 1 column 2"),
        ("[]", "object with 'weights'"),
        ({"math": 1}, "object with 'weights'"),
    ],
)
def test_json_that_is_no_mix(value, says):
    with pytest.raises(ConfigError, match=says):
        Mix.from_json(value)


def test_fine_weights_that_do_not_fit_the_model(bank):
    with pytest.raises(ConfigError, match=f"{B}.*layer 1"):
        Mix({"math": [1.0]}).z(bank, LAYERS)
    with pytest.raises(ConfigError, match="lm_head"):
        Mix({"head": [1.0, 1.0]}).z({"head": {HEAD: torch.ones(3)}}, {**LAYERS, HEAD: 3})
    with pytest.raises(ConfigError, match=r"'model\.layers\.7\.q'"):
        Mix({"math": {"model.layers.7.q": 1.0}}).z(bank, LAYERS)
