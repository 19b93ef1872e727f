"""A compiled decode step gives what the model's own forward pass gives, and where there is none that pass is used."""

from __future__ import annotations

import pytest
import torch
from helpers_architectures import PLAIN, build
from helpers_engine import TOLERANCE, expert, rows
from helpers_tiny import build_tiny, build_tokenizer
from transformers import CONFIG_MAPPING

from sigmix import Engine, Mix, load_base
from sigmix.engine.continuous_batching import ContinuousBatch
from sigmix.engine.cpu import decode_step
from sigmix.engine.cpu.decode_export import export, join_linears
from sigmix.engine.cpu.decode_step import DecodeStep
from sigmix.engine.generation import SamplingParams, SequenceState
from sigmix.engine.kv_cache import BatchKVCache
from sigmix.engine.prefix_cache import prefill
from sigmix.experts.expert import Expert

QUICK = ("llama", "qwen2, windows", "gemma2", "smollm3")
COMPILED = (
    *QUICK, "llama, rope llama3", "qwen2, yarn", "qwen3", "mistral", "gemma", "gemma3_text", "gemma4_text", "phi",
    "phi3", "phi3, windows", "gpt_bigcode", "gpt_neox", "opt", "starcoder2", "persimmon", "cohere", "cohere2", "olmo",
    "olmo2", "olmo3", "granite", "glm", "glm4", "exaone4", "ernie4_5", "nemotron", "hunyuan_v1_dense", "llama4_text",
    "minicpm3", "apertus", "arcee", "bitnet",
)  # fmt: skip


def case(name):
    return pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def compiling():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TORCH_COMPILE_DISABLE", raising=False)
        yield


@pytest.mark.parametrize("name", list(map(case, COMPILED)))
@torch.no_grad()
def test_the_traced_step_gives_the_logits_of_the_model(name, monkeypatch):
    model = build(name)
    config = CONFIG_MAPPING[model.config.model_type].from_dict({**model.config.to_dict(), "dtype": "float32"})
    program = export(config)
    groups = [([model.get_submodule(path) for path in paths], None) for paths in join_linears(program)]
    monkeypatch.setattr(decode_step, "_present", type("", (), {"linears": groups}))
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for key in program.state_dict:
        program.state_dict[key] = weights.get(key.removeprefix("model."), weights.get("model.embed_tokens.weight"))
    program.constants.update((key, weights[key.removeprefix("model.")]) for key in program.constants)
    step = program.module(check_guards=False)
    for prompts in (rows([5, 14, 22, 9]), rows([30]), rows([13, 7])):  # on both sides of the windows
        cache = BatchKVCache()
        cache.append(prefill(model, prompts, 0))
        for token in (4, 9, 7):
            inputs = cache.inputs(torch.tensor([token + row for row in range(len(prompts))]))
            found = step(
                inputs["input_ids"][:, 0], inputs["position_ids"][:, 0], inputs["attention_mask"], cache.columns()
            )
            expected = model(**inputs).logits[:, -1]
            cache.advance()
            torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["mamba", "gptj", "phi3, longrope"])
def test_other_models_keep_their_own_pass(name, cache):
    from helpers_architectures import RECURRENT

    assert name in {**PLAIN, **RECURRENT}
    engine = Engine(build(name), build_tokenizer(), compile=True)
    assert len(engine.generate([[5, 6, 7]], max_new_tokens=3)[0].ids) == 3
    assert not engine.decode_step.wait()
    assert engine.decode_step.problem


def test_an_engine_compiles_on_request(tiny_llama, tiny_tokenizer):
    assert Engine(tiny_llama, tiny_tokenizer).decode_step is None


