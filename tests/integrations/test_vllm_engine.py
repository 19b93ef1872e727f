"""vLLM behind the engine protocol: what it generates, scores and decides equals our own engine, in float32."""

from __future__ import annotations

import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers_adapt import requests_of
from helpers_engine import expert
from helpers_experts import at
from helpers_export import base_folder
from helpers_tiny import build_tiny
from helpers_vllm import ALIVE, ENVIRONMENT, SIZES, needs_vllm

from sigmix import Bank, Engine, Mix, load_base
from sigmix.adapt import ClassifierDispatch, FewShotSearch, PromptDispatch, RouterDispatch
from sigmix.adapt.two_pass import open_strategy
from sigmix.engine.structured_output import StructuredOutput
from sigmix.errors import ConfigError, ContextError, ExpertError, FingerprintError, UnknownNameError
from sigmix.integrations.vllm.engine import VllmEngine

pytest_plugins = ["helpers_cli"]
# float32, two layers: batched and single matmuls round differently by a few 1e-6 a token
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
CONTEXT = 4096  # the templates of strategies have a token for each letter
LONG = {**SIZES, "max_position_embeddings": CONTEXT}
SLOTS = 4
MIXES = [
    Mix.base(), *map(Mix.one, ("adder", "finder", "reader")),
    *map(Mix.parse, ("adder:0.5+finder:0.5", "adder:-0.7", "adder:0.3+reader:0.7", "finder:1.5+reader:-0.5")),
    Mix({"adder": [0.2, 0.9]}), Mix({"finder": [1.0, 0.0], "reader": [0.0, 1.0]}),
    Mix({"adder": {"model.layers.1.mlp.up_proj": 0.8}}), Mix.parse("adder:0.1+finder:0.2+reader:0.3"),
]  # fmt: skip
PROMPTS = [f"{word} {number}?" for number, word in enumerate("the quick brown fox jumps over a lazy dog".split() * 2)]
PROMPTS = [*PROMPTS, *["ab " * 40, "x", "What is 1 + 2?", "yes", "no", "left or right"]]
EACH = [MIXES[number % len(MIXES)] for number in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """base, bank: folders. vllm, own: engines on them, in float32."""
    folder = tmp_path_factory.mktemp("vllm")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "SIGMIX_CACHE": str(folder / "cache")}.items():
            patch.setenv(name, value)
        base = base_folder(folder / "base", **LONG)
        bank = Bank(folder / "bank", create=True)
        domains = {"adder": "arithmetic", "finder": "reading", "judge": "dispatch"}
        for seed, (name, domain) in enumerate(domains.items()):
            one = expert(load_base(base, "float32")[0], name, seed, width=1.2)
            bank.add(one.with_meta(domain=domain, description=f"Does {name} things.", task=None))
        reader = at("prompt", expert(load_base(base, "float32")[0], "reader", 3, width=1.2))
        bank.add(reader.with_meta(domain="words", description="Does reader things.", task=None))
        options = {"max_mixtures": SLOTS, "block_size": 32, "num_gpu_blocks_override": 256}
        ALIVE.append(VllmEngine(base, bank.folder, "float32", **options))
        own = Engine(*load_base(base, "float32"), Bank(bank.folder))
        yield SimpleNamespace(base=base, bank=bank, own=own, vllm=ALIVE[-1])


def same(found, expected):
    """Equal completions, and equal log-probabilities up to rounding."""
    for one, other in zip(found, expected, strict=True):
        assert (one.text, one.ids, one.finish) == (other.text, other.ids, other.finish)
        assert (one.mix, one.prompt_tokens) == (other.mix, other.prompt_tokens)
        assert one.logprobs == pytest.approx(other.logprobs, rel=1e-4, abs=1e-4)


