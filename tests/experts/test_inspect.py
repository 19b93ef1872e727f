"""What is shown of experts: true figures, JSON-able, and no damage hides the rest."""

from __future__ import annotations

import json

import pytest
import torch
from helpers_experts import adapted, random_expert
from helpers_tiny import build_tiny

from sigmix.errors import ExpertError
from sigmix.experts.bank import Bank
from sigmix.experts.expert import Expert
from sigmix.experts.inspect import diff, listing, show, verify
from sigmix.svf.decomposition import svd

pytestmark = pytest.mark.usefixtures("cache")


def dense_delta(model, expert, path):
    u, s, v = svd(model.get_submodule(path).weight.detach())
    return (u.double() * s * (expert.z[path].double() - 1)) @ v.double().T


def test_listing_goes_on_past_a_damaged_expert(tmp_path):
    bank = Bank(tmp_path / "bank", create=True)
    expert = random_expert(build_tiny(), "good", domain="arithmetic", metrics=[{"name": "accuracy", "value": 0.5}])
    bank.add(expert)
    bank.add(Expert("bad", {"a": torch.ones(2)}))
    (tmp_path / "bank" / "bad" / "adapter_model.safetensors").write_bytes(b"x")
    bad, good = json.loads(json.dumps(listing(Bank(bank.folder))))
    assert bad["name"] == "bad"
    assert "truncated or damaged" in bad["problem"]
    assert good["problem"] is None
    assert good["domain"] == "arithmetic"
    assert good["verified"]
    assert good["matrices"] == 14
    assert good["numbers"] == sum(len(z) for z in expert.z.values())
    assert good["metrics"][0]["value"] == 0.5


def test_show(tmp_path):
    model = build_tiny()
    expert = random_expert(build_tiny(), seed=4, objective="sft")
    found = json.loads(json.dumps(show(expert, top=3)))
    every = torch.cat([z - 1 for z in expert.z.values()]).double()
    assert found["gain"]["mean"] == pytest.approx(float(every.mean()))
    assert found["gain"]["std"] == pytest.approx(float(every.std(correction=0)))
    assert (found["gain"]["min"], found["gain"]["max"]) == (float(every.min()), float(every.max()))
    assert found["bytes"] == 4 * len(every)
    assert found["objective"] == "sft"
    assert len(found["layers"]) == 14
    norms = {path: float(dense_delta(model, expert, path).norm()) for path in expert.z}
    assert [row["path"] for row in found["top"]] == sorted(norms, key=lambda path: -norms[path])[:3]
    for path, norm in norms.items():
        assert found["layers"][path]["weight_change"] == pytest.approx(norm, rel=1e-5)
    assert found["layers"]["model.layers.0.mlp.up_proj"]["shape"] == [96, 64]


def test_show_without_sketches():
    found = show(Expert("x", {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([1.5])}))
    assert not found["verified"]
    assert found["top"][0] == {"path": "a", "norm": 2.0}
    json.dumps(found)


def test_verify(tmp_path):
    base = build_tiny()
    path = random_expert(build_tiny()).save_pretrained(tmp_path / "a")
    report = verify(path)
    assert report["ok"]
    assert report["checked"] == ["files", "values", "checksum"]
    report = verify(path, base)
    assert report["ok"]
    assert report["checked"][-2:] == ["fingerprint", "sketches"]
    report = verify(path, build_tiny(seed=1))
    assert not report["ok"]
    assert "was made on" in report["problems"][0]
    json.dumps(report)
    assert not verify(tmp_path / "none")["ok"]


def test_verify_of_an_adapter_that_peft_saved(tmp_path):
    adapted(build_tiny()).save_pretrained(tmp_path / "run")
    report = verify(tmp_path / "run", build_tiny())
    assert report["ok"]
    assert not report["verified"]
    assert report["checked"] == ["files", "values", "matrices"]


def test_diff_on_a_base_is_exact():
    base = build_tiny()
    a, b = random_expert(build_tiny(), "a", seed=1), random_expert(build_tiny(), "b", seed=2)
    found = json.loads(json.dumps(diff(a, b, base)))
    left, right = (torch.cat([e.z[p].double() - 1 for p in sorted(e.z)]) for e in (a, b))
    assert found["gain"]["cosine"] == pytest.approx(float(left @ right / left.norm() / right.norm()))
    assert found["gain"]["distance"] == pytest.approx(float((left - right).norm() / max(left.norm(), right.norm())))
    da, db = (torch.cat([dense_delta(base, e, p).flatten() for p in sorted(e.z)]) for e in (a, b))
    assert found["weight"]["cosine"] == pytest.approx(float(da @ db / da.norm() / db.norm()), abs=1e-6)
    assert found["weight"]["norm_a"] == pytest.approx(float(da.norm()), rel=1e-5)
    assert found["weight"]["distance"] == pytest.approx(float((da - db).norm() / max(da.norm(), db.norm())), rel=1e-5)
    assert found["weight"]["estimated"] is False
    path = "model.layers.1.mlp.down_proj"
    one, two = dense_delta(base, a, path), dense_delta(base, b, path)
    expected = float((one * two).sum() / one.norm() / two.norm())
    assert found["matrices"][path]["weight"]["cosine"] == pytest.approx(expected, abs=1e-6)
    assert found["same_base"] is True
    assert found["identical"] is False


def test_diff_without_a_base_estimates_from_sketches():
    a, b = random_expert(build_tiny(), "a", seed=1), random_expert(build_tiny(), "b", seed=2)
    exact, guess = diff(a, b, build_tiny())["weight"], diff(a, b)["weight"]
    assert guess["estimated"] is True
    assert guess["norm_a"] == pytest.approx(exact["norm_a"], rel=1e-5)
    assert guess["cosine"] == pytest.approx(exact["cosine"], abs=3 / (8 * 14) ** 0.5)
    assert guess["distance"] == pytest.approx(exact["distance"], rel=0.3)


def test_diff_of_an_expert_with_itself_and_with_its_scaled_self():
    base = build_tiny()
    a = random_expert(build_tiny(), "a", seed=1)
    same = diff(a, a, base)
    assert same["identical"] is True
    assert same["gain"]["distance"] == same["weight"]["distance"] == 0
    half = Expert("half", {path: 1 + (z - 1) / 2 for path, z in a.z.items()})
    found = diff(a, half, base)
    assert found["same_base"] is None
    for space in ("gain", "weight"):
        assert found[space]["cosine"] == pytest.approx(1, abs=1e-6)
        assert found[space]["distance"] == pytest.approx(0.5, abs=1e-5)


def test_diff_counts_what_only_one_adapts_and_leaves_undefined_cosines_out():
    a = Expert("a", {"q": torch.tensor([1.0, 2.0])})
    b = Expert("b", {"k": torch.tensor([3.0])})
    found = diff(a, b)
    assert found["gain"] == {"cosine": 0.0, "norm_a": 1.0, "norm_b": 2.0, "distance": pytest.approx(5**0.5 / 2)}
    assert found["matrices"]["q"]["gain"]["cosine"] is None
    assert found["weight"] is None
    with pytest.raises(ExpertError, match=r"different lengths for q: \[2, 3\]"):
        diff(a, Expert("c", {"q": torch.ones(3)}))
