"""Weighted sums of adapters against dense arithmetic, the base untouched, and what is said about their likeness."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers_reproduce import IDS, dense, expert, lab, logits, loras
from helpers_tiny import build_tiny
from peft import IA3Config, get_peft_model

from reproduction.blend import Blend
from reproduction.compose import UNIFORM, average, geometry, total, tune
from reproduction.divergence import divergence
from sigmix.engine import Engine
from sigmix.engine.prefix_cache import completion_logits
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix
from sigmix.tasks.registry import get_task
from sigmix.train.rollout import Actor

pytestmark = pytest.mark.usefixtures("cache")
NEAR = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("kind", ["svf", "lora"])
@pytest.mark.parametrize("weights", [{"one": 1.0}, {"one": 0.5, "two": 0.5}, {"one": 1.0, "two": 1.0}, {"two": -0.7}])
def test_a_sum_is_the_sum_of_the_updates(tmp_path, kind, weights):
    folders = {"one": expert("one", 0), "two": expert("two", 1)} if kind == "svf" else loras(tmp_path)
    base = build_tiny()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    plain = logits(base)
    blend = Blend(base, folders, kind)
    with blend.under(weights):
        found = logits(blend.model)
    assert torch.allclose(found.double(), dense(blend, weights), atol=2e-4)
    assert (found - plain).abs().max() > 0.1
    with blend.under({}):
        assert torch.equal(logits(blend.model), plain)
    with blend.under({"one": 0.0}):
        assert torch.equal(logits(blend.model), plain)
    with blend.reference():
        assert torch.equal(logits(blend.model), plain)
    state = blend.model.state_dict().items()
    left = {name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor for name, tensor in state}
    assert all(torch.equal(left[name], tensor) for name, tensor in before.items())


def test_an_svf_blend_is_the_engines_mix(tiny_tokenizer, tmp_path):
    from sigmix.experts.bank import Bank

    bank = Bank(tmp_path / "bank", create=True)
    for name, seed in (("one", 0), ("two", 1)):
        bank.add(expert(name, seed).sealed(build_tiny()))
    engine = Engine(build_tiny(), tiny_tokenizer, bank=bank)
    theirs = engine.logits(IDS, torch.ones_like(IDS), mix=[Mix({"one": 0.6, "two": 0.4})], form="merged")
    blend = Blend(build_tiny(), {"one": bank.path("one"), "two": bank.path("two")}, "svf")
    with blend.under({"one": 0.6, "two": 0.4}):
        assert torch.allclose(logits(blend.model), theirs, atol=1e-5)


def test_ia3_alone(tmp_path):
    model = get_peft_model(build_tiny("qwen2"), IA3Config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.uniform_(0.5, 1.5)
    ours = logits(model)
    model.save_pretrained(tmp_path / "ia3")
    base = build_tiny("qwen2")  # with biases, which IA3 scales too
    plain = logits(base)
    blend = Blend(base, {"it": tmp_path / "ia3"}, "ia3")
    with blend.under({"it": 1.0}):
        assert torch.allclose(logits(blend.model), ours, atol=1e-4)
    with blend.reference():
        assert torch.equal(logits(blend.model), plain)


def test_weights_of_the_modes():
    assert average(["a", "b", "c"]) == {"a": 0.3333, "b": 0.3333, "c": 0.3333}
    assert total(["a", "b"]) == {"a": 1.0, "b": 1.0}


def test_likeness(tmp_path):
    one, other = expert("addition", 0), expert("larger", 1)
    opposite = Expert("smallest-of-three", {path: 2 - z for path, z in one.z.items()})
    home = lab(tmp_path)
    model, tokenizer = home.base()
    blend = Blend(model, {"addition": one, "larger": other, "smallest-of-three": opposite}, "svf")
    found = geometry(home, blend, tokenizer, ["addition", "larger", "smallest-of-three"])
    pairs = {(pair["a"], pair["b"]): pair for pair in found["pairs"]}
    same = pairs["addition", "smallest-of-three"]
    assert same["cosine"] == pytest.approx(-1, abs=1e-5)
    assert same["overlap"] > 0.3  # of itself: what the top 16 of 64 directions hold
    assert same["activation"] < -0.5
    assert abs(pairs["addition", "larger"]["cosine"]) < 0.2
    assert pairs["addition", "larger"]["overlap"] < same["overlap"]
    assert 0 < found["norm"]["addition"] < 1
    unmoved = Expert("larger", {path: torch.ones_like(z) for path, z in one.z.items()})
    model, tokenizer = home.base()
    blend = Blend(model, {"addition": one, "larger": unmoved}, "svf")
    assert geometry(home, blend, tokenizer, ["addition", "larger"])["pairs"] == []


def test_tuning_takes_the_best_on_validation(tmp_path, monkeypatch):
    home = lab(tmp_path)
    model, tokenizer = home.base()
    blend = Blend(model, {"addition": expert("a", 0), "larger": expert("b", 1)}, "svf")
    measured, asked = home.measured, []
    under = blend.under

    def noted(weights):
        asked.append(dict(weights))
        return under(weights)

    def peaked(task, samples, *rest):
        """Accuracy that is best where α is 0.6 for one and 0.84 for the other."""
        assert samples == home.samples(task, "validation", home.scale.validation)
        result, found = measured(task, samples, *rest)
        off = abs(asked[-1]["addition"] - 0.6) + abs(asked[-1]["larger"] - 0.84)
        return SimpleNamespace(accuracy=1 - off, items=result.items), found

    monkeypatch.setattr(blend, "under", noted)
    monkeypatch.setattr(home, "measured", peaked)
    found = tune(home, blend, tokenizer, ["addition", "larger"])
    assert found["weights"] == {"addition": 0.6, "larger": 0.84}
    assert [entry["weights"]["addition"] for entry in found["tried"][: len(UNIFORM)]] == list(UNIFORM)
    assert all(entry["kl"]["addition"] > 0 for entry in found["tried"][: len(UNIFORM)])
    assert all(not entry["kl"] for entry in found["tried"][len(UNIFORM) :])
    assert found["accuracy"] == pytest.approx(1.0)


@pytest.mark.parametrize("answer_tokens", [0, 2])
def test_z_of_prompts_acts_on_them_alone(tiny, answer_tokens):
    ids, answers = torch.arange(4, 24).reshape(2, 10), torch.arange(30, 42).reshape(2, 6)
    prompts, mask = ids.tolist(), torch.ones_like(answers, dtype=torch.bool)
    draw = torch.Generator().manual_seed(0)
    base = tiny("llama").double()
    z = {
        path: 1 + torch.rand(min(m.weight.shape), generator=draw) - 0.5
        for path, m in base.named_modules()
        if path.endswith(("up_proj", "v_proj"))
    }
    experts = {"a": Expert("a", z), "b": Expert("b", {path: 2 - one for path, one in z.items()})}

    def logits(blend, weights):
        with torch.no_grad(), blend.under(weights):
            return completion_logits(blend.model, prompts, answers, mask, 0, prompt_only=blend.prompt_only)

    everywhere = Blend(tiny("llama").double(), experts, "svf")
    ours = Blend(base, experts, "svf", True, "prompt", answer_tokens)
    whole, prompt = (logits(blend, {"a": 0.5, "b": 0.2}) for blend in (everywhere, ours))
    torch.testing.assert_close(prompt[:, : 1 + answer_tokens], whole[:, : 1 + answer_tokens], **NEAR)
    assert not torch.allclose(prompt[:, 1 + answer_tokens :], whole[:, 1 + answer_tokens :])
    torch.testing.assert_close(
        logits(ours, {"a": 1.0, "b": 1.0}), logits(ours, {}), **NEAR
    )  # gains that cancel: the base
    torch.testing.assert_close(logits(ours, {}), logits(everywhere, {}), **NEAR)


def test_the_divergence_of_z_of_prompts_is_that_of_the_answers_as_they_are_read(tiny, tiny_tokenizer, monkeypatch):
    made = get_task("addition")
    samples = made.samples("test", 5)
    base = tiny("llama").double()
    draw = torch.Generator().manual_seed(0)
    z = {p: 0.5 + torch.rand(min(m.weight.shape), generator=draw) for p, m in base.named_modules() if "up_proj" in p}
    found = {}
    for positions in ("all", "prompt"):
        blend = Blend(tiny("llama").double(), {"a": Expert("a", z)}, "svf", True, positions)
        actor = Actor(blend.model, tiny_tokenizer, made, blend.prompt_only)
        rows = [SimpleNamespace(ids=[7, 30 + n, 9, 12][: 2 + n % 3]) for n in range(5)]

        def under(blend=blend):
            return blend.under({"a": 1.0})

        found[positions] = divergence(blend.model, actor, samples, rows, under, blend.reference)
        total = count = 0.0
        for sample, row in zip(samples, rows, strict=True):
            ids, mask = torch.tensor([row.ids]), torch.ones(1, len(row.ids), dtype=torch.bool)
            prompts = [actor.encode(sample)]
            with torch.no_grad(), blend.reference():
                theirs = completion_logits(blend.model, prompts, ids, mask, 0).log_softmax(-1)
            with torch.no_grad(), under():
                ours = completion_logits(blend.model, prompts, ids, mask, 0, prompt_only=blend.prompt_only)
            ours = ours.log_softmax(-1)
            total, count = total + float((ours.exp() * (ours - theirs)).sum()), count + len(row.ids)
        assert found[positions] == pytest.approx(total / count, rel=1e-6)
        monkeypatch.setattr("reproduction.divergence.ROWS", 2)
        in_parts = divergence(blend.model, actor, samples, rows, under, blend.reference)
        assert in_parts == pytest.approx(found[positions], rel=1e-6)
    assert abs(found["all"] - found["prompt"]) > 0.01 * found["all"]
