"""Fingerprints follow the base's values and nothing else; sketches detect another basis and nothing else."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_experts import adapted
from helpers_tiny import ARCHITECTURES, build_tiny
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from sigmix.errors import ExpertError
from sigmix.experts.fingerprint import (
    PROBES,
    TOLERANCE,
    Sketch,
    compare,
    deviation,
    fingerprint,
    probes,
    sketch,
)
from sigmix.models import digests
from sigmix.models.loading import load_base
from sigmix.svf.decomposition import decompose
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


# --- sketches

FIRST = [-1.3500489312345667, 0.8868029944714887]
PATH = "model.layers.0.mlp.up_proj"


def near_equal(rows: int, columns: int):
    """A weight whose singular values 3 and 4 differ by 1e-7, its factors, and a z that differs there."""
    generator = torch.Generator().manual_seed(5)
    r = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, r, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(columns, r, generator=generator, dtype=torch.float64))[0]
    s = torch.linspace(2, 0.5, r, dtype=torch.float64)
    s[4] = s[3] * (1 - 1e-7)
    weight = (u * s) @ v.T
    z = 1 + 0.4 * (torch.rand(r, generator=generator) - 0.5)
    z[3], z[4] = 1.3, 0.8
    return weight, decompose(weight), z


def turned(factors, degrees: float):
    angle = torch.tensor(degrees).deg2rad()
    short = factors.short.clone()
    short[:, 3] = factors.short[:, 3] * angle.cos() + factors.short[:, 4] * angle.sin()
    short[:, 4] = factors.short[:, 4] * angle.cos() - factors.short[:, 3] * angle.sin()
    return replace(factors, short=short)


SHAPES = pytest.mark.parametrize("rows,columns", [(48, 20), (20, 48), (32, 32)])


@SHAPES
def test_values_are_probes_of_the_dense_delta(rows, columns):
    weight, factors, z = near_equal(rows, columns)
    u, s, v = factors.usv(weight)
    delta = (u.double() * s * (z.double() - 1)) @ v.double().T
    left, right = probes(PATH, rows, columns)
    found = sketch(PATH, weight, factors, z)
    torch.testing.assert_close(
        torch.tensor(found.values).double(), ((left @ delta) * right).sum(1), rtol=1e-5, atol=1e-6
    )
    assert found.norm == pytest.approx(float(delta.norm()), rel=1e-5)


@SHAPES
@pytest.mark.parametrize("degrees", [90, 45, 5])
def test_a_rotation_of_near_equal_singular_vectors_is_caught(rows, columns, degrees):
    weight, factors, z = near_equal(rows, columns)
    stored, found = (sketch(PATH, weight, f, z) for f in (factors, turned(factors, degrees)))
    with pytest.raises(ExpertError, match=rf"'math'.*{PATH}.*deviates by"):
        compare("math", PATH, stored, found)


@SHAPES
def test_a_rotation_among_equal_gains_is_no_change_and_passes(rows, columns):
    weight, factors, z = near_equal(rows, columns)
    z[4] = z[3]
    stored, found = (sketch(PATH, weight, f, z) for f in (factors, turned(factors, 45)))
    assert compare("math", PATH, stored, found) < 1e-6


@SHAPES
def test_signs_cancel(rows, columns):
    weight, factors, z = near_equal(rows, columns)
    signs = torch.ones(len(z))
    signs[::3] = -1
    flipped = replace(factors, short=factors.short * signs)
    assert deviation(*(sketch(PATH, weight, f, z) for f in (factors, flipped))) < 1e-12


def test_the_deviation_estimates_the_relative_error_of_the_delta():
    weight, factors, z = near_equal(48, 20)
    other = turned(factors, 45)
    deltas = [((weight @ f.short.double()) * (z.double() - 1)) @ f.short.double().T for f in (factors, other)]
    truth = float((deltas[0] - deltas[1]).norm() / deltas[0].norm())
    figures = [deviation(*(sketch(f"layer.{i}", weight, f, z) for f in (factors, other))) ** 2 for i in range(200)]
    assert np.mean(figures) ** 0.5 == pytest.approx(truth, rel=0.15)


def test_rounding_of_factors_to_float32_stays_far_below_the_tolerance():
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    factors = decompose(weight)
    z = 1 + 0.2 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    wide = torch.linalg.svd(weight.double(), full_matrices=False)  # another algorithm, in float64
    exact = replace(factors, short=wide.Vh.T.contiguous(), s=wide.S)
    assert deviation(sketch(PATH, weight, factors, z), sketch(PATH, weight, exact, z)) < TOLERANCE / 1000


def test_z_of_one_gives_zeros_and_matches_any_basis():
    weight, factors, z = near_equal(48, 20)
    stored = sketch(PATH, weight, factors, torch.ones_like(z))
    assert stored == Sketch(0.0, (0.0,) * PROBES)
    assert compare("math", PATH, stored, sketch(PATH, weight, turned(factors, 90), torch.ones_like(z))) == 0


def test_probes_are_standard_normal_and_depend_on_path_and_shape():
    left, right = probes(PATH, 3000, 2000)
    for side, n in ((left, 3000), (right, 2000)):
        assert side.shape == (PROBES, n)
        assert side.dtype == torch.float64
        assert float(side.mean()) == pytest.approx(0, abs=0.03)
        assert float(side.std()) == pytest.approx(1, abs=0.03)
        assert (side @ side.T / n - torch.eye(PROBES)).abs().max() < 0.12
    assert torch.equal(probes(PATH, 3000, 2000)[0], left)
    assert not torch.equal(probes("another", 3000, 2000)[0], left)
    # part of the file format: another stream would make every stored sketch wrong
    assert probes("a", 2, 3)[0][0].tolist() == pytest.approx(FIRST, abs=1e-12)


def test_json_keeps_every_bit_and_refuses_what_is_no_sketch():
    weight, factors, z = near_equal(48, 20)
    stored = sketch(PATH, weight, factors, z)
    assert Sketch.from_json(stored.to_json()) == stored
    for bad in ({}, {"norm": 1}, {"norm": 1, "values": [1.0]}, {"norm": "x", "values": [0] * 8}):
        with pytest.raises(ExpertError, match="sketch"):
            Sketch.from_json(bad)
