"""An expert goes from a model to disk and back, and cannot be changed on the way."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
import yaml
from helpers_experts import adapted, random_expert
from helpers_tiny import build_tiny
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sigmix.errors import ExpertError, OutputError, UnknownNameError
from sigmix.experts import expert as module
from sigmix.experts.expert import Expert
from sigmix.experts.metadata import thaw
from sigmix.svf.config import SVFConfig
from sigmix.svf.tuner import svf_layers

pytestmark = pytest.mark.usefixtures("cache")

META = {
    "domain": "arithmetic",
    "description": "Adds numbers.",
    "objective": "reinforce",
    "seed": 3,
    "license": "apache-2.0",
    "metrics": [{"name": "accuracy", "value": 0.61, "n": 500, "interval": [0.57, 0.65], "base": 0.12}],
}


@pytest.fixture
def named(tmp_path):
    """A base folder, so that the base has a name from which PEFT can load it."""
    build_tiny().save_pretrained(tmp_path / "tiny-base")
    return tmp_path / "tiny-base"


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# --- making


def test_from_model_takes_z_base_matrices_and_sketches(tiny_llama):
    wrapped = adapted(tiny_llama)
    expert = Expert.from_model(wrapped, name="arithmetic", meta=META)
    layers = svf_layers(wrapped)
    assert set(expert.z) == set(layers) == set(expert.meta["matrices"]) == set(expert.meta["sketches"])
    for path, z in expert.z.items():
        assert z.dtype == torch.float32
        assert torch.equal(z, layers[path].svf_z["default"].weight)
    assert expert.meta["matrices"]["model.layers.0.mlp.up_proj"] == (96, 64)
    assert expert.meta["base"]["dtype"] == "float32"
    assert expert.verified
    assert expert.meta["metrics"][0]["n"] == 500


def test_a_merged_model_gives_the_same_expert(tiny_llama):
    wrapped = adapted(tiny_llama)
    before = Expert.from_model(wrapped, name="a")
    wrapped.merge_adapter()
    assert Expert.from_model(wrapped, name="a") == before


def test_it_is_a_copy_that_later_training_does_not_touch(tiny_llama):
    wrapped = adapted(tiny_llama)
    expert = Expert.from_model(wrapped, name="a")
    digest = expert.digest
    with torch.no_grad():
        for layer in svf_layers(wrapped).values():
            layer.svf_z["default"].weight.zero_()
    assert replace(expert).digest == digest


def test_one_of_several_adapters(tiny_llama):
    wrapped = adapted(tiny_llama)
    wrapped.add_adapter("second", SVFConfig(target_modules=["q_proj"]))
    expert = Expert.from_model(wrapped, "second", name="a")
    assert sorted(expert.z) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    with pytest.raises(UnknownNameError, match=r"adapter 'secnod'.*second"):
        Expert.from_model(wrapped, "secnod", name="a")


def test_a_model_without_svf_has_no_expert(tiny_llama):
    with pytest.raises(ExpertError, match="SVFConfig"):
        Expert.from_model(get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"])), name="a")


def test_it_cannot_be_changed(tiny_llama):
    expert = random_expert(tiny_llama, **META)
    with pytest.raises(FrozenInstanceError):
        expert.name = "b"
    with pytest.raises(TypeError):
        expert.z["x"] = torch.ones(1)
    with pytest.raises(TypeError):
        expert.meta["metrics"][0]["value"] = 1.0


def test_equality_is_by_content(tiny_llama):
    expert = random_expert(tiny_llama, **META)
    assert expert == replace(expert)
    assert hash(expert) == hash(replace(expert))
    assert expert != replace(expert, name="other")
    assert expert != expert.with_meta(domain="sums")
    path = next(iter(expert.z))
    other = replace(expert, z={**expert.z, path: expert.z[path].nextafter(torch.tensor(9.0))})
    assert other.digest != expert.digest
    assert other != expert


def test_metadata_can_be_replaced_but_not_invented(tiny_llama):
    expert = random_expert(tiny_llama, **META)
    changed = expert.with_meta(metrics=[], domain=None)
    assert changed.meta["metrics"] == ()
    assert "domain" not in changed.meta
    assert changed.meta["base"] == expert.meta["base"]
    with pytest.raises(UnknownNameError, match=r"metadata key 'metricz'; nearest: metrics"):
        expert.with_meta(metricz=[])
    with pytest.raises(UnknownNameError, match="metadata key 'base'"):
        expert.with_meta(base={})


@pytest.mark.parametrize(
    "name", ["", "Arithmetic", "../up", "a/b", "a\\b", ".hidden", "-a", "a b", "a+b", "a:1", "ä", 7]
)
def test_names_that_cannot_be(name):
    with pytest.raises(ExpertError, match=re.escape(repr(name))):
        Expert(name, {"a": torch.ones(3)})


def test_the_name_base_is_taken():
    with pytest.raises(ExpertError, match="'base'"):
        Expert("base", {"a": torch.ones(3)})


@pytest.mark.parametrize(
    "z,names",
    [
        (torch.tensor([1.0, float("nan")]), " 1 NaN"),
        (torch.tensor([1.0, float("inf")]), " 1 NaN"),
        (torch.tensor([1.0, -0.25]), "negative.*-0.25"),
        (torch.ones(2, 2), r"\(2, 2\)"),
        (torch.ones(2, dtype=torch.int64), "int64"),
        ([1.0], "list"),
    ],
)
def test_values_that_cannot_be(z, names):
    with pytest.raises(ExpertError, match=f"'x'.*layer.a .*{names}"):
        Expert("x", {"layer.a": z})


def test_no_z_at_all_is_an_error():
    with pytest.raises(ExpertError, match="'x'"):
        Expert("x", {})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_converted(dtype):
    assert Expert("x", {"a": torch.tensor([0.5, 1.25], dtype=dtype)}).z["a"].dtype == torch.float32


@pytest.mark.parametrize(
    "meta,names",
    [
        ({"seed": float("nan")}, "JSON"),
        ({"task": object()}, "JSON"),
        ({"metrics": "high"}, "'metrics'"),
        ({"metrics": ["high"]}, "'metrics'"),
        ({"domain": 3}, "'domain'"),
        ({"base": {"fingerprint": 5}}, "'base'.*'fingerprint'"),
        ({"base": "smollm2-135m"}, "'base'"),
        ({"sketches": {"a": {"norm": 1}}}, "a: .*sketch"),
        ({"matrices": {"b": [2, 2]}}, "'matrices'"),
        ({"matrices": {"a": [2]}}, r" a .*\[out, in\]"),
        ({"matrices": {"a": [5, 4]}}, " a .*3.*5×4"),
    ],
)
def test_metadata_that_cannot_be(meta, names):
    with pytest.raises(ExpertError, match=f"'x'.*{names}"):
        Expert("x", {"a": torch.ones(3)}, meta)


# --- disk


def test_round_trip_and_equal_bytes(tiny_llama, tmp_path):
    expert = random_expert(tiny_llama, **META)
    expert.save_pretrained(tmp_path / "one")
    again = Expert.from_pretrained(tmp_path / "one", base=tiny_llama)
    assert again == expert
    again.save_pretrained(tmp_path / "two")
    sums = [
        {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted((tmp_path / d).iterdir())}
        for d in ("one", "two")
    ]
    assert sums[0] == sums[1]
    assert set(sums[0]) == {"adapter_config.json", "adapter_model.safetensors", "sigmix.json", "README.md"}


def test_saving_replaces_an_expert_and_nothing_else(tiny_llama, tmp_path):
    expert = random_expert(tiny_llama)
    expert.save_pretrained(tmp_path / "a")
    expert.with_meta(domain="sums").save_pretrained(tmp_path / "a")
    assert Expert.from_pretrained(tmp_path / "a").meta["domain"] == "sums"
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        expert.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "cache"]


def test_the_card_has_a_header_that_the_hub_reads(tiny_llama, tmp_path):
    tiny_llama.sigmix_base = {"name": "smollm2-135m"}
    expert = random_expert(tiny_llama, **{**META, "domain": 'odd: "domain"\n---\n# not a header'})
    text = (expert.save_pretrained(tmp_path / "a") / "README.md").read_text()
    header = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    assert header["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert header["base_model_relation"] == "adapter"
    assert header["license"] == "apache-2.0"
    assert header["metrics"] == ["accuracy"]
    assert header["tags"][:2] == ["sigmix", "svf"]
    assert header["tags"][-1] == expert.meta["domain"]
    assert "| name | base | interval | n | value |" in text
    assert "| accuracy | 0.12 | 0.57–0.65 | 500 | 0.61 |" in text
    assert expert.meta["base"]["fingerprint"][:12] in text


def test_a_card_does_not_show_where_the_base_lay(named, tmp_path):
    expert = Expert.from_model(adapted(load(named)), name="a")
    assert str(tmp_path) not in (expert.save_pretrained(tmp_path / "a") / "README.md").read_text()


def test_json_on_disk_is_versioned_and_holds_no_path_but_the_bases(tiny_llama, tmp_path):
    expert = random_expert(tiny_llama, **META)
    found = json.loads((expert.save_pretrained(tmp_path / "a") / "sigmix.json").read_text())
    assert found["schema"] == 1
    assert found["name"] == "arithmetic"
    assert found["z_sha256"] == expert.digest
    assert list(found)[-1] == "sketches"
    assert str(tmp_path) not in json.dumps(found)


def test_sketches_are_computed_once_for_the_same_decompositions(cache, monkeypatch):
    expert = random_expert(build_tiny())
    calls = []
    real = module.sketch
    monkeypatch.setattr(module, "sketch", lambda *args: calls.append(args[0]) or real(*args))
    expert.check(adapted(build_tiny()))
    assert sorted(calls) == sorted(expert.z)
    calls.clear()
    expert.check(adapted(build_tiny()))
    assert not calls
    expert.check(build_tiny())  # a base that is not adapted yet
    assert sorted(calls) == sorted(expert.z)
    # another sketch, another z, or another decomposition is computed again
    path = min(expert.z)
    sketches = thaw(expert.meta["sketches"])
    sketches[path]["values"][0] += 2 * sketches[path]["norm"]
    with pytest.raises(ExpertError, match=path):
        replace(expert, meta={**expert.meta, "sketches": sketches}).check(adapted(build_tiny()))
    with pytest.raises(ExpertError, match=path):
        replace(expert, z={**expert.z, path: 2 - expert.z[path]}).check(adapted(build_tiny()))
    for file in (cache / "svd").glob("*/*.safetensors"):
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors["short"] = tensors["short"].flip(1).contiguous()  # another order, with the same checksum
        save_file(tensors, file, metadata=metadata)
    with pytest.raises(ExpertError, match="singular vectors"):
        expert.check(adapted(build_tiny()))
