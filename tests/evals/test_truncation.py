"""A truncated change on a base's weights: what a reader of the file adds, and nothing is left of it afterwards."""

from __future__ import annotations

import pytest
import torch
from helpers_engine import TOLERANCE
from helpers_export import base_folder, experts, ids

from sigmix.engine import Engine
from sigmix.errors import ConfigError
from sigmix.evals.truncation import changed_weights, check_kept, measure
from sigmix.experts.mix import Mix
from sigmix.export.base import BaseCheckpoint
from sigmix.export.low_rank import LowRank
from sigmix.models.loading import load_base
from sigmix.tasks.base import Sample, Score, Task

MIX = Mix.parse("math:0.7+word:0.5")


class Odd(Task):
    """Right if the reply's bytes have an odd sum, so that about half of any replies is."""

    name, domain, max_new_tokens = "odd", "odd", 4

    def samples(self, split, n=None, seed=0):
        return [Sample.make(f"{i} of {7 * i}", "a") for i in range(n)]

    def score(self, sample, reply):
        return Score.of(sum(reply.encode()) % 2 == 1, reply)


class Long(Odd):
    name = "long"

    def samples(self, split, n=None, seed=0):
        return [Sample.make("a b c " * 300, "a")]


def opened(tmp_path, arch="llama", dtype=torch.float32):
    folder, bank = base_folder(tmp_path / "base", arch, dtype), experts(arch, dtype)
    name = str(dtype).removeprefix("torch.")
    return BaseCheckpoint(folder, name), bank, Engine(*load_base(folder, name), bank, keep_packed=0)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_scaled_factors_are_added_as_the_file_has_them(tmp_path, cache, arch, kind):
    source, bank, engine = opened(tmp_path, arch)
    adapters = [(LowRank.from_mix(source, Mix.one(name), bank), alpha) for name, alpha in MIX.weights.items()]
    for low, _ in adapters:
        low.set_ranks(rank=5)
    dtype = getattr(torch, kind)
    weights = changed_weights(engine, adapters, dtype)
    assert set(weights) == set(engine.layers)
    for path, weight in weights.items():
        layer = engine.layers[path]
        expected = layer.matrix().double()
        for low, alpha in adapters:
            a, b = (factor.to(dtype).double() for factor in low.factors(path))
            expected = expected + alpha * (b @ a)
        assert weight.is_contiguous()
        torch.testing.assert_close((weight.T if layer.transposed else weight).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_at_full_rank_it_is_the_mixture_and_afterwards_the_base(tmp_path, cache, arch):
    source, bank, engine = opened(tmp_path, arch)
    low = LowRank.from_mix(source, MIX, bank)
    row = torch.tensor([ids()])
    before = {name: parameter.clone() for name, parameter in engine.model.named_parameters()}
    base, mixed = engine.logits(row), engine.logits(row, mix=MIX)
    places = {name: parameter.data_ptr() for name, parameter in engine.model.named_parameters()}
    with engine.execution.other_base(changed_weights(engine, [(low, 1.0)], torch.float32)):
        torch.testing.assert_close(engine.logits(row), mixed, **TOLERANCE)
    assert places == {name: parameter.data_ptr() for name, parameter in engine.model.named_parameters()}
    assert all(torch.equal(parameter, before[name]) for name, parameter in engine.model.named_parameters())
    assert torch.equal(engine.logits(row), base)
    assert torch.equal(engine.logits(row, mix=MIX), mixed)


def test_the_base_is_restored_after_an_error(tmp_path, cache):
    source, bank, engine = opened(tmp_path)
    low = LowRank.from_mix(source, MIX, bank)
    base = engine.logits(torch.tensor([ids()]))
    weights = changed_weights(engine, [(low, 1.0)], torch.float32)
    with pytest.raises(KeyboardInterrupt), engine.execution.other_base(weights):
        raise KeyboardInterrupt
    assert torch.equal(engine.logits(torch.tensor([ids()])), base)


def test_one_engine_measures_many_ranks(tmp_path, cache):
    source, bank, engine = opened(tmp_path)
    low = LowRank.from_mix(source, MIX, bank)
    for rank in (1, 24, 4):
        low.set_ranks(rank=rank)
        rows, failed = measure(engine, MIX, {"odd": Odd()}, [(low, 1.0)], torch.float32, n=30)
        fresh = Engine(*load_base(source.folder, "float32"), bank)
        alone, _ = measure(fresh, MIX, {"odd": Odd()}, [(low, 1.0)], torch.float32, n=30)
        assert rows == alone
        assert not failed
        assert {rows[0][kind]["n"] for kind in ("base", "exact", "truncated")} == {30}


def test_no_prefix_is_read_with_the_weights_of_another_truncation(tmp_path, cache):
    source, bank, engine = opened(tmp_path)
    low = LowRank.from_mix(source, MIX, bank)
    prompts = ["a prefix that is long enough to be cached: " + text for text in ("one", "two")]
    low.set_ranks(rank=1)
    weights = changed_weights(engine, [(low, 1.0)], torch.float32)
    with engine.execution.other_base(weights):
        engine.generate(prompts, max_new_tokens=4)
    low.set_ranks(rank=40)
    for path, weight in changed_weights(engine, [(low, 1.0)], torch.float32).items():
        weights[path].copy_(weight)  # at the address of the first, as the allocator may have it
    with engine.execution.other_base(weights):
        found = [one.logprobs for one in engine.generate(prompts, max_new_tokens=4)]
    fresh = Engine(*load_base(source.folder, "float32"), bank)
    with fresh.execution.other_base(weights):
        assert found == [one.logprobs for one in fresh.generate(prompts, max_new_tokens=4)]


def test_half_precision_is_rounded_once(tmp_path, cache):
    source, bank, engine = opened(tmp_path, dtype=torch.bfloat16)
    low = LowRank.from_mix(source, MIX, bank)
    for path, weight in changed_weights(engine, [(low, 1.0)], torch.bfloat16).items():
        a, b = (factor.bfloat16().float() for factor in low.factors(path))
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, (engine.layers[path].matrix().float() + b @ a).bfloat16())


def test_a_task_that_does_not_fit_the_base_is_named(tmp_path, cache):
    source, bank, engine = opened(tmp_path)
    low = LowRank.from_mix(source, MIX, bank)
    low.set_ranks(rank=4)
    rows, failed = measure(engine, MIX, {"long": Long(), "odd": Odd()}, [(low, 1.0)], torch.float32, n=4)
    assert [row["task"] for row in rows] == ["odd"]
    assert set(failed) == {"long"}


def figures(base, exact, truncated, kept, task="odd"):
    accuracies = {"base": base, "exact": exact, "truncated": truncated}
    return {"task": task, "kept": kept, **{kind: {"accuracy": value} for kind, value in accuracies.items()}}


def test_the_task_with_the_largest_loss_decides():
    rows = [figures(0.1, 0.9, 0.86, 0.95), figures(0.5, 0.6, 0.4, -1.0, "worse"), figures(0.5, 0.4, 0.1, None)]
    check_kept(rows, 0.0, "m", "more")
    check_kept(rows[::2], 0.9, "m", "more")
    with pytest.raises(ConfigError, match="worse.*0.400.*0.600.*0.500.*more"):
        check_kept(rows, 0.01, "m", "more")