@needs_vllm
def test_greedy_completions_are_equal_with_more_mixtures_than_slots(both):
    assert len(set(EACH)) > 2 * SLOTS
    options = {"max_new_tokens": 12, "logit_bias": {2: 2.0}}  # some end with the end token
    expected = both.own.generate(PROMPTS, EACH, **options)
    same(both.vllm.generate(PROMPTS, EACH, **options), expected)
    assert {one.finish for one in expected} == {"stop", "length"}


@needs_vllm
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"logit_bias": {7: 3.0, 2: -100.0}},
        {"num_return_sequences": 2, "chat": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_greedy_options_have_the_same_meaning(both, options):
    expected = both.own.generate(PROMPTS, EACH, max_new_tokens=8, **options)
    same(both.vllm.generate(PROMPTS, EACH, max_new_tokens=8, **options), expected)


@needs_vllm
def test_stop_strings_end_completions_at_the_same_token(both):
    plain = both.own.generate(PROMPTS, EACH, max_new_tokens=12)
    stops = sorted({one.text[1:3] for one in plain if len(one.text) > 3})
    expected = both.own.generate(PROMPTS, EACH, max_new_tokens=12, stop_strings=[*stops, "<eos>"])
    same(both.vllm.generate(PROMPTS, EACH, max_new_tokens=12, stop_strings=[*stops, "<eos>"]), expected)
    assert {(one.finish, len(one.ids) < 12) for one in expected} >= {("stop", True), ("length", False)}


@needs_vllm
def test_samples_repeat_for_their_seeds(both):
    options = {"do_sample": True, "temperature": 1.2, "top_p": 0.95, "top_k": 50, "min_p": 0.01, "max_new_tokens": 8}
    first, again = (both.vllm.generate(PROMPTS, EACH, **options) for _ in range(2))
    same(first, again)
    other = both.vllm.generate(PROMPTS, EACH, seeds=range(99, 99 + len(PROMPTS)), **options)
    assert [one.ids for one in other] != [one.ids for one in first]


def completions(both):
    return [both.own.tokenizer(text)["input_ids"] for text in [f"{prompt[:5]} so" for prompt in PROMPTS]]


@needs_vllm
def test_scores_are_equal_also_of_experts_that_act_on_prompts(both):
    answers = completions(both)
    found, expected = (engine.score(PROMPTS, answers, EACH) for engine in (both.vllm, both.own))
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4)
    reader = both.own.score(PROMPTS, answers, "reader")
    everywhere = [row for one in PROMPTS for row in both.own.score([one], [answers[PROMPTS.index(one)]], "adder")]
    assert reader != everywhere


@needs_vllm
def test_answer_tokens_of_a_score_are_not_reused_as_prompt_tokens(both):
    ids = torch.randint(4, 99, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    for engine in (both.vllm, both.own):
        engine.score([ids[:40]], [ids[40:150]], "reader")
    same(*(engine.generate([ids], "reader", max_new_tokens=6) for engine in (both.vllm, both.own)))
    found, expected = (engine.score([ids[:70]], [ids[70:]], "reader") for engine in (both.vllm, both.own))
    assert found[0] == pytest.approx(expected[0], rel=1e-4, abs=1e-4)


@needs_vllm
def test_scores_of_answers_that_share_all_but_their_last_token(both):
    rows, answers = [[5, 6, 7]] * 200, [[9, 4 + number % 90] for number in range(200)]  # more than vLLM takes at once
    found, expected = (engine.score(rows, answers, "adder") for engine in (both.vllm, both.own))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), **TOLERANCE)
    greedy = both.own.generate(rows[:1], "adder", max_new_tokens=2)[0].ids
    (scored,) = both.vllm.token_scores(rows[:1], [greedy], [Mix.one("adder")])
    assert [best for _, best in scored] == [True, True]


@needs_vllm
@pytest.mark.parametrize("answer", [(), (8, 9)])
def test_log_probabilities_of_the_next_token_are_equal(both, answer):
    tokens = [5, 6, 40]
    found, expected = (engine.next_logprobs(PROMPTS, tokens, EACH, answer=answer) for engine in (both.vllm, both.own))
    torch.testing.assert_close(found, expected, **TOLERANCE)


