"""The three forms of one adapted layer against each other and a dense float64 oracle."""

from __future__ import annotations

import pytest
import torch
from helpers_svf import TOLERANCE, error, linear, oracle, random_z, wrapped

from sigmix.errors import ConfigError
from sigmix.svf.layer import SVFLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = {"wide": (24, 40), "tall": (40, 24), "square": (32, 32)}
KINDS = {"linear": {}, "bias": {"bias": True}, "conv1d": {"kind": "conv1d"}}
UNMERGED = ("factored", "gain")

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def inputs(layer: SVFLinear, rows: int = 3, tokens: int | None = 5, seed: int = 7) -> torch.Tensor:
    shape = (rows, layer.in_features) if tokens is None else (rows, tokens, layer.in_features)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.to(layer.matrix().dtype)


@torch.no_grad()
def run(layer: SVFLinear, x: torch.Tensor, z: torch.Tensor, form: str) -> torch.Tensor:
    """The layer's output in a form, through the adapter's own z; the layer is left unmerged."""
    layer.svf_z["default"].weight.data.copy_(z)
    if form == "merged":
        layer.merge()
        y = layer(x)
        layer.unmerge()
        return y
    layer.form = form
    return layer(x)


@dtypes
@shapes
@kinds
def test_every_form_is_the_oracle(dtype, shape, kind):
    layer = wrapped(*shape, dtype=dtype, **kind)
    x, z = inputs(layer), random_z(layer.r)
    expected = oracle(layer, x, z)
    base = oracle(layer, x, torch.ones(layer.r))
    assert error(base, expected) > 5 * TOLERANCE[dtype], "the adapter must matter, or the bound would say nothing"
    for form in ("merged", *UNMERGED):
        y = run(layer, x, z, form)
        assert y.dtype == dtype
        assert error(y, expected) < TOLERANCE[dtype], form


@dtypes
@shapes
@kinds
def test_z_of_one_is_the_base_bit_for_bit(dtype, shape, kind):
    layer = wrapped(*shape, dtype=dtype, **kind)
    x = inputs(layer)
    base = linear(*shape, dtype=dtype, **kind)(x)
    one = torch.ones(layer.r)
    for form in ("merged", "gain"):
        assert torch.equal(run(layer, x, one, form), base), form
    layer.row_z = torch.ones(len(x), layer.r)
    layer.form = "gain"
    assert torch.equal(layer(x), base)
    layer.row_z = None
    assert error(run(layer, x, one, "factored"), base) < TOLERANCE[dtype]


@dtypes
@shapes
def test_a_disabled_layer_is_the_base_bit_for_bit(dtype, shape):
    layer = wrapped(*shape, dtype=dtype, bias=True)
    x = inputs(layer)
    base = linear(*shape, dtype=dtype, bias=True)(x)
    layer.svf_z["default"].weight.data.copy_(random_z(layer.r))
    layer.row_z = torch.stack([random_z(layer.r, i) for i in range(3)])
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base)


@pytest.mark.parametrize("tokens", [5, 1, None], ids=["3-d", "one token", "2-d"])
@pytest.mark.parametrize("form", UNMERGED)
@shapes
@kinds
def test_every_row_has_its_own_z(tokens, form, shape, kind):
    layer = wrapped(*shape, **kind)
    x = inputs(layer, rows=4, tokens=tokens)
    z = torch.stack([torch.ones(layer.r), *(random_z(layer.r, seed) for seed in (1, 2, 3))])
    layer.form, layer.row_z = form, z
    y = layer(x).detach()
    layer.row_z = None
    for row in range(4):
        assert error(y[row], oracle(layer, x[row], z[row])) < TOLERANCE[torch.float32]
        alone = run(layer, x[row : row + 1], z[row], form)[0]
        # the same sums in another order: BLAS may block a batch of another size differently
        assert torch.allclose(y[row], alone, rtol=1e-5, atol=1e-5)
    if form != "factored":
        assert torch.equal(y[0], linear(*shape, **kind)(x)[0].detach()), "the base's row is exact among others"


@pytest.mark.parametrize("form", UNMERGED)
@shapes
def test_what_other_rows_carry_changes_no_bit_of_a_row(form, shape):
    layer = wrapped(*shape)
    x = inputs(layer)
    z = torch.stack([random_z(layer.r, seed) for seed in (1, 2, 3)])
    layer.form, layer.row_z = form, z
    before = layer(x)
    layer.row_z = torch.stack([z[0], random_z(layer.r, 8), torch.ones(layer.r)])
    after = layer(x)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("form", UNMERGED)
def test_as_many_z_as_rows(rows, form):
    layer = wrapped(24, 40)
    layer.form, layer.row_z = form, torch.ones(rows, layer.r)
    with pytest.raises((ConfigError, RuntimeError)):
        layer(inputs(layer))


@pytest.mark.parametrize("gain", [3e-3, -3e-3, 5e-3, -5e-3, 2e-2])
@pytest.mark.parametrize("form", ("merged", *UNMERGED))
@pytest.mark.parametrize("shape", [(256, 128), (128, 256)], ids=["tall", "wide"])
def test_small_gains_survive_bfloat16_on_average(gain, form, shape):
    """The bfloat16 numbers next to 1 are 0.996 and 1.008, so z itself must not be rounded.

    With products rounded one by one, outputs still grow by the gain on average. The bound of a fifth is for the few
    mantissas there are; gains below 0.002, half a step, are lost in every form, as W x itself rounds that coarsely.
    """
    layer = wrapped(*shape, dtype=torch.bfloat16)
    x = inputs(layer, rows=8, tokens=64)
    base = run(layer, x, torch.ones(layer.r), form).double()
    y = run(layer, x, torch.full((layer.r,), 1 + gain), form).double()
    growth = float((y * base).sum() / base.square().sum()) - 1
    assert abs(growth - gain) < 0.2 * abs(gain)


def test_an_unknown_form_is_named():
    layer = wrapped(8, 6)
    layer.form = "magic"
    with pytest.raises(ConfigError, match="magic"):
        layer(inputs(layer))


@pytest.mark.parametrize("other", [torch.nn.Embedding(8, 4), torch.nn.Conv1d(4, 4, 3), torch.nn.LayerNorm(4)])
def test_only_linear_layers(other):
    with pytest.raises(ConfigError, match=type(other).__name__):
        SVFLinear(other, "default", cache=False)


def test_a_checkpoint_of_the_layer_holds_the_base_and_z_only():
    layer = wrapped(8, 6, bias=True)
    layer(inputs(layer))
    assert set(layer.state_dict()) == {"base_layer.weight", "base_layer.bias", "svf_z.default.weight"}


def test_a_layer_without_a_z_for_the_active_adapter_is_the_base():
    layer = wrapped(8, 6)
    layer.svf_z["default"].weight.data.fill_(2.0)
    x = inputs(layer)
    layer.set_adapter([])
    assert torch.equal(layer(x), linear(8, 6)(x))


def test_several_active_adapters_add_their_gains():
    layer = wrapped(24, 40)
    layer.update_layer("second")
    first, second = random_z(24, 1), random_z(24, 2)
    layer.svf_z["default"].weight.data.copy_(first)
    layer.svf_z["second"].weight.data.copy_(second)
    layer.set_adapter(["default", "second"])
    x = inputs(layer)
    expected = oracle(layer, x, first.double() + second.double() - 1)
    for form in UNMERGED:
        layer.form = form
        assert error(layer(x), expected) < TOLERANCE[torch.float32]
    layer.merge()
    assert error(layer(x), expected) < TOLERANCE[torch.float32]
