"""Merging leaves no trace; casts keep z and the forms; gradients reach z, and nothing else."""

from __future__ import annotations

import pytest
import torch
from helpers_svf import TOLERANCE, dense, error, linear, oracle, random_z, wrapped
from torch import nn

from sigmix.errors import ConfigError

SHAPES = {"wide": (24, 40), "tall": (40, 24), "square": (32, 32)}
KINDS = {"linear": {}, "bias": {"bias": True}, "conv1d": {"kind": "conv1d"}}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])


def ones(layer) -> torch.Tensor:
    return torch.ones(layer.r)


def batch(layer, seed: int = 3) -> torch.Tensor:
    x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(seed))
    return x.to(layer.matrix().dtype)


@dtypes
@shapes
@kinds
def test_many_cycles_leave_the_very_same_weight(dtype, shape, kind):
    layer = wrapped(*shape, dtype=dtype, **kind)
    base = layer.get_base_layer()
    parameter, copy, place = base.weight, base.weight.detach().clone(), base.weight.data_ptr()
    for seed in range(60):
        layer.svf_z["default"].weight.data.copy_(random_z(layer.r, seed))
        layer.merge()
        assert not torch.equal(base.weight, copy)
        assert base.weight.data_ptr() != place, "the original storage is not written to"
        assert torch.equal(layer.matrix().T if layer.transposed else layer.matrix(), copy)
        layer.unmerge()
        assert torch.equal(base.weight, copy)
    assert base.weight is parameter
    assert base.weight.data_ptr() == place
    assert base.weight.stride() == copy.stride()


@dtypes
@shapes
def test_merging_one_z_after_another_never_accumulates(dtype, shape):
    layer = wrapped(*shape, dtype=dtype)
    first, second = random_z(layer.r, 1), random_z(layer.r, 2)
    layer.merge_z(second)
    fresh = layer.get_base_layer().weight.detach().clone()
    for _ in range(5):
        layer.merge_z(first)
        layer.merge_z(second)
    assert torch.equal(layer.get_base_layer().weight, fresh)
    assert error(fresh, dense(layer.matrix(), second)) < TOLERANCE[dtype]
    layer.merge_z(ones(layer))
    assert torch.equal(layer.get_base_layer().weight, linear(*shape, dtype=dtype).weight)
    layer.unmerge()
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, linear(*shape, dtype=dtype).weight)


def test_merging_the_same_adapter_twice_is_merging_it_once():
    layer = wrapped(24, 40)
    layer.svf_z["default"].weight.data.copy_(random_z(24))
    layer.merge()
    once = layer.get_base_layer().weight.detach().clone()
    with pytest.warns(UserWarning, match="[Aa]ll adapters are already merged"):
        layer.merge()
    assert torch.equal(layer.get_base_layer().weight, once)
    assert layer.merged_adapters == ["default"]


def test_merging_a_second_adapter_adds_its_gains_to_the_base():
    layer = wrapped(24, 40)
    layer.update_layer("second")
    first, second = random_z(24, 1), random_z(24, 2)
    layer.svf_z["default"].weight.data.copy_(first)
    layer.svf_z["second"].weight.data.copy_(second)
    layer.merge(adapter_names=["default"])
    with pytest.warns(UserWarning, match="merged"):
        layer.merge(adapter_names=["second"])
    expected = dense(layer.matrix(), first.double() + second.double() - 1)
    assert error(layer.get_base_layer().weight, expected) < TOLERANCE[torch.float32]
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, linear(24, 40).weight)


def test_a_safe_merge_refuses_a_broken_adapter_and_changes_nothing():
    layer = wrapped(24, 40)
    layer.svf_z["default"].weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, linear(24, 40).weight)
    assert not layer.merged


def test_the_delta_is_what_a_merge_adds():
    layer = wrapped(40, 24, kind="conv1d")
    z = random_z(24)
    layer.svf_z["default"].weight.data.copy_(z)
    expected = dense(layer.matrix(), z) - layer.matrix().double()
    assert error(layer.get_delta_weight("default"), expected) < TOLERANCE[torch.float32]


