"""Every architecture answers in batches as it does alone, on both sides of its windows and thresholds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers_architectures import LONGROPE, PLAIN, RECURRENT, REFUSED, THRESHOLD, build, load_config
from helpers_engine import Divided, alone, expert, greedy, rows
from helpers_tiny import build_tokenizer

from sigmix import Engine, load_base
from sigmix.engine import continuous_batching
from sigmix.engine.continuous_batching import ContinuousBatch
from sigmix.engine.execution import as_base
from sigmix.engine.generation import SamplingParams, SequenceState, complete
from sigmix.engine.prefix_cache import completion_logits
from sigmix.errors import BaseModelError, ConfigError, ContextError, ExpertError
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix

STEPS = 6
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}
QUICK = ("llama", "llama, rope dynamic", "mistral", "gemma3_text", "phi3, longrope", "gpt_neo", "mpt", "llama4_text",
         "deepseek_v3", "mamba", "jamba", "falcon_h1", "lfm2", "qwen3_5_text")  # fmt: skip
"""One of each kind; the others are marked slow."""

# without and with a common beginning; answers cross the window of 8 and the threshold of 16
PROMPTS = rows([5, 14, 22, 9]) + rows([13, 30, 12, 17], shared=11, seed=1)


def case(name: str):
    return pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)


@pytest.fixture(scope="module", params=[case(name) for name in (*PLAIN, *RECURRENT)])
def setup(request, tmp_path_factory):
    """A model, its engine, and what every prompt gives alone without a cache, before the engine changes the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGMIX_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(continuous_batching, "CHUNK_TOKENS", 10)
        model = build(request.param)
        with torch.no_grad():
            forward = [build_alone(request.param, ids) for ids in PROMPTS]
            answers = [greedy(model, ids, STEPS) for ids in PROMPTS]
        engine = Engine(model, build_tokenizer())
        engine.eos_token_ids = []
        yield SimpleNamespace(model=model, engine=engine, forward=forward, answers=answers)


def build_alone(name, ids):
    """Logits of one prompt under a fresh model: dynamic NTK keeps a state between calls of transformers' modules."""
    return alone(build(name), ids)


def check(setup, found, prompts=None):
    """Compare (ids, log-probabilities) of prompts with the oracle."""
    for number, (ids, logprobs) in zip(prompts or range(len(PROMPTS)), found, strict=True):
        expected = setup.answers[number]
        assert list(ids) == expected[0], f"prompt {number}"
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(expected[1]), **TOLERANCE)


@pytest.mark.parametrize("prompts", [range(8), range(4, 8), range(2)], ids=["all", "shared", "two"])
def test_generate(setup, prompts):
    found = setup.engine.generate([PROMPTS[number] for number in prompts], max_new_tokens=STEPS)
    check(setup, [(one.ids, one.logprobs) for one in found], prompts)


def test_rows_that_join_and_leave(setup):
    sequences = [SequenceState(ids, SamplingParams(STEPS), cache_prefix=True) for ids in PROMPTS]
    gone = SequenceState(PROMPTS[2], SamplingParams(STEPS))
    with ContinuousBatch(setup.engine) as batch:
        for joining in ([*sequences[:2], gone], [], sequences[2:5], sequences[5:7], [], sequences[7:]):
            if joining:
                batch.add(joining)
            if sequences[4] in joining:
                batch.remove([gone])
            batch.step()
        while batch:
            batch.step()
    check(setup, [(one.ids, one.logprobs) for one in sequences])


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits(setup, side):
    width = max(map(len, PROMPTS))
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in PROMPTS])
    padded = torch.tensor([ids + [0] * (width - len(ids)) for ids in PROMPTS])
    if side == "left":
        mask = mask.flip(1)
        padded = torch.tensor([[0] * (width - len(ids)) + ids for ids in PROMPTS])
    logits = setup.engine.logits(padded, mask)
    for row, own, expected in zip(logits, mask.bool(), setup.forward, strict=True):
        torch.testing.assert_close(row[own], expected, **TOLERANCE)


