"""Experts of a plain base on its quantised form, in the basis that they were trained in."""

from __future__ import annotations

import pytest
import torch
from helpers_tiny import build_tiny, build_tokenizer
from peft import get_peft_model

from sigmix import Engine, Expert, Mix, SVFConfig, load_base
from sigmix.errors import CacheError, ConfigError, ExpertError, FingerprintError
from sigmix.experts.fingerprint import fingerprint
from sigmix.experts.original_basis import use_original_basis
from sigmix.svf import decomposition as module
from sigmix.svf.decomposition import cached_decompose
from sigmix.svf.linears import linears, matrix_of
from sigmix.svf.tuner import svf_layers

pytest.importorskip("torchao")
pytestmark = pytest.mark.usefixtures("cache")
IDS = torch.tensor([[5, 9, 33, 71, 120, 8], [77, 3, 250, 14, 14, 60]])


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "base"
    build_tiny().save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def expert_on(model, name="mine", seed=0):
    adapted = get_peft_model(model, SVFConfig())
    for number, layer in enumerate(svf_layers(adapted).values()):
        draw = torch.Generator().manual_seed(100 * seed + number)
        layer.svf_z["default"].weight.data.copy_(1 + 0.3 * torch.randn(layer.r, generator=draw))
    return Expert.from_model(adapted, name=name)


@torch.no_grad()
def defined(folder, quantised, expert):
    """float64 logits by the definition: W_q (1 + V diag(g) Vᵀ) or (1 + U diag(g) Uᵀ) W_q, V and U of the original."""
    model = load_base(folder, "float64")[0]
    held = linears(quantised)
    for path, layer in linears(model).items():
        if path not in expert.z:
            continue
        factors, weight = cached_decompose(matrix_of(layer)), matrix_of(held[path]).double()
        basis, gain = factors.short.double(), (expert.z[path] - 1).double()
        turned = (basis * gain) @ basis.T
        layer.weight.data = weight + (weight @ turned if factors.side == "in" else turned @ weight)
    return model(IDS).logits


@pytest.mark.parametrize("adapted", [False, True])
def test_an_expert_is_used_in_its_own_basis(folder, adapted, monkeypatch):
    plain, tokenizer = load_base(folder, "float32")
    expert = expert_on(plain)
    quantised = load_base(folder, "float32", quantization_config="int8")[0]
    with torch.no_grad():
        base = quantised(IDS).logits
    if adapted:
        Engine(quantised, tokenizer)
    with pytest.raises(FingerprintError):
        expert.check(quantised)
    monkeypatch.setattr(module, "decompose", None)  # all that is needed is in the cache
    original = use_original_basis(quantised)
    assert original.fingerprint == fingerprint(load_base(folder, "float32")[0])
    assert fingerprint(quantised) != original.fingerprint
    expert.check(quantised)
    engine = Engine(quantised, tokenizer, {"mine": expert})
    found = engine.logits(IDS, None, [Mix.one("mine"), Mix.base()])
    torch.testing.assert_close(found[0].double(), defined(folder, quantised, expert)[0], rtol=1e-3, atol=1e-4)
    assert torch.equal(found[1], base[1])
    with torch.no_grad():
        whole = Engine(load_base(folder, "float32")[0], tokenizer, {"mine": expert}).logits(IDS, None, "mine")
    change, off = (found[0] - base[0]).norm(), (found[0] - whole[0]).norm()
    assert 0 < off < 0.1 * change, "the deviation is a small part of what the expert does"


def test_it_holds_experts_to_the_original_and_to_their_basis(folder, tmp_path):
    expert = expert_on(load_base(folder, "float32")[0])
    other = tmp_path / "other"
    build_tiny(seed=3).save_pretrained(other)
    build_tokenizer().save_pretrained(other)
    foreign = expert_on(load_base(other, "float32")[0])
    quantised = load_base(folder, "float32", quantization_config="int8")[0]
    own = expert_on(load_base(folder, "float32", quantization_config="int8")[0])
    use_original_basis(quantised)
    with pytest.raises(FingerprintError):
        foreign.check(quantised)
    with pytest.raises(ExpertError, match="singular vectors"):
        own.check(quantised)  # made on this very base, in the basis that it has no more
    path = next(iter(expert.z))
    z = {**expert.z, path: expert.z[path].flip(0)}  # as if its basis had been rotated
    with pytest.raises(ExpertError, match="singular vectors"):
        Expert("turned", z, expert.meta).check(quantised)


def test_an_expert_trained_in_the_original_basis_is_marked(folder, tmp_path):
    def quantised():
        return load_base(folder, "float32", quantization_config="int8")[0]

    trained_on = quantised()
    use_original_basis(trained_on)
    expert = expert_on(trained_on)
    assert expert.meta["base"]["basis"] == "original"
    assert "basis" not in expert_on(quantised()).meta["base"]
    again = Expert.from_pretrained(expert.save_pretrained(tmp_path / "mine"))
    again.check(trained_on)
    for sketches in (True, False):
        with pytest.raises(ExpertError, match="--basis original"):
            again.check(quantised(), sketches=sketches)


def test_a_decomposition_that_has_gone_is_never_replaced_by_another_ones(folder, cache):
    quantised = load_base(folder, "float32", quantization_config="int8")[0]
    use_original_basis(quantised)
    for path in cache.rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(CacheError, match="sigmix decompose"):
        get_peft_model(quantised, SVFConfig())


def test_only_a_quantised_base_has_an_original(folder):
    with pytest.raises(ConfigError, match="quantization_config"):
        use_original_basis(load_base(folder)[0])