def test_rows_cannot_have_their_own_z_while_merged():
    layer = wrapped(24, 40)
    layer.update_layer("second")
    layer.merge_z(random_z(24))
    x = batch(layer)
    with pytest.raises(ConfigError, match="merged"):
        layer(x, adapter_names=["default", "second", "__base__"])
    layer.row_z = torch.ones(3, 24)
    with pytest.raises(ConfigError, match="merged"):
        layer(x)
    layer.unmerge()
    layer.form = "gain"
    assert torch.equal(layer(x), linear(24, 40)(x))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("there, back", [(torch.bfloat16, torch.float32), (torch.float64, torch.float32)])
@shapes
@kinds
def test_a_cast_keeps_z_and_all_forms(merged, there, back, shape, kind):
    layer = wrapped(*shape, **kind)
    z = random_z(layer.r)
    layer.svf_z["default"].weight.data.copy_(z)
    layer(batch(layer))  # so that every buffer exists
    if merged:
        layer.merge()
    for dtype in (there, back):
        layer.to(dtype)
        assert layer.svf_z["default"].weight.dtype == torch.float32
        assert torch.equal(layer.svf_z["default"].weight, z)
        x = batch(layer)
        assert x.dtype == dtype
        expected = oracle(layer, x, z)
        if merged:
            assert error(layer(x), expected) < TOLERANCE[torch.bfloat16]  # W' itself went through bfloat16
            continue
        for form in ("factored", "gain"):
            layer.form = form
            assert error(layer(x), expected) < TOLERANCE[dtype], (form, dtype)
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, linear(*shape, **kind).to(there).to(back).weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", ["one z", "a z per row", "a z per row, 2-d"])
@shapes
@kinds
def test_the_gradient_is_that_of_the_dense_composition(dtype, rows, shape, kind):
    layer = wrapped(*shape, dtype=dtype, **kind)
    x = batch(layer)
    if rows.endswith("2-d"):
        x = x[:, 0]
    x.requires_grad_()
    z = nn.Parameter(torch.stack([random_z(layer.r, seed) for seed in (1, 2, 3)]))
    if rows == "one z":
        z = layer.svf_z["default"].weight
        z.data.copy_(random_z(layer.r))
    else:
        layer.row_z = z
    y = layer(x)
    weigh = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (y * weigh.to(dtype)).sum().backward()

    oracle_z, oracle_x = z.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    if rows == "one z":
        expected = oracle_x @ dense(layer.matrix(), oracle_z).T
    else:
        each = [oracle_x[i] @ dense(layer.matrix(), oracle_z[i]).T for i in range(3)]
        expected = torch.stack(each)
    (expected * weigh).sum().backward()
    assert z.grad is not None
    assert z.grad.dtype == torch.float32
    assert error(z.grad, oracle_z.grad) < TOLERANCE[dtype]
    assert error(x.grad, oracle_x.grad) < TOLERANCE[dtype]


def test_the_gradient_in_bfloat16():
    layer = wrapped(40, 24, dtype=torch.bfloat16)
    x = batch(layer)
    layer(x).float().square().sum().backward()
    z = torch.ones(24, dtype=torch.float64, requires_grad=True)
    (x.double() @ dense(layer.matrix(), z).T).square().sum().backward()
    assert error(layer.svf_z["default"].weight.grad, z.grad) < TOLERANCE[torch.bfloat16]


@shapes
@kinds
def test_no_gradient_reaches_the_base(shape, kind):
    layer = wrapped(*shape, **kind)
    layer.get_base_layer().weight.requires_grad_(True)  # even if somebody asks for one
    layer(batch(layer)).sum().backward()
    assert layer.get_base_layer().weight.grad is None
    assert layer.svf_z["default"].weight.grad.abs().sum() > 0
    assert not any(buffer.requires_grad for buffer in layer.buffers())


def test_an_inactive_adapter_gets_no_gradient():
    layer = wrapped(24, 40)
    layer.update_layer("second")
    layer(batch(layer)).sum().backward()
    assert layer.svf_z["default"].weight.grad is not None
    assert layer.svf_z["second"].weight.grad is None
