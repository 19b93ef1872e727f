"""The contestants of train-step compute the same thing; the figures around them are what they say."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import train_step
from benchmarks.dense import Dense
from benchmarks.train_step import Loop, Setting, agreement, contestant, counted_flops
from sigmix.errors import SigmixError


@pytest.fixture
def setting(model_folder, cache):
    return Setting(base=str(model_folder), dtype="float32", batch=8, new_tokens=4)


@pytest.mark.parametrize("group", [None, 1])
def test_ours_and_the_dense_way_agree_on_the_gradient_of_z(setting, group):
    found = agreement(replace(setting, group=group))
    assert found["rows"] == 8
    assert found["gradient_norm"] > 1e-3  # they do not agree on nothing
    assert found["cosine"] > 1 - 1e-6
    assert found["lowest_cosine_of_a_matrix"] > 1 - 1e-4
    assert found["relative_difference"] < 1e-3
    assert found["loss_ours"] == pytest.approx(found["loss_dense"], rel=1e-4, abs=1e-5)


def test_a_peer_that_computes_something_else_is_noticed(setting, monkeypatch):
    real = Dense.compose

    def wrong(self, name):
        return real(self, name) * (1.5 if name.endswith("down_proj") else 1.0)

    monkeypatch.setattr(Dense, "compose", wrong)
    with pytest.raises(SigmixError, match="disagree on the gradient of z"):
        train_step.run(repeats=1, memory=False, **setting.__dict__)


def test_the_dense_peers_gradient_of_z_is_autograds_through_the_composition(setting):
    # its two backward passes, against one through a model whose weights are functions of z
    dense = contestant(setting, "dense", max_grad_norm=1e30)
    ids = torch.tensor([[5, 9, 70, 33, 8]])
    with torch.no_grad():
        for z in dense.z.values():
            z.mul_(1.1)
    weights = {f"{name}.weight": dense.compose(name) for name in dense.z}
    functional = torch.func.functional_call(dense.model, weights, kwargs={"input_ids": ids})
    expected = torch.autograd.grad(functional.logits.square().mean(), list(dense.z.values()))
    dense._load(composed=True)
    dense.model(input_ids=ids).logits.square().mean().backward()
    for name, one in zip(dense.z, expected, strict=True):
        dense.compose(name).backward(dense.modules[name].weight.grad)
        torch.testing.assert_close(dense.z[name].grad, one, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", train_step.CONTESTANTS)
def test_a_step_of_each_gives_answers_of_one_length_and_changes_what_it_trains(setting, name):
    one = contestant(setting, name, baseline="none")  # a random model's rewards are all alike
    parameters = one.policy.parameters() if isinstance(one, Loop) else one.z
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    for number in range(2):  # the first LoRA step cannot move A, whose gradient is through B = 0
        figures = one.step(number, setting.samples(number))
        assert figures["completion_tokens"] == setting.new_tokens
    assert all(not torch.equal(before[key], parameters[key]) for key in before)


def test_the_flops_are_those_of_the_matrices(setting):
    ours = contestant(setting, "ours")
    found = counted_flops(ours, setting.samples(0))
    layers = ours.policy.layers.values()
    merge = sum(2 * layer.out_features * layer.in_features * layer.r for layer in layers)
    weights = sum(layer.out_features * layer.in_features for layer in layers)
    tokens = setting.batch * (setting.new_tokens - 1)  # at least each answer, in four passes
    assert found["total"] > 0
    assert found["total"] == sum(count for operator, count in found.items() if operator != "total")
    assert found["total"] > 4 * 2 * weights * tokens
    assert found["total"] < 40 * 2 * weights * setting.batch * 100 + 3 * merge


@pytest.mark.slow
def test_the_whole_report_on_a_tiny_model(setting, monkeypatch):
    monkeypatch.setattr(train_step, "PEAK_SIZES", ((64, 64, 64),))
    options = {**setting.__dict__}
    result = train_step.run(repeats=2, memory=True, **options)
    json.dumps(result, allow_nan=False)
    assert set(result["ratios"]) == set(result["aims"]) == set(train_step.AIMS)
    raw = result["raw"]
    assert result["device"]["dtype"] == "float32"
    assert all(len(taken) == 2 for taken in raw["seconds"].values())
    ours, dense = raw["seconds"]["ours"], raw["seconds"]["dense"]
    assert raw["ratios_by_repeat"]["speedup_vs_dense"] == [b / a for a, b in zip(ours, dense, strict=True)]
    floor = raw["flops_of_our_step"]["total"] / raw["matmul_flops_per_second"][0]
    assert raw["seconds"]["floor"][0] == pytest.approx(floor)
    for peak in raw["peak_memory_bytes"].values():
        assert peak["peak"] >= peak["ready"] >= peak["imported"] > 0