@needs_vllm
@pytest.mark.parametrize("granularity", ["model", "layer", "matrix"])
def test_a_few_shot_search_finds_the_same_mixture(both, granularity):
    def search(engine):
        examples = [("What is 1?", "one"), ("and 22?", "two"), ("x", "x")]
        return FewShotSearch(
            engine, examples, lambda _, reply: float(reply[:1] > "M"), max_new_tokens=3, granularity=granularity,
            population=6, iterations=3, seed=1,
        )  # fmt: skip

    found, expected = search(both.vllm), search(both.own)
    assert found.fit() == expected.fit()
    assert list(found.values) == list(expected.values)
    for (accuracy, likelihood), (other, mean) in zip(found.values.values(), expected.values.values(), strict=True):
        assert (accuracy, likelihood) == (other, pytest.approx(mean, abs=1e-4))


@needs_vllm
@pytest.mark.parametrize("strategy", [PromptDispatch, ClassifierDispatch])
def test_strategies_a_and_b_decide_alike(both, strategy):
    requests = [text for label in ("arithmetic", "reading", "words") for text in requests_of(label, 0, 3)]
    found, expected = (strategy(engine).decide(requests) for engine in (both.vllm, both.own))
    for one, other in zip(found, expected, strict=True):
        assert one.label == other.label
        assert one.evidence["probabilities"] == pytest.approx(other.evidence["probabilities"], abs=1e-4)


@needs_vllm
def test_strategy_d_is_left_to_our_engine(both, monkeypatch):
    with pytest.raises(ConfigError, match="strategy D.*--engine own"):
        RouterDispatch(both.vllm)
    monkeypatch.setattr("sigmix.adapt.two_pass.unrouted", lambda bank, base: [])  # every expert has statistics
    assert isinstance(open_strategy(both.vllm), ClassifierDispatch)


@needs_vllm
def test_the_base_is_described_as_by_our_engine(both):
    for name in ("base_name", "base_fingerprint", "context_length", "eos_token_ids"):
        assert getattr(both.vllm, name) == getattr(both.own, name)
    assert list(both.vllm.layers) == list(both.own.layers)


@needs_vllm
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mix": "adder:0.5+nobody:0.5"}, UnknownNameError, "nobody"),
        ({"mix": Mix({"adder": {"model.nowhere": 1.0}})}, ConfigError, "nowhere"),
        ({"mix": "adder:1e30"}, ExpertError, "adder:1e30"),
        ({"form": "gain"}, ConfigError, "form"),
        ({"structured_output": StructuredOutput(regex="[0-9]+")}, ConfigError, "structured_output"),
        ({"do_sample": True, "temperature": 3.0}, ConfigError, "temperature"),
        ({"max_new_tokens": CONTEXT}, ContextError, str(CONTEXT)),
    ],
)
def test_errors_leave_the_engine_as_it_was(both, options, error, message):
    with pytest.raises(error, match=message):
        both.vllm.generate(["a", "b"], **{"max_new_tokens": 2, **options})
    same(*(engine.generate(["a"], "adder", max_new_tokens=2) for engine in (both.vllm, both.own)))


@needs_vllm
def test_large_weights_leave_nothing_in_the_cache(both):
    both.vllm.generate(PROMPTS, "adder:9000", max_new_tokens=4)
    same(*(engine.generate(PROMPTS, "adder", max_new_tokens=4) for engine in (both.vllm, both.own)))


@needs_vllm
def test_errors_of_single_prompts_can_be_kept(both):
    options = {"max_new_tokens": 3, "keep_errors": True}
    found, expected = (engine.generate(["a", [5] * CONTEXT], "adder", **options) for engine in (both.vllm, both.own))
    same(found, expected)
    assert [type(one.error) for one in found] == [type(None), ContextError]


