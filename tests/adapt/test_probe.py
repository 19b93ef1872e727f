"""Strategy D: fitting, keeping and using a probe."""

from __future__ import annotations

import json

import pytest
import torch
from helpers_adapt import bank_of, big, engine_of
from safetensors.torch import save_file

from sigmix.adapt import OTHER, Probe, ProbeDispatch
from sigmix.adapt.probe import fit_probe
from sigmix.engine import Engine
from sigmix.engine.scoring import hidden_states
from sigmix.errors import ConfigError, ExpertError, FingerprintError
from sigmix.experts.bank import Bank
from sigmix.experts.mix import Mix

pytestmark = pytest.mark.usefixtures("cache")


def prompts(start: int, count: int):
    """Requests whose last letters give the label away, also to a random model."""
    return {
        "arithmetic": [f"{n} + {n + 3} = 7" for n in range(start, start + count)],
        "reading": [f"who is {n} zzz" for n in range(start, start + count)],
        OTHER: [f"anything {n} ?!" for n in range(start, start + count)],
    }


@pytest.fixture
def made(tiny, tiny_tokenizer):
    engine = engine_of(tiny, tiny_tokenizer)
    return engine, fit_probe(engine, prompts(0, 40), prompts(100, 20))


def test_a_fitted_probe_tells_requests_apart(made):
    engine, probe = made
    assert probe.labels == ("arithmetic", "reading", OTHER)
    assert probe.depth in (1, 2)
    assert 0.5 <= probe.threshold < 1
    strategy = ProbeDispatch(engine, probe=probe)
    fresh = prompts(200, 10)
    for label, texts in fresh.items():
        decisions = strategy.decide(texts)
        assert sum(decision.label == label for decision in decisions) >= 8
        for decision in decisions:
            assert decision.mix == {"arithmetic": Mix.one("adder"), "reading": Mix.one("finder")}.get(
                decision.label, Mix.base()
            )
    (decision,) = strategy.decide(["1 + 4 = 7"])
    assert sum(decision.evidence["probabilities"].values()) == pytest.approx(1)
    assert decision.tokens == len(engine.encode("1 + 4 = 7"))
    assert "arithmetic" in decision.reason


def test_probabilities_are_a_softmax_of_the_stated_hidden_state(made):
    engine, probe = made
    texts = prompts(300, 2)["reading"]
    states = hidden_states(engine, texts, [probe.depth])[:, 0]
    wanted = torch.softmax((states @ probe.weight.T + probe.bias) / probe.temperature, -1)
    for row, decision in zip(wanted.tolist(), ProbeDispatch(engine, probe=probe).decide(texts), strict=True):
        assert list(decision.evidence["probabilities"].values()) == pytest.approx(row, abs=1e-5)


def test_an_unsure_probe_says_other(made):
    engine, probe = made
    unsure = Probe(probe.labels, probe.depth, probe.weight * 1e-6, torch.tensor([0.1, 0.0, 0.0]), 1.0, 0.5, probe.base)
    (decision,) = ProbeDispatch(engine, probe=unsure).decide(["1 + 4 = 7"])
    assert (decision.label, decision.mix) == (OTHER, Mix.base())
    assert "50%" in decision.reason


def test_soft_decisions_mix_by_probability(made):
    engine, probe = made
    (decision,) = ProbeDispatch(engine, probe=probe, soft=True).decide(["1 + 4 = 7"])
    chances = decision.evidence["probabilities"]
    assert decision.mix.alpha("adder", "x") == pytest.approx(chances["arithmetic"])
    assert decision.mix.alpha("finder", "x") == pytest.approx(chances["reading"])


def test_two_labels_only(tiny, tiny_tokenizer):
    """Logistic regression has one row of logits for two classes."""
    engine = engine_of(tiny, tiny_tokenizer, bank_of(tiny, adder="arithmetic"))
    pick = lambda found: {key: found[key] for key in ("arithmetic", OTHER)}  # noqa: E731
    probe = fit_probe(engine, pick(prompts(0, 30)), pick(prompts(100, 10)))
    decisions = ProbeDispatch(engine, probe=probe).decide(["1 + 4 = 7", "anything 999 ?!"])
    assert [decision.label for decision in decisions] == ["arithmetic", OTHER]


def test_a_probe_survives_its_file_and_lies_in_the_bank(made, tmp_path, tiny, tiny_tokenizer):
    engine, probe = made
    bank = Bank(tmp_path / "bank", create=True)
    for one in engine.bank.values():
        bank.add(one)
    ours = Engine(big(tiny), tiny_tokenizer, bank)
    with pytest.raises(ExpertError, match="--fit-probe"):
        ProbeDispatch(ours)
    probe.save(bank.folder / "probe.safetensors")
    assert Bank(bank.folder).names() == ["adder", "finder"]
    again = ProbeDispatch(ours)
    assert [d.mix for d in again.decide(["1 + 4 = 7"])] == [
        d.mix for d in ProbeDispatch(engine, probe=probe).decide(["1 + 4 = 7"])
    ]
    assert again.probe.facts == json.loads(json.dumps(probe.facts))


@pytest.mark.parametrize("damage", ["cut", "text", "shape", "nan", "labels"])
def test_a_damaged_probe_is_named(made, tmp_path, damage):
    _, probe = made
    path = tmp_path / "probe.safetensors"
    probe.save(path)
    content = path.read_bytes()
    about = {"format": "sigmix-probe-1", "labels": list(probe.labels), "depth": 1, "temperature": 1.0, "threshold": 0.5,
             "base": probe.base, "facts": {}}  # fmt: skip
    tensors = {"weight": probe.weight.contiguous(), "bias": probe.bias.clone()}
    if damage == "cut":
        path.write_bytes(content[:-40])
    elif damage == "text":
        path.write_text("hello")
    else:
        if damage == "shape":
            tensors["weight"] = tensors["weight"][:2].contiguous()
        elif damage == "nan":
            tensors["bias"][0] = float("nan")
        else:
            del about["labels"]
        save_file(tensors, path, {"probe": json.dumps(about)})
    with pytest.raises(ExpertError, match=r"probe\.safetensors.*--fit-probe"):
        Probe.load(path)


def test_a_probe_of_another_base_or_bank_is_refused(made, tiny, tiny_tokenizer):
    engine, probe = made
    other = Probe(probe.labels, probe.depth, probe.weight, probe.bias, 1.0, 0.5, "0" * 64)
    with pytest.raises(FingerprintError, match="000000000000"):
        ProbeDispatch(engine, probe=other)
    more = engine_of(tiny, tiny_tokenizer, bank_of(tiny, adder="arithmetic", finder="reading", speller="words"))
    with pytest.raises(ConfigError, match="words.*--fit-probe"):
        ProbeDispatch(more, probe=probe)
    with pytest.raises(ConfigError, match="arithmetic"):
        fit_probe(engine, {"arithmetic": ["1"]}, prompts(0, 1))