def test_score(setup):
    completions = [ids[: 1 + number % STEPS] for number, (ids, _) in enumerate(setup.answers)]
    for found, (_, expected) in zip(setup.engine.score(PROMPTS, completions), setup.answers, strict=True):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected[: len(found)]), **TOLERANCE)


def test_hidden_states(setup):
    if setup.model.config.model_type == "gemma3n_text":
        with pytest.raises(ConfigError, match="hidden state"):
            setup.engine.hidden_states(PROMPTS, [1])
        return
    together = setup.engine.hidden_states(PROMPTS, [1, 2])
    each = [setup.engine.hidden_states([ids], [1, 2])[0] for ids in PROMPTS]
    torch.testing.assert_close(together, torch.stack(each), **TOLERANCE)


def test_rollouts_and_their_training(setup):
    answers = torch.tensor([ids for ids, _ in setup.answers]).repeat_interleave(2, 0)
    mask = torch.ones_like(answers, dtype=torch.bool)
    mask[1, 3:] = mask[12, 1:] = False
    weight = setup.model.get_input_embeddings().weight
    with as_base(setup.engine.layers):
        found = complete(setup.model, PROMPTS, SamplingParams(STEPS), [], 0, num_generations=2)
        weight.requires_grad_(True)
        logits = completion_logits(setup.model, PROMPTS, answers, mask, 0)
        logits.logsumexp(-1).sum().backward()
        weight.requires_grad_(False)
    check(setup, [(one.ids, one.logprobs) for one in found[::2]])
    check(setup, [(one.ids, one.logprobs) for one in found[1::2]])
    logprobs = logits.detach().log_softmax(-1).gather(2, answers[..., None])[..., 0]
    expected = torch.tensor([logprobs for _, logprobs in setup.answers]).repeat_interleave(2, 0)
    torch.testing.assert_close(logprobs[mask], expected[mask], **TOLERANCE)
    assert torch.isfinite(weight.grad).all()
    weight.grad = None


@pytest.mark.parametrize("chunk", [10, 512])
def test_log_probabilities_of_prompts(setup, monkeypatch, chunk):
    monkeypatch.setattr(continuous_batching, "CHUNK_TOKENS", chunk)
    seen: list[list] = [[] for _ in PROMPTS]
    sequences = [
        SequenceState(ids, SamplingParams(STEPS), on_prompt=parts.extend)
        for ids, parts in zip(PROMPTS, seen, strict=True)
    ]
    with ContinuousBatch(setup.engine) as batch:
        batch.add(sequences)
        while batch:
            batch.step()
    check(setup, [(one.ids, one.logprobs) for one in sequences])
    for ids, parts, forward in zip(PROMPTS, seen, setup.forward, strict=True):
        expected = forward[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor([logprob for logprob, _ in parts]), expected, **TOLERANCE)


# ------------------------------------------------------------------ mixtures


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", [case(name) for name in (*PLAIN, *RECURRENT)])
def test_rows_under_different_mixtures(name):
    bank = {label: expert(build(name), label, seed) for label, seed in (("math", 1), ("code", 2))}
    engine, single = (Engine(build(name), build_tokenizer(), bank) for _ in range(2))
    engine.eos_token_ids = single.eos_token_ids = []
    mixes = ["base", "math", "code:-0.4", "math:0.7+code:0.3"] * 2
    expected = [
        single.generate([ids], mix, max_new_tokens=STEPS, form="merged")[0]
        for ids, mix in zip(PROMPTS, mixes, strict=True)
    ]
    found = engine.generate(PROMPTS, mixes, max_new_tokens=STEPS, form="factored")
    assert [one.ids for one in found] == [one.ids for one in expected]
    assert len({tuple(one.ids) for one in expected}) > len(PROMPTS) // 2
    scores = engine.score(PROMPTS, [one.ids for one in expected], mixes)
    for one, other, score in zip(found, expected, scores, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), **TOLERANCE)
        torch.testing.assert_close(torch.tensor(score), torch.tensor(other.logprobs), **TOLERANCE)
    sequences = [
        SequenceState(ids, SamplingParams(STEPS), Mix.parse(mix)) for ids, mix in zip(PROMPTS, mixes, strict=True)
    ]
    with ContinuousBatch(engine, "factored") as batch:
        for one in sequences:
            batch.add([one])
            batch.step()
        while batch:
            batch.step()
    assert [one.ids for one in sequences] == [one.ids for one in expected]


