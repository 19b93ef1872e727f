"""Merging methods against dense arithmetic."""

from __future__ import annotations

import pytest
import torch
from helpers_reproduce import dense, expert, lab, logits, loras
from helpers_tiny import build_tiny
from peft.utils.merge_utils import ties

from reproduction.compose import STEPS, UNIFORM
from reproduction.merging import METHODS, PRUNING, Merging, knots, tune_merging

pytestmark = pytest.mark.usefixtures("cache")
WEIGHTS = {"one": 0.6, "two": 1.0}


def merging(rule, folders, policy, density=0.5):
    made = Merging(build_tiny(), folders, policy)
    made.rule, made.density = rule, density
    return made


@pytest.mark.parametrize("rule", METHODS["lora"])
def test_lora_methods(tmp_path, rule):
    made = merging(rule, loras(tmp_path), "lora")
    plain = logits(build_tiny())
    with made.under(WEIGHTS):
        found = logits(made.model)
    assert (found - plain).abs().max() > 0.1
    exact = dense(made, WEIGHTS)
    # cat is the sum of the updates; the others are not
    assert torch.allclose(found.double(), exact, atol=2e-4) == (rule == "cat")
    with made.under(WEIGHTS):  # DARE draws the same
        assert torch.equal(logits(made.model), found)
    for context in (made.under({}), made.under({"one": 0.0}), made.reference()):
        with context:
            assert torch.equal(logits(made.model), plain)
    assert set(made.model.peft_config) == {"one", "two"}
    with made.under({"one": 1.0}):
        alone = logits(made.model)
    if rule in ("linear", "svd", "cat"):
        assert torch.allclose(alone.double(), dense(made, {"one": 1.0}), atol=2e-4)


def test_knots_is_ties_on_the_singular_vectors_of_the_joined_updates():
    draw = torch.Generator().manual_seed(0)
    factors = [(torch.randn(12, 3, generator=draw), torch.randn(3, 9, generator=draw)) for _ in range(3)]
    updates = [b.double() @ a.double() for b, a in factors]
    u, s, vh = torch.linalg.svd(torch.cat(updates, 1), full_matrices=False)
    weights = torch.tensor([0.5, 1.0, 2.0])
    parts = list((s[:, None] * vh)[s > 1e-9].chunk(3, 1))
    expected = u[:, s > 1e-9] @ ties(parts, weights.double(), 0.4)
    torch.testing.assert_close(knots(factors, weights, 0.4), expected.float(), rtol=1e-4, atol=1e-4)
    (one,) = factors[:1]  # a single adapter, unpruned, stays itself
    torch.testing.assert_close(knots([one], torch.ones(1), 0.9999), updates[0].float(), rtol=0.1, atol=0.1)


def test_ties_on_gains():
    experts = {"one": expert("one", 0), "two": expert("two", 1)}
    made = merging("ties", experts, "svf", density=0.5)
    path = "model.layers.0.mlp.down_proj"
    z = made.z(WEIGHTS)[path]
    gains = torch.stack([one.z[path] - 1 for one in experts.values()])
    for row in gains:  # the larger half of each
        row[row.abs() < row.abs().sort().values[len(row) // 2]] = 0
    sign = torch.where(gains.sum(0) >= 0, 1.0, -1.0)
    same = gains.sign() == sign
    weighted = gains * torch.tensor(list(WEIGHTS.values()))[:, None]
    expected = 1 + (weighted * same).sum(0) / same.sum(0).clamp_min(1)
    torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-6)
    plain = logits(build_tiny())
    with made.under(WEIGHTS):
        assert (logits(made.model) - plain).abs().max() > 0.05
    with made.reference():
        assert torch.equal(logits(made.model), plain)


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("rule", ["svd", "ties", "magnitude_prune", "knots"])
def test_every_method_has_the_same_number_of_validations(tmp_path, monkeypatch, rule, count):
    from reproduction import compose
    from reproduction import merging as module

    members = [f"task{number}" for number in range(count)]
    made, calls = merging(rule, loras(tmp_path), "lora"), []

    def validated(lab, blend, tokenizer, members, weights, with_kl):
        calls.append((weights[members[0]], blend.density))
        value = 1 - abs(weights[members[0]] - 1.4) - abs((blend.density or 0) - 0.2)
        return {"weights": weights, "mean": value, "accuracy": {}, "kl": {}}

    for where in (module, compose):
        monkeypatch.setattr(where, "validate", validated)
    found = tune_merging(lab(tmp_path), made, None, members)
    budget = len(UNIFORM) + (len(STEPS) * count if count <= 3 else 0)
    assert len(calls) == budget
    if rule in PRUNING:
        tried = [alpha for alpha, density in calls if density == 0.5]
        assert (found["weights"][members[0]], found["density"]) == (min(max(tried), 1.4), 0.2)
        assert made.density == 0.2
    else:
        assert found["density"] is None
