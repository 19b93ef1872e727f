"""Layers with one input are found, and computing them together changes nothing, however they are called."""

from __future__ import annotations

import pytest
import torch
from helpers_engine import expert

from sigmix.engine import Engine
from sigmix.engine.cpu_kernels import Shared, find_groups
from sigmix.engine.execution import adapted_layers

pytestmark = pytest.mark.usefixtures("cache")


def names(model):
    return [[path.split(".")[-1] for path in group.paths] for group in find_groups(model, adapted_layers(model))]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3", "mistral"])
def test_queries_keys_and_values_share_their_input_and_so_do_gate_and_up(tiny, arch):
    found = names(tiny(arch))
    assert found[:4] == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert len(found) == 4 * tiny(arch).config.num_hidden_layers


def test_layers_that_are_no_linear_layers_are_left_out(tiny):
    assert find_groups(tiny("gpt2"), adapted_layers(tiny("gpt2"))) == []  # Conv1D throughout


def test_every_linear_layer_is_in_one_group_and_knows_its_place(tiny):
    model = tiny("llama")
    layers = adapted_layers(model)
    offset = 0
    for group in find_groups(model, layers):
        assert group.first == offset
        offset += sum(group.ranks)
    assert offset == sum(layer.r for layer in layers.values())


def test_only_the_same_tensor_counts_as_the_same_input():
    computed = []

    def both(x):
        computed.append(x)
        return [x + 1, x + 2]

    shared = Shared(both)
    x = torch.zeros(2)
    assert shared.take(0, x)[0] == 1
    assert shared.take(1, x)[0] == 2
    assert len(computed) == 1
    y = torch.zeros(2)  # equal, but another
    assert shared.take(1, y)[0] == 2
    assert shared.take(1, y)[0] == 2  # asked for twice: computed again rather than guessed
    assert shared.take(0, x)[0] == 1
    assert len(computed) == 4


def test_watching_leaves_the_model_as_it_was(tiny, tiny_tokenizer):
    model = tiny("llama")
    bank = {"a": expert(tiny("llama"), "a", 1)}
    before = Engine(tiny("llama"), tiny_tokenizer, bank).generate([[5, 6, 7]], "a", max_new_tokens=4)
    engine = Engine(model, tiny_tokenizer, bank)
    find_groups(model, engine.layers)
    assert engine.generate([[5, 6, 7]], "a", max_new_tokens=4) == before
    assert not any(layer._forward_pre_hooks for layer in engine.layers.values())