def mixed(bank, weights):
    """z of a mixture by path."""
    z: dict[str, torch.Tensor] = {}
    for name, alpha in weights.items():
        for path, own in bank[name].z.items():
            z[path] = z.get(path, torch.ones_like(own)) + alpha * (own - 1)
    return z


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", [case(name) for name in (*PLAIN, *RECURRENT)])
def test_rows_under_experts_of_different_positions(name, monkeypatch):
    """Batches, rows that join, recovery and scores equal dense weights: others for the prompt than for the answer."""
    monkeypatch.setattr(continuous_batching, "CHUNK_TOKENS", 10)
    kinds = {"math": "all", "code": "prompt", "law": "prompt"}
    bank = {
        label: expert(build(name), label, seed, positions=positions)
        for seed, (label, positions) in enumerate(kinds.items(), 4)
    }
    weights = [{"code": 1.0}, {"math": 0.7, "code": -0.4}, {"math": 1.0}, {"law": 0.5, "code": 0.5}] * 2
    expected = []
    for ids, own in zip(PROMPTS, weights, strict=True):
        answer_z = mixed(bank, {label: a for label, a in own.items() if kinds[label] == "all"})
        expected.append(greedy(Divided(build(name), mixed(bank, own), answer_z, len(ids)), ids, STEPS))
    mixes = [Mix(own) for own in weights]
    engine = Engine(build(name), build_tokenizer(), bank)
    engine.eos_token_ids = []
    found = [(one.ids, one.logprobs) for one in engine.generate(PROMPTS, mixes, max_new_tokens=STEPS)]
    sequences = [SequenceState(ids, SamplingParams(STEPS), mix) for ids, mix in zip(PROMPTS, mixes, strict=True)]
    with ContinuousBatch(engine, isolate=True) as batch:
        failed = False
        for one in sequences:
            batch.add([one])
            batch.step()
            if len(batch.sequences) > 2 and not failed:  # the rows are read again, with what they have generated
                failed = True
                monkeypatch.setattr(batch.kv_cache, "inputs", None)
                batch.step()
        while batch:
            batch.step()
    assert failed
    joined = [(one.ids, one.logprobs) for one in sequences]
    scores = zip([ids for ids, _ in expected], engine.score(PROMPTS, [ids for ids, _ in expected], mixes), strict=True)
    for rows_ in (found, joined, scores):
        for (ids, logprobs), (right, exact) in zip(rows_, expected, strict=True):
            assert list(ids) == right
            torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(exact), **TOLERANCE)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("targets", ["all-linear", ["kv_b_proj", "o_proj"]])
def test_layers_that_read_cached_latents_have_no_z_of_prompts_alone(targets):
    adapts = {
        positions: expert(build("deepseek_v3"), "law", 1, targets=targets, positions=positions).z
        for positions in ("all", "prompt")
    }
    left_out = {path for path in adapts["all"] if path.endswith("kv_b_proj")}
    assert left_out
    assert adapts["all"].keys() - adapts["prompt"].keys() == left_out
    with pytest.raises(ExpertError, match="kv_b_proj"):
        Expert("law", adapts["all"], {"positions": "prompt"})
    with pytest.raises(ConfigError):
        expert(build("deepseek_v3"), "law", 1, targets=["kv_b_proj"], positions="prompt")


