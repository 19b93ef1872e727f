"""Experts pass through PEFT in both directions, and load only on the base where they belong."""

from __future__ import annotations

import pytest
import torch
from helpers_experts import adapted, logits, random_expert
from helpers_tiny import build_tiny
from peft import AutoPeftModelForCausalLM, PeftModel

from sigmix.errors import ExpertError, FingerprintError
from sigmix.experts.expert import Expert, seal
from sigmix.svf.tuner import svf_layers

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def named(tmp_path):
    """A base folder, so that the base has a name from which PEFT can load it."""
    build_tiny().save_pretrained(tmp_path / "tiny-base")
    return tmp_path / "tiny-base"


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# --- PEFT, both ways


def test_peft_loads_what_we_save(tiny, tmp_path):
    wrapped = adapted(tiny())
    expert = Expert.from_model(wrapped, name="a")
    expert.save_pretrained(tmp_path / "a")
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "a").eval()
    assert torch.equal(logits(loaded), logits(wrapped))
    assert not torch.equal(logits(loaded), logits(tiny()))
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if "svf_z" in n)


def test_auto_peft_loads_what_we_save(named, tmp_path):
    wrapped = adapted(load(named))
    Expert.from_model(wrapped, name="a").save_pretrained(tmp_path / "a")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32).eval()
    assert torch.equal(logits(loaded), logits(wrapped))


@pytest.mark.parametrize("arch", ["gpt2", "gemma3", "phi3"])
def test_other_architectures_through_peft(tiny, tmp_path, arch):
    wrapped = adapted(tiny(arch))
    expert = Expert.from_model(wrapped, name="a")
    expert.save_pretrained(tmp_path / "a")
    base = tiny(arch)
    Expert.from_pretrained(tmp_path / "a", base=base)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "a").eval()), logits(wrapped))


def test_only_the_experts_own_layers_are_adapted(tiny, tmp_path):
    wrapped = adapted(tiny(num_hidden_layers=12), targets=["model.layers.1.self_attn.q_proj"])
    Expert.from_model(wrapped, name="a").save_pretrained(tmp_path / "a")
    loaded = PeftModel.from_pretrained(tiny(num_hidden_layers=12), tmp_path / "a")
    assert list(svf_layers(loaded)) == ["model.layers.1.self_attn.q_proj"]


def test_we_load_what_peft_saves_as_unverified(tiny, tmp_path):
    wrapped = adapted(tiny())
    wrapped.save_pretrained(tmp_path / "Checkpoint 10")
    expert = Expert.from_pretrained(tmp_path / "Checkpoint 10", base=tiny())
    assert not expert.verified
    assert expert.name == "checkpoint-10"
    assert expert.z.keys() == svf_layers(wrapped).keys()
    assert expert.digest == Expert.from_model(wrapped, name="a").digest
    expert.save_pretrained(tmp_path / "again")
    assert Expert.from_pretrained(tmp_path / "again") == expert


def test_seal_makes_it_verified_and_leaves_other_files(tiny, tmp_path):
    wrapped = adapted(tiny())
    wrapped.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "trainer_state.json").write_text("{}")
    readme = (tmp_path / "run" / "README.md").read_text()  # PEFT's own
    sealed = seal(tmp_path / "run", tiny(), name="sums", meta={"domain": "arithmetic"})
    assert Expert.from_pretrained(tmp_path / "run", base=tiny()) == sealed
    assert sealed == Expert.from_model(wrapped, name="sums", meta={"domain": "arithmetic"})
    assert (tmp_path / "run" / "README.md").read_text() == readme
    assert (tmp_path / "run" / "trainer_state.json").exists()
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), tmp_path / "run").eval()), logits(wrapped))
    before = (tmp_path / "run" / "sigmix.json").read_bytes()
    assert seal(tmp_path / "run", tiny()) == sealed
    assert (tmp_path / "run" / "sigmix.json").read_bytes() == before
    with pytest.raises(FingerprintError):
        seal(tmp_path / "run", tiny(seed=1))


def test_seal_refuses_a_base_that_cannot_be_it(tiny, tmp_path):
    adapted(tiny()).save_pretrained(tmp_path / "run")
    with pytest.raises(ExpertError, match="does not fit this base"):
        seal(tmp_path / "run", tiny(hidden_size=32))
    assert not (tmp_path / "run" / "sigmix.json").exists()


