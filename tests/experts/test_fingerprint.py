"""The fingerprint follows the base's values and nothing else."""

from __future__ import annotations

import os

import pytest
import torch
from helpers_experts import adapted
from helpers_tiny import ARCHITECTURES, build_tiny
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from sigmix.errors import ExpertError
from sigmix.experts.fingerprint import fingerprint
from sigmix.models import digests
from sigmix.models.loading import load_base
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


@pytest.fixture
def hashed(monkeypatch):
    """Grows with every hashed weight; small checkpoints store their digests on disk too."""
    calls = []
    hash_weight = digests.weight_digest
    monkeypatch.setattr(digests, "MIN_BYTES", 0)
    monkeypatch.setattr(digests, "weight_digest", lambda weight: calls.append(1) or hash_weight(weight))
    return calls


def test_an_unchanged_checkpoint_is_hashed_once(model_folder, hashed):
    model, _ = load_base(model_folder, dtype="float32")
    first = fingerprint(model)
    assert len(hashed) == len(list(model.parameters()))
    hashed.clear()
    again, _ = load_base(model_folder, dtype="float32")
    wrapped = adapted(again)  # the keys of the decomposition cache are these digests too
    assert fingerprint(wrapped) == first
    assert not hashed
    assert fingerprint(again, fresh=True) == first == fingerprint(build_tiny())
    narrow, _ = load_base(model_folder, dtype="bfloat16")
    assert fingerprint(narrow) != first


@pytest.mark.parametrize("edit", ["in place", "through .data", "replaced"])
def test_an_edited_weight_of_a_known_checkpoint_is_another_base(model_folder, hashed, edit):
    before = fingerprint(load_base(model_folder, dtype="float32")[0])
    model, _ = load_base(model_folder, dtype="float32")
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        if edit == "in place":
            weight[0, 0] += 1e-3
        elif edit == "through .data":
            weight.data += 1e-3
        else:
            model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight + 1e-3)
    assert fingerprint(model) == fingerprint(model, fresh=True) != before
    assert fingerprint(load_base(model_folder, dtype="float32")[0]) == before


def test_a_changed_file_of_a_known_checkpoint_is_another_base(model_folder, hashed):
    before = fingerprint(load_base(model_folder, dtype="float32")[0])
    file = model_folder / "model.safetensors"
    stat = file.stat()
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size and time of modification
    assert file.stat().st_size == stat.st_size
    model, _ = load_base(model_folder, dtype="float32")
    assert fingerprint(model) == fingerprint(model, fresh=True) != before


def test_a_damaged_file_of_digests_is_computed_again(model_folder, hashed, cache):
    before = fingerprint(load_base(model_folder, dtype="float32")[0])
    (file,) = (cache / "svd" / "ledgers").glob("weights-*.json")
    file.write_text('{"lm_head.weight": 3')
    assert fingerprint(load_base(model_folder, dtype="float32")[0]) == before