@pytest.fixture(scope="module")
def compiled(compiling, tmp_path_factory):
    """Cache folder with the compiled step of the tiny Llama."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGMIX_CACHE", str(folder))
        step = DecodeStep(build_tiny("llama"))
        assert step.wait(), step.problem
        yield folder


def answers(engine, mixes, steps=12):
    """Answers of rows that join and leave while the cache grows."""
    prompts = rows([5, 14, 70, 9], shared=3)
    sequences = [SequenceState(ids, SamplingParams(steps), mix) for ids, mix in zip(prompts, mixes, strict=True)]
    gone = SequenceState(prompts[1], SamplingParams(steps), mixes[0])
    with ContinuousBatch(engine) as batch:
        for joining in ([sequences[0]], [], [sequences[1], gone], [sequences[2]], [], [sequences[3]]):
            batch.add(joining)
            if sequences[3] in joining:
                batch.remove([gone])
            batch.step()
        while batch:
            batch.step()
    return [(one.ids, one.logprobs) for one in sequences]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["base", "one", "mixed"])
def test_answers_are_those_of_the_own_pass(compiled, kind):
    model = build_tiny("llama")
    bank = {name: expert(build_tiny("llama"), name, seed) for seed, name in enumerate("ab")}
    a, b = map(Mix.one, "ab")
    mixes = {"base": [Mix.base()] * 4, "one": [a] * 4, "mixed": [a, b, Mix.base(), a]}
    plain = Engine(build_tiny("llama"), build_tokenizer(), bank)
    engine = Engine(model, build_tokenizer(), bank, compile=True)
    plain.eos_token_ids = engine.eos_token_ids = []
    expected, found = answers(plain, mixes[kind]), answers(engine, mixes[kind])
    assert engine.decode_step.active
    for (ids, logprobs), (own, own_logprobs) in zip(expected, found, strict=True):
        assert own == ids
        torch.testing.assert_close(torch.tensor(own_logprobs), torch.tensor(logprobs), **TOLERANCE)


@pytest.mark.real
@pytest.mark.slow
def test_the_default_base_in_half_precision():
    model, tokenizer = load_base("smollm2-135m", "bfloat16")
    engine, plain = Engine(model, tokenizer, compile=True), Engine(model, tokenizer)
    assert engine.decode_step.wait(), engine.decode_step.problem
    prompts = ["What is 17 + 25?", "Name three colours.", "Say hello."]
    for count in (1, 3):
        engine.generate(prompts[:count], max_new_tokens=2)  # compares
        found = engine.generate(prompts[:count], max_new_tokens=12)
        own = plain.score(prompts[:count], [one.ids for one in found])
        for one, logprobs in zip(found, own, strict=True):
            torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(logprobs), rtol=0.05, atol=0.15)
    assert engine.decode_step.active


@pytest.mark.slow
def test_replaced_and_edited_parameters_are_read(compiled):
    model, other = build_tiny("llama"), build_tiny("llama", seed=5)
    engine, plain = Engine(model, build_tokenizer(), compile=True), Engine(other, build_tokenizer())
    engine.generate([[5, 6, 7]], max_new_tokens=4)
    assert engine.decode_step.active
    for number, (own, given) in enumerate(zip(model.parameters(), other.parameters(), strict=True)):
        if number % 2:
            own.data = given.data.clone()
        else:
            own.data.copy_(given.data)
    prompts = [[5, 6, 7], [9, 8, 7, 6]]
    found = [one.ids for one in engine.generate(prompts, max_new_tokens=8)]
    assert found == [one.ids for one in plain.generate(prompts, max_new_tokens=8)]
    assert engine.decode_step.active


@pytest.mark.slow
def test_a_step_that_disagrees_is_not_used(compiled, monkeypatch):
    monkeypatch.setitem(decode_step.TOLERANCE, torch.float32, 0.0)
    engine = Engine(build_tiny("llama"), build_tokenizer(), compile=True)
    plain = Engine(build_tiny("llama"), build_tokenizer())
    found = engine.generate([[5, 6, 7], [8, 9]], max_new_tokens=6)
    assert [one.ids for one in found] == [one.ids for one in plain.generate([[5, 6, 7], [8, 9]], max_new_tokens=6)]
    assert not engine.decode_step.active
    assert "differ" in engine.decode_step.problem


@pytest.mark.slow
def test_a_non_finite_row_fails_alone(compiled):
    fine = expert(build_tiny("llama"), "a", 0)
    sick = Expert("sick", {path: torch.full_like(z, 1e30) for path, z in fine.z.items()})
    engine = Engine(build_tiny("llama"), build_tokenizer(), {"a": fine, "sick": sick}, compile=True)
    engine.eos_token_ids = []
    alone = [engine.generate([ids], Mix.one("a"), max_new_tokens=9)[0].ids for ids in rows([8, 30])]
    engine.generate(rows([8, 30]), Mix.one("a"), max_new_tokens=3)
    assert engine.decode_step.active
    bad, good, later = (
        SequenceState(ids, SamplingParams(9), Mix.one(name))
        for ids, name in zip(rows([30, 8, 30]), ("sick", "a", "a"), strict=True)
    )
    good.prompt_ids, later.prompt_ids = rows([8, 30])
    with ContinuousBatch(engine, isolate=True) as batch:
        batch.add([bad, good])
        batch.step()
        assert bad.finish == "error"
        for layer in batch.kv_cache.cache.layers:
            for buffer in layer.buffers:
                buffer[1:] = float("nan")
        batch.step()
        batch.add([later])
        while batch:
            batch.step()
    assert [good.ids, later.ids] == alone
    assert engine.decode_step.active


@pytest.mark.slow
def test_without_a_compiler_the_own_pass_is_used(cache, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent")
    engine = Engine(build_tiny("llama"), build_tokenizer(), compile=True)
    assert not engine.decode_step.wait()
    assert engine.decode_step.problem
    assert len(engine.generate([[5, 6, 7]], max_new_tokens=3)[0].ids) == 3
    assert not list(cache.glob("compiled/*"))  # the next start tries again