@needs_vllm
def test_an_expert_of_another_base_is_refused_when_it_is_used(both):
    stranger = expert(build_tiny("llama", seed=5, **LONG), "stranger", 4)
    path = both.bank.add(stranger)
    try:
        both.vllm.bank.refresh()
        with pytest.raises(FingerprintError, match="stranger"):
            both.vllm.check_expert(stranger)
        for use in (both.vllm.check_mix, lambda mix: both.vllm.generate(["a"], mix, max_new_tokens=2)):
            with pytest.raises(ExpertError, match="stranger"):
                use(Mix.one("stranger"))
    finally:
        shutil.rmtree(path)
        both.bank.refresh()
        both.vllm.bank.refresh()
    same(*(engine.generate(["a"], "adder", max_new_tokens=2) for engine in (both.vllm, both.own)))


# ---------------------------------------------------------------------- commands


@pytest.fixture
def figures(both, run, monkeypatch):
    """``figures(command, …, engine=…)`` -> JSON of a command on the base and the bank; vLLM is the module's engine."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    opened = []
    monkeypatch.setattr("sigmix.integrations.vllm.engine.VllmEngine", lambda *given: opened.append(given) or both.vllm)

    def call(*words, engine):
        opened.clear()
        done = run(*words, "--engine", engine, "--base", both.base, "--bank", both.bank.folder, "--json")
        assert done.code == 0, done.err
        assert [str(base) for base, *_ in opened] == [str(both.base)] * (engine == "vllm")
        return done.json

    return call


def untimed(entries):
    return [{k: value for k, value in one.items() if "seconds" not in k and "tokens" not in k} for one in entries]


EVAL = ("eval", "--task", "addition?digits=1", "--n", "8", "--max-new-tokens", "4")


@needs_vllm
@pytest.mark.parametrize(
    "words",
    [
        ("--expert", "adder", "--mix", "adder:0.5+reader:0.5"),
        ("--strategy", "A", "--strategy", "B", "--strategy", "C", "--shots", "3", "--strategy", "oracle"),
    ],
)
def test_eval_measures_the_same(figures, words):
    found, expected = (figures(*EVAL, *words, engine=engine)["results"] for engine in ("vllm", "own"))
    assert untimed(found) == untimed(expected)


@needs_vllm
def test_eval_opens_vllm(both, run, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    from sigmix.integrations.vllm import engine as module

    monkeypatch.setattr(module, "VllmEngine", lambda *given: ALIVE.append(VllmEngine(*given)) or ALIVE[-1])
    words = (*EVAL, "--expert", "adder", "--base", both.base, "--bank", both.bank.folder, "--json")
    found, expected = (run(*words, "--engine", engine) for engine in ("vllm", "own"))
    assert untimed(found.json["results"]) == untimed(expected.json["results"])


@needs_vllm
def test_dispatch_is_measured_with_strategy_a(figures, tmp_path):
    (tmp_path / "requests.json").write_text('{"arithmetic": ["1 + 2", "3 + 4"], "other": ["Tell me a joke."]}')
    words = ("eval", "--dispatch", "--requests", tmp_path / "requests.json")
    found = figures(*words, engine="vllm")["strategies"]
    expected = figures(*words, "--strategy", "A", engine="own")["strategies"]
    assert [one["rows"] for one in found] == [one["rows"] for one in expected]


@needs_vllm
def test_adapt_finds_the_same_mixture(figures, tmp_path):
    words = ("adapt", "--task", "addition?digits=1", "--shots", "3", "--settings", "light", "--population", "4",
             "--iterations", "2")  # fmt: skip
    found, expected = (figures(*words, "--out", tmp_path / f"{one}.json", engine=one) for one in ("vllm", "own"))
    assert found["weights"] == expected["weights"]


@needs_vllm
def test_the_harness_scores_and_generates_the_same(both, monkeypatch):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from sigmix.integrations import lm_eval

    monkeypatch.setattr(lm_eval, "VllmEngine", lambda *given: both.vllm)
    options = {"base": str(both.base), "bank": str(both.bank.folder), "dtype": "float32", "strategy": "A"}
    found, expected = (lm_eval.SigmixLM(**options, engine=engine) for engine in ("vllm", "own"))
    long = "abcd " * 1000  # longer than the context
    pairs = [(f"{prompt}:", answer) for prompt in PROMPTS[:8] for answer in (" yes", " no", " nose", "", "y")]
    cases = {
        "loglikelihood": [*pairs, ("", "a dog")],
        "loglikelihood_rolling": [("",), ("a dog sees the sun.",), (long,)],
        "generate_until": [(prompt, {"until": ["e", "qz"], "max_gen_toks": 8}) for prompt in PROMPTS[:8]],
    }
    for kind, arguments in cases.items():
        requests = [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]
        ours, theirs = (getattr(model, kind)(requests, True) for model in (expected, found))
        for one, other in zip(theirs, ours, strict=True):
            assert one == (other if isinstance(other, str) else pytest.approx(other, rel=1e-4, abs=1e-3))
    info, other = (model.get_model_info() for model in (found, expected))
    assert {**info["sigmix"], "seconds": 0, "tokens": 0} == {**other["sigmix"], "seconds": 0, "tokens": 0}
    assert {**info, "sigmix": None} == {**other, "sigmix": None}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("eval", "--task", "addition", "--engine", "vlm"), ("vlm", "vllm")),
        (("eval", "--task", "addition", "--quantization", "int8"), ("--quantization", "--engine own")),
        (("eval", "--task", "addition", "--basis", "original"), ("--basis", "--engine own")),
        (("eval", "--task", "addition", "--device-map", "auto"), ("--device-map", "--engine own")),
        (("eval", "--task", "addition", "--decode-weights", "int8"), ("--decode-weights", "--engine own")),
        (("eval", "--task", "addition", "--compile"), ("--compile", "--engine own")),
        (("adapt", "--task", "addition", "--granularity", "z", "--method", "swarm", "--out", "z"), ("--engine own",)),
        (("adapt", "--data", "rows.csv", "--compare", "train", "--out", "mix.json"), ("--compare", "--engine own")),
    ],
    ids=lambda words: " ".join(words),
)
def test_options_that_vllm_does_not_have(refused, home, words, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = words if "--engine" in words else (*words, "--engine", "vllm")
    line = refused(*given, "--base", home.base, "--bank", home.bank, silent=False)
    assert all(name in line for name in named)


@pytest.mark.parametrize(
    "words",
    [
        ("eval", "--task", "addition"), ("eval", "--task", "addition", "--strategy", "A"),
        ("adapt", "--task", "addition", "--out", "mix.json"),
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_vllm_must_be_installed(refused, home, words, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # an import of it fails
    monkeypatch.chdir(tmp_path)
    line = refused(*words, "--engine", "vllm", "--base", home.base, "--bank", home.bank, silent=False)
    assert "pip install 'vllm==0.32.*'" in line


def test_the_harness_on_vllm(home, monkeypatch):
    pytest.importorskip("lm_eval")
    from sigmix.integrations.lm_eval import SigmixLM

    options = {"base": str(home.base), "bank": str(home.bank), "engine": "vllm"}
    for name, value in {"form": "gain", "quantization": "int8", "device": "cpu"}.items():
        with pytest.raises(ConfigError, match=f"{name}.*engine=own"):
            SigmixLM(**options, **{name: value})
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="pip install 'vllm"):
        SigmixLM(**options)


def test_experts_must_be_in_a_folder(home):
    with pytest.raises(ConfigError, match="folder"):
        VllmEngine(home.base, dict(Bank(home.bank)))