# ------------------------------------------------------------------ transformers' own generation, conversations


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", ["phi3, longrope", "phi3, longrope, windows", "qwen3_5_text", "mamba"])
def test_answers_equal_transformers_generate(name):
    model, steps = build(name), 24
    engine = Engine(build(name), build_tokenizer())
    engine.eos_token_ids = []
    for ids in (PROMPTS[0], PROMPTS[4], PROMPTS[2]):
        theirs = model.generate(
            torch.tensor([ids]), max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        (found,) = engine.generate([ids], max_new_tokens=steps)
        assert found.ids == theirs[0, len(ids) :].tolist()
        assert "".join(engine.stream(ids, max_new_tokens=steps)) == found.text


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("first", "more"), [(20, 4), (20, 40), (44, 4), (60, 9)])
def test_conversations_on_both_sides_of_a_threshold(first, more):
    long = LONGROPE | {"original_max_position_embeddings": 3 * THRESHOLD}
    config = load_config("phi3")
    config = type(config)(**{**config.to_dict(), "rope_parameters": long, "original_max_position_embeddings": 48})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.12)
    engine = Engine(model, build_tokenizer())
    engine.eos_token_ids = []
    start, end = rows([first, more + 1])
    with ContinuousBatch(engine) as batch:
        for _ in range(2):
            one = SequenceState(start, SamplingParams(STEPS), cache_prefix=True)
            batch.add([one])
            while batch:
                batch.step()
            assert one.ids == greedy(model, start, STEPS)[0]
            start = [*start, *one.ids, *end]
    assert len(engine.prefix_cache) > 0


@pytest.mark.usefixtures("cache")
@torch.no_grad()
def test_dynamic_frequencies_of_a_row_do_not_depend_on_others():
    def fresh():
        config = load_config("llama, rope dynamic")
        config.max_position_embeddings = THRESHOLD
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        model.load_state_dict(build("llama, rope dynamic").state_dict())
        return model

    engine = Engine(fresh(), build_tokenizer())
    engine.eos_token_ids = []
    width = max(map(len, PROMPTS))
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in PROMPTS])
    padded = torch.tensor([[0] * (width - len(ids)) + ids for ids in PROMPTS])
    logits = engine.logits(padded, mask)
    for row, own, ids in zip(logits, mask.bool(), PROMPTS, strict=True):
        torch.testing.assert_close(row[own], alone(fresh(), ids), **TOLERANCE)
        torch.testing.assert_close(engine.logits(torch.tensor([ids]))[0], alone(fresh(), ids), **TOLERANCE)
    # no state is left behind, and answers end where the frequencies would change
    (found,) = engine.generate([PROMPTS[0]], max_new_tokens=THRESHOLD - len(PROMPTS[0]))
    assert found.ids == greedy(fresh(), PROMPTS[0], len(found.ids))[0]
    with pytest.raises(ContextError):
        engine.generate([PROMPTS[2]], max_new_tokens=1)


# ------------------------------------------------------------------ what is not supported


def test_the_documentation_lists_what_is_tested():
    page = (Path(__file__).parents[2] / "docs/architectures.md").read_text(encoding="utf-8")
    supported, refused = page.split("## Refused")
    for part, table in ((supported, {**PLAIN, **RECURRENT}), (refused.split("## Rules")[0], REFUSED)):
        lines = [line for line in part.splitlines() if line.startswith("| `") and "model_type`" not in line]
        listed = {name for line in lines for name in re.findall("`(.+?)`", line.split("|")[1])}
        assert listed == {kind for kind, _ in table.values()}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_architectures_are_refused_before_the_weights(tmp_path, name):
    config = load_config(name)
    config.architectures = [transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(BaseModelError, match=json.loads((tmp_path / "config.json").read_text())["model_type"]):
        load_base(tmp_path)


def test_an_engine_refuses_them_too():
    model = transformers.AutoModelForCausalLM.from_config(load_config("rwkv"))
    with pytest.raises(BaseModelError, match="rwkv"):
        Engine(model, build_tokenizer())