def test_seal_writes_a_card_where_there_is_none(tiny, tmp_path):
    adapted(tiny()).save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "README.md").unlink()
    seal(tmp_path / "run", tiny())
    assert "# run" in (tmp_path / "run" / "README.md").read_text()


# --- fitting a base


def test_another_base_is_an_error_that_names_both(tiny):
    mine, other = tiny(), tiny(seed=1)
    mine.sigmix_base, other.sigmix_base = {"name": "smollm2-135m"}, {"name": "someone/else"}
    expert = random_expert(mine)
    with pytest.raises(FingerprintError) as caught:
        expert.check(other)
    text = str(caught.value)
    assert "'arithmetic' was made on smollm2-135m in float32 (fingerprint " in text
    assert "this base is someone/else in float32 (fingerprint " in text
    assert expert.meta["base"]["fingerprint"][:12] in text
    assert "load_base('smollm2-135m')" in text
    expert.check(mine)


def test_the_same_name_in_another_dtype(tiny):
    expert = random_expert(tiny())
    with pytest.raises(FingerprintError, match=r"load it with dtype='float32'"):
        expert.check(tiny().to(torch.bfloat16))


def test_the_same_name_with_other_weights(tiny):
    expert = random_expert(tiny())
    with pytest.raises(FingerprintError, match="another revision, or weights changed after loading"):
        expert.check(tiny(seed=1))


def test_a_bfloat16_base_and_its_upcast_are_one_base_with_equal_sketches(tiny):
    narrow, wide = tiny().bfloat16(), tiny().bfloat16().float()
    trained_narrow = Expert.from_model(adapted(narrow), name="a")
    trained_wide = Expert.from_model(adapted(wide), name="a")
    assert trained_narrow.meta["sketches"] == trained_wide.meta["sketches"]
    for base in (narrow, wide, tiny().bfloat16(), tiny().bfloat16().float()):  # adapted and plain
        trained_narrow.check(base, tolerance=1e-6)
        trained_wide.check(base, tolerance=1e-6)


def test_a_rotated_basis_in_use_is_caught_and_flipped_signs_are_not(tiny):
    model = tiny()
    with torch.no_grad():  # two equal singular values: any rotation of their vectors is a valid decomposition
        weight = model.model.layers[0].self_attn.q_proj.weight
        u, s, vh = torch.linalg.svd(weight)
        s[5] = s[4]
        weight.copy_((u * s) @ vh)
    wrapped = adapted(model)
    expert = Expert.from_model(wrapped, name="a")
    layer = svf_layers(wrapped)["model.layers.0.self_attn.q_proj"]
    layer.svf_short[:, ::2] *= -1
    expert.check(wrapped)
    layer.svf_short[:, [4, 5]] = torch.stack(
        [layer.svf_short[:, 4] + layer.svf_short[:, 5], layer.svf_short[:, 4] - layer.svf_short[:, 5]], 1
    ) * (0.5**0.5)
    with pytest.raises(ExpertError, match=r"singular vectors of model\.layers\.0\.self_attn\.q_proj .* deviates by 0"):
        expert.check(wrapped)
    expert.check(wrapped, sketches=False)


def test_matrices_that_the_base_lacks_or_has_in_another_size(tiny):
    path = "model.layers.0.self_attn.q_proj"
    with pytest.raises(ExpertError, match=r"lacks 1 of its 2 matrices: .*model\.layers\.9.*nearest: model\.layers\."):
        Expert("x", {path: torch.ones(64), "model.layers.9.self_attn.q_proj": torch.ones(64)}).check(tiny())
    with pytest.raises(ExpertError, match=f"z of {path} has 60 components, but the matrix is 64×64"):
        Expert("x", {path: torch.ones(60)}).check(tiny())


@pytest.mark.real
def test_the_default_base_in_both_dtypes(smollm):
    from sigmix.models.loading import load_base

    model, _ = smollm
    paths = [f"model.layers.{i}.{name}" for i in (0, 29) for name in ("self_attn.k_proj", "mlp.down_proj")]
    sizes = {path: min(model.get_submodule(path).weight.shape) for path in paths}
    z = {path: 1 + 0.1 * torch.rand(size, generator=torch.Generator().manual_seed(0)) for path, size in sizes.items()}
    expert = Expert("real", z).sealed(model)
    assert expert.meta["base"]["name"] == "smollm2-135m"
    for dtype in ("float32", "bfloat16"):
        # by folder: the cache is empty here, and the default would be fetched again
        expert.check(load_base(model.sigmix_base["source"], dtype=dtype)[0])
