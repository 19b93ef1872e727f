"""The fingerprint follows the base's values and nothing else."""

from __future__ import annotations

import pytest
import torch
from helpers_experts import adapted
from helpers_tiny import ARCHITECTURES, build_tiny
from peft import LoraConfig, get_peft_model

from sigmix.errors import ExpertError
from sigmix.experts.fingerprint import fingerprint
from sigmix.svf.linears import linears, matrix_of
from sigmix.svf.tuner import svf_layers

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_plain_wrapped_adapted_and_merged_are_one_base(arch):
    plain = fingerprint(build_tiny(arch))
    model = build_tiny(arch)
    wrapped = adapted(model)
    assert fingerprint(wrapped) == fingerprint(wrapped.base_model) == fingerprint(model) == plain
    wrapped.merge_adapter()
    assert fingerprint(wrapped) == fingerprint(wrapped, fresh=True) == plain
    wrapped.unmerge_adapter()
    assert fingerprint(wrapped) == plain
    assert fingerprint(wrapped.unload(), fresh=True) == plain


def test_every_change_of_a_value_shows(tiny_llama):
    before = fingerprint(tiny_llama)
    assert fingerprint(build_tiny(seed=1)) != before
    with torch.no_grad():
        tiny_llama.model.norm.weight[3] += 1e-3
    after = fingerprint(tiny_llama)
    assert after != before
    assert after == fingerprint(tiny_llama, fresh=True)


def test_training_z_changes_nothing(tiny_llama):
    wrapped = adapted(tiny_llama, seed=0)
    before = fingerprint(wrapped)
    with torch.no_grad():
        next(iter(svf_layers(wrapped).values())).svf_z["default"].weight.zero_()
    assert fingerprint(wrapped, fresh=True) == before


def test_an_exact_upcast_is_the_same_base_and_a_rounding_is_not(tiny_llama):
    before = fingerprint(tiny_llama)
    narrow = tiny_llama.to(torch.bfloat16)
    rounded = fingerprint(narrow)
    assert rounded != before
    assert fingerprint(narrow.float()) == rounded


def test_another_tensor_at_the_same_place_is_not_taken_for_the_old_one():
    prints = set()
    for seed in range(4):  # freed and allocated again, so addresses and ids recur
        prints.add(fingerprint(build_tiny(seed=seed)))
    assert len(prints) == 4


def test_a_merged_lora_is_another_base_and_an_unmerged_one_is_not(tiny_llama):
    before = fingerprint(tiny_llama)
    wrapped = get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert fingerprint(wrapped) == before
    wrapped.merge_adapter()  # edits weights through .data, which torch does not count
    assert fingerprint(wrapped) != before


def test_trained_copies_of_whole_modules_are_left_out(tiny):
    model = tiny(tie_word_embeddings=False)
    before = fingerprint(model)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert fingerprint(get_peft_model(model, config)) == before


def test_untying_weights_shows(tiny):
    tied, untied = tiny(), tiny(tie_word_embeddings=False)
    assert fingerprint(tied) != fingerprint(untied)


def test_meta_weights_are_an_error(tiny_llama):
    with pytest.raises(ExpertError, match="meta device"):
        fingerprint(tiny_llama.to("meta"))


def test_linears_are_named_as_in_the_base_and_give_the_original_weight(tiny):
    model = tiny("gpt2")
    plain = {path: matrix_of(module).clone() for path, module in linears(model).items()}
    wrapped = adapted(model)
    wrapped.merge_adapter()
    found = linears(wrapped)
    assert set(found) == set(plain)
    assert all(torch.equal(matrix_of(found[path]), plain[path]) for path in plain)
    assert plain["transformer.h.0.attn.c_attn"].shape == (192, 64)
