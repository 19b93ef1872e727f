"""The evaluation harness on tiny models: its own `hf` model on dense weights is the oracle, request by request."""

from __future__ import annotations

import json
import shutil
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers_engine import answer_scores, dense, expert
from helpers_experts import at
from helpers_tiny import build_tiny, build_tokenizer
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from sigmix import Bank, Engine, Mix, load_base
from sigmix.adapt import RouterDispatch, request_statistics
from sigmix.errors import ConfigError, ContextError, PromptError, UnknownNameError
from sigmix.experts.fingerprint import fingerprint
from sigmix.integrations.lm_eval import SigmixLM

pytest_plugins = ["helpers_cli"]
# float32, two layers: batched, padded and single matmuls round differently by a few 1e-6 a token
TOLERANCE = {"rel": 1e-4, "abs": 1e-3}
MIX = "one:.7+two:.3"
WORDS = ["sun", "a dog", "Where is it", "8 + 5", "green tea", "no", "left or right", "x" * 300]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """base, bank (experts of the float32 base, with statistics of one request each), tasks: folders."""
    folder = tmp_path_factory.mktemp("harness")
    places = SimpleNamespace(base=folder / "tiny", bank=folder / "bank", tasks=folder / "tasks", cache=folder / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGMIX_CACHE", str(places.cache))
        build_tiny().save_pretrained(places.base)
        build_tokenizer().save_pretrained(places.base)
        bank = Bank(places.bank, create=True)
        for seed, name in enumerate(("one", "two"), 1):
            meta = {"domain": name, "description": f"kind {name}"}
            bank.add(expert(load_base(places.base, "float32", "cpu")[0], name, seed, width=1.2).with_meta(**meta))
        engine = Engine(*load_base(places.base, "float32", "cpu"))
        for name, place in (("one", 0), ("two", 3)):  # every expert is for the neighbourhood of one request
            bank.set_requests(name, request_statistics(engine, [f"{WORDS[place]}?"] * 2, [f"{WORDS[place]}?"]))
    places.tasks.mkdir()
    choices = [["yes", "no", f"{word[:3]}s"] for word in WORDS]
    rows = [{"question": word, "choices": choices[i], "gold": i % 3} for i, word in enumerate(WORDS)]
    file = places.tasks / "items.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {file}\ntest_split: test\n"
    (places.tasks / "choice.yaml").write_text(
        f'task: tiny_choice\n{common}output_type: multiple_choice\ndoc_to_text: "{{{{question}}}}?"\n'
        'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{gold}}"\nmetric_list:\n  - metric: acc\n'
    )
    (places.tasks / "reply.yaml").write_text(
        f'task: tiny_reply\n{common}output_type: generate_until\ndoc_to_text: "{{{{question}}}}: "\n'
        'doc_to_target: "{{choices[0]}}"\ngeneration_kwargs:\n  until: ["e", "qz"]\n  max_gen_toks: 12\n'
        "metric_list:\n  - metric: exact_match\n"
    )
    (places.tasks / "text.yaml").write_text(
        f'task: tiny_text\n{common}output_type: loglikelihood_rolling\ndoc_to_text: ""\n'
        'doc_to_target: "{{question}}."\nmetric_list:\n  - metric: word_perplexity\n'
    )
    return places


@pytest.fixture(autouse=True)
def only_our_tasks(monkeypatch):
    """The harness reads the files of its thousands of tasks for every run, seven seconds of it; ours are enough."""
    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))


@pytest.fixture
def harness(run, place, monkeypatch):
    """``harness("--mix", …)`` -> what `run` gives; tasks, base and bank are given."""

    def call(*words, tasks="tiny_choice", model=""):
        monkeypatch.setenv("SIGMIX_CACHE", str(place.cache))
        given = ("--include_path", place.tasks, "--base", place.base, "--bank", place.bank, "--tasks", tasks)
        return run("lm-eval", *given, "--model_args", f"dtype=float32{model}", *words)

    return call


def logged(folder: Path, task: str) -> list[dict]:
    (file,) = folder.rglob(f"samples_{task}_*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["doc_id"])


def oracle(place, mix: Mix) -> HFLM:
    """The harness's own model on a mix's dense weights.

    Without its cache of logits, which (0.4.13) answers "ab"+"c" by the logits after "a" if "a"+"bc" is asked for too.
    """
    engine = Engine(*load_base(place.base, "float32", "cpu"), bank=Bank(place.bank))
    return HFLM(dense(build_tiny(), engine.z(mix)), tokenizer=build_tokenizer(), batch_size=1, logits_cache=False)


def instances(kind, *arguments):
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def check(place, folder: Path, mixes: dict[str, list[Mix]]) -> None:
    """Every logged response is what the oracle says under the mix that its request is due."""
    oracles = {mix: oracle(place, mix) for mix in {mix for each in mixes.values() for mix in each}}
    for task, each in mixes.items():
        rows = logged(folder, task)
        assert len(rows) == len(WORDS)
        for row, mix in zip(rows, each, strict=True):
            arguments = [list(one.values()) for one in row["arguments"].values()]
            if task == "tiny_choice":
                expected = oracles[mix].loglikelihood(instances("loglikelihood", *map(tuple, arguments)), True)
                for (told,), (logprob, greedy) in zip(row["resps"], expected, strict=True):
                    assert float(told[0]) == pytest.approx(logprob, **TOLERANCE)
                    assert str(told[1]) == str(greedy)
                assert row["acc"] == float(max(range(3), key=lambda i: expected[i][0]) == row["doc"]["gold"])
            elif task == "tiny_reply":
                (expected,) = oracles[mix].generate_until(instances("generate_until", tuple(arguments[0])), True)
                assert row["resps"] == [[expected]]
            else:
                text = instances("loglikelihood_rolling", tuple(arguments[0]))
                (expected,) = oracles[mix].loglikelihood_rolling(text, True)
                assert float(row["resps"][0][0]) == pytest.approx(expected, **TOLERANCE)


ALL = "tiny_choice,tiny_reply,tiny_text"


@pytest.mark.parametrize("mix", ["base", MIX])
def test_every_kind_of_request_equals_the_harnesss_own_model(mix, harness, place, tmp_path):
    done = harness("--mix", mix, "--log_samples", "--output_path", tmp_path, "--json", tasks=ALL)
    parsed = Mix.parse(mix)
    check(place, tmp_path, dict.fromkeys(ALL.split(","), [parsed] * len(WORDS)))
    config = done.json["config"]["sigmix"]
    assert config["mixes"] == {parsed.id: 3 * len(WORDS) + 2 * len(WORDS)}
    assert done.json["config"]["model_num_parameters"] == build_tiny().num_parameters()
    assert config["truncated"] == 3 + 1  # the last word's choices and reply; a text is read in windows
    accuracy = sum(row["acc"] for row in logged(tmp_path, "tiny_choice")) / len(WORDS)
    assert done.json["results"]["tiny_choice"]["acc,none"] == pytest.approx(accuracy)
    replies = [row["resps"][0][0] for row in logged(tmp_path, "tiny_reply")]
    assert len({len(reply) for reply in replies}) > 1, "some stop, some run out"


@pytest.mark.parametrize("mix", ["prompts", "prompts:.7+two:.6"])
def test_experts_for_prompts_act_on_the_context_alone(mix, place, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SIGMIX_CACHE", str(place.cache))
    bank = Bank(shutil.copytree(place.bank, tmp_path / "bank"))
    bank.add(at("prompt", bank["one"], "prompts"))
    model = SigmixLM(str(place.base), mix=mix, bank=str(bank.folder), dtype="float32")
    assert ("on answer tokens only two" in caplog.text) is ("two" in mix)
    engine = Engine(*load_base(place.base, "float32", "cpu"), bank=bank)
    answering = Mix({name: alpha for name, alpha in Mix.parse(mix).weights.items() if name == "two"})
    read, write = dense(build_tiny(), engine.z(Mix.parse(mix))), dense(build_tiny(), engine.z(answering))

    def logprob(context, answer):
        rows = answer_scores(read, write, context, answer)
        chosen = rows.gather(1, torch.tensor(answer)[:, None])[:, 0]
        return float(chosen.sum()), rows.argmax(1).tolist() == list(answer)

    # the second and third text are the same tokens, divided elsewhere; the last one loses its beginning
    pairs = [("Where is it", " now"), ("8 + 5", " = 13"), ("8 + 5 = ", "13"), ("x" * 300, "yes"), ("", "no")]
    found = model.loglikelihood(instances("loglikelihood", *pairs), True)
    for (context, answer), (value, best) in zip(pairs, found, strict=True):
        context_ids, answer_ids = model._encode_pair(context, answer) if context else ([1], model.tok_encode(answer))
        context_ids = context_ids[-(model.max_length + 1 - len(answer_ids)) :]
        expected, greedy = logprob(context_ids, answer_ids)
        assert value == pytest.approx(expected, **TOLERANCE)
        assert best == greedy
    (value,) = model.loglikelihood_rolling(instances("loglikelihood_rolling", ("green tea.",)), True)
    assert value == pytest.approx(logprob([model.prefix_token_id], model.tok_encode("green tea."))[0], **TOLERANCE)
    options = {"until": ["qz"], "max_gen_toks": 6}
    (text,) = model.generate_until(instances("generate_until", ("Where is it", options)), True)
    row, ids = model.tok_encode("Where is it"), []
    while len(ids) < 6 and 2 not in ids:
        ids.append(int(answer_scores(read, write, row, [*ids, 0])[-1].argmax()))
    assert text == model.tok_decode([token for token in ids if token != 2])


def test_a_strategy_gives_every_request_its_own_mix(harness, place, tmp_path):
    file = tmp_path / "decisions.jsonl"
    words = ("--strategy", "D", "--log_samples", "--output_path", tmp_path / "out", "--json", "--batch_size", 5)
    done = harness(*words, tasks=ALL, model=f",decisions={file}")
    engine = Engine(*load_base(place.base, "float32", "cpu"), bank=Bank(place.bank))
    decide = RouterDispatch(engine).decide
    asked = {"tiny_choice": [f"{word}?" for word in WORDS], "tiny_reply": [f"{word}: " for word in WORDS]}
    asked["tiny_text"] = [f"{word}."[:128] for word in WORDS]  # of half the context's length
    mixes = {task: [one.mix for one in decide(texts)] for task, texts in asked.items()}
    assert len({mix for each in mixes.values() for mix in each}) == 3, "one, two and other"
    check(place, tmp_path / "out", mixes)

    config = done.json["config"]["sigmix"]
    assert config["strategy"] == "D (router)"
    assert config["contexts"] == 3 * len(WORDS)
    count = {}
    for task, each in mixes.items():
        for mix in each:
            count[mix.id] = count.get(mix.id, 0) + (3 if task == "tiny_choice" else 1)
    assert config["mixes"] == count
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {line["request"]: line["mix"] for line in lines} == {
        text: mix.id for task, texts in asked.items() for text, mix in zip(texts, mixes[task], strict=True)
    }
    assert all(line["reason"] for line in lines)


def test_with_the_chat_template_the_last_user_turn_is_decided_on(harness, tmp_path):
    file = tmp_path / "decisions.jsonl"
    done = harness(
        "--mix", "auto", "--apply_chat_template", "--limit", 3, "--system_instruction", "Be brief.",
        model=f",decisions={file}",
    )  # fmt: skip
    assert done.code == 0
    assert [json.loads(line)["request"] for line in file.read_text().splitlines()] == [f"{w}?" for w in WORDS[:3]]
    assert "3 decided by D (router): " in done.out
    assert "tiny_choice" in done.out


def test_a_system_instruction_that_the_chat_template_refuses(refused, place, harness, tmp_path, monkeypatch):
    """The harness's own model leaves it out, with a warning; here it is an error."""
    strict = tmp_path / "strict"
    build_tiny().save_pretrained(strict)
    tokenizer = build_tokenizer()
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    tokenizer.save_pretrained(strict)
    chat = ("--base", strict, "--mix", "base", "--apply_chat_template", "--limit", 1)
    assert harness(*chat).code == 0
    done = harness(*chat, "--system_instruction", "be brief")
    assert done.code == 2
    assert "System role not supported" in done.err[-1]
    assert "system message" in done.err[-1]


def test_a_task_without_documents_and_one_without_data(refused, place, tmp_path, monkeypatch):
    monkeypatch.setenv("SIGMIX_CACHE", str(place.cache))
    source = (place.tasks / "choice.yaml").read_text()
    (tmp_path / "none.jsonl").write_text("")
    for name, file in (("none", tmp_path / "none.jsonl"), ("missing", tmp_path / "missing.jsonl")):
        text = source.replace(str(place.tasks / "items.jsonl"), str(file)).replace("tiny_choice", name)
        (tmp_path / f"{name}.yaml").write_text(text)
    at = ("--include_path", tmp_path, "--base", place.base, "--tasks")
    assert "no documents" in refused("lm-eval", *at, "none")
    assert "missing.jsonl" in refused("lm-eval", *at, "missing")


@pytest.mark.parametrize(
    ("words", "name"),
    [(("--limit", 0), "--limit"), (("--limit", -1), "--limit"), (("--num_fewshot", -1), "--num_fewshot"),
     (("--output_path", "/proc/x"), "/proc/x")],
)  # fmt: skip
def test_options_of_the_harness_without_a_meaning(refused, place, words, name):
    at = ("--include_path", place.tasks, "--base", place.base, "--tasks", "tiny_choice")
    assert name in refused("lm-eval", *at, *words)


@pytest.mark.parametrize("length", [0, "x", -5])
def test_a_context_length_without_a_meaning(place, length):
    with pytest.raises(ConfigError, match="max_length"):
        SigmixLM(str(place.base), max_length=length)


def test_what_is_refused_before_the_work(run, place, harness, monkeypatch):
    def line(*words, **options):
        done = harness(*words, **options)
        assert done.code == 2, done.err
        assert len(done.err) == 1
        return done.err[0]

    assert "nearest: one" in line("--mix", "on")
    assert "mix=auto" in line("--mix", "one", "--strategy", "A")
    assert "unknown strategy 'E'" in line("--strategy", "E")
    assert "unknown engine 'vlm'; nearest: vllm" in line("--engine", "vlm")
    assert "unknown model argument 'colour'" in line(model=",colour=red")
    assert "Tasks not found: no_such_task" in line(tasks="no_such_task")
    assert "unrecognized arguments: --nonsense" in line("--nonsense")
    assert "'hf'" in line("--model", "hf")
    assert "batch_size must be auto or a number" in line("--batch_size", "0")
    assert "--tasks" in run("lm-eval", "ls", "tasks").err[0]
    assert "no --tasks" in run("lm-eval", "--mix", "base").err[0]


def test_options_of_a_yaml_file_are_kept(run, place, tmp_path, monkeypatch):
    """Place and batch size of the file are used; model arguments of the file and of the command line come together."""
    monkeypatch.setenv("SIGMIX_CACHE", str(place.cache))
    places = []
    real = SigmixLM.__init__
    monkeypatch.setattr(SigmixLM, "__init__", lambda self, **given: places.append(given) or real(self, **given))
    file = tmp_path / "run.yaml"
    file.write_text(
        f"tasks: [tiny_choice]\ninclude_path: {place.tasks}\nlimit: 2\noutput_path: {tmp_path / 'kept'}\n"
        "log_samples: true\nbatch_size: 3\nmodel_args: {dtype: bfloat16, max_length: 200}\n"
    )
    done = run("lm-eval", "-C", file, "--base", place.base, "--bank", place.bank, "--mix", "one", "--json",
               "--model_args", "dtype=float32")  # fmt: skip
    assert done.code == 0, done.err
    assert len(logged(tmp_path / "kept", "tiny_choice")) == 2
    (results,) = (tmp_path / "kept").rglob("results_*.json")
    assert json.loads(results.read_text())["results"] == done.json["results"]
    wanted = {"batch_size": 3, "dtype": "float32", "max_length": 200, "mix": "one"}
    assert {name: places[0][name] for name in wanted} == wanted


@pytest.mark.parametrize("content, words, message", [
    ("model: hf\ntasks: tiny_choice\n", (), "'hf'"),
    ("limit: 2\n", (), "no --tasks"),
    ("tasks: tiny_choice\nlog_samples: true\n", (), "--log_samples"),
    ("tasks: tiny_choice\n", ("--pred",), "--predict_only"),
    ("tasks: tiny_choice\n", ("-s",), "--log_samples"),
    ("- tasks\n", (), "YAML root must be a mapping"),
    ("tasks: [\n", (), "Invalid YAML"),
    (None, (), "Config file not found"),
])  # fmt: skip
def test_what_a_yaml_file_cannot_say(content, words, message, refused, tmp_path):
    file = tmp_path / "run.yaml"
    if content is not None:
        file.write_text(content)
    assert message in refused("lm-eval", "--config", file, *words, silent=False)


def test_options_in_every_form_that_the_harness_reads(run, place, tmp_path, monkeypatch):
    monkeypatch.setenv("SIGMIX_CACHE", str(place.cache))
    places = []
    real = SigmixLM.__init__
    monkeypatch.setattr(SigmixLM, "__init__", lambda self, **given: places.append(given) or real(self, **given))
    done = run("lm-eval", "-ttiny_choice", "-b8", "--output", tmp_path, "--incl", place.tasks, "-L2", "-sMsigmix",
               "--base", place.base, "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert places[0]["batch_size"] == "8"
    assert len(logged(tmp_path, "tiny_choice")) == 2


def test_a_base_without_a_chat_template_is_refused_before_the_requests(refused, place, tmp_path, monkeypatch):
    build_tiny().save_pretrained(tmp_path)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(SigmixLM, "_score", lambda *_: pytest.fail("requests were run"))
    words = ("--tasks", "tiny_choice", "--include_path", place.tasks, "--base", tmp_path, "--limit", 1)
    assert "has no chat template -> leave --apply_chat_template out" in refused(
        "lm-eval", *words, "--apply_chat_template", silent=False
    )


def test_a_quantised_base_in_its_own_and_the_original_basis(run, refused, place, monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setenv("SIGMIX_CACHE", str(place.cache))
    words = ("lm-eval", "--tasks", "tiny_choice", "--include_path", place.tasks, "--base", place.base, "--limit", 1,
             "--bank", place.bank, "--mix", "one", "--json")  # fmt: skip
    own = refused(*words, "--model_args", "dtype=float32", "--quantization", "int8", silent=False)
    assert "--basis original" in own
    done = run(*words, "--model_args", "dtype=float32,quantization=int8", "--basis", "original")
    assert done.code == 0, done.err
    config = done.json["config"]["sigmix"]
    assert config["mixes"] == {"one": 3}
    assert config["fingerprint"] != fingerprint(load_base(place.base, "float32", "cpu")[0])
    assert "--quantization" in refused(*words, "--basis", "original", silent=False)


def test_an_expert_of_another_base_is_refused(run, home, place):
    done = run("lm-eval", "--tasks", "tiny_choice", "--include_path", place.tasks, "--base", home.other,
               "--bank", place.bank, "--mix", "one")  # fmt: skip
    assert done.code == 2
    assert "'one'" in done.err[-1]
    assert "fingerprint" in done.err[-1]


@pytest.fixture(scope="module")
def model(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGMIX_CACHE", str(place.cache))
        return SigmixLM(str(place.base), MIX, bank=str(place.bank), dtype="float32", device="cpu")


def test_requests_without_context_and_rows_that_share_an_input(model, place):
    own = oracle(place, Mix.parse(MIX))
    pairs = [("", "abc"), ("ab", "c"), ("ab", "d"), ("a", "bc"), ("ab ", "c"), ("ab", "cde")]
    expected = own.loglikelihood(instances("loglikelihood", *pairs), True)
    for scored, right in zip(model.loglikelihood(instances("loglikelihood", *pairs), True), expected, strict=True):
        assert scored[0] == pytest.approx(right[0], **TOLERANCE)
        assert scored[1] == right[1]


def oracle_of(place, kind, *asked):
    return getattr(oracle(place, Mix.parse(MIX)), kind)(instances(kind, *asked), True)


EMPTY = [("", "abc"), ("", " "), ("", "  a"), ("ab", " "), ("ab", "\n"), ("ab  ", "c"), ("\nab", "c")]
EMPTY += [("x" * 300, "ab")]


def test_empty_and_blank_texts_score_as_in_the_harnesss_own_model(model, place):
    expected = oracle_of(place, "loglikelihood", *EMPTY)
    for one, right in zip(model.loglikelihood(instances("loglikelihood", *EMPTY), True), expected, strict=True):
        assert one == (pytest.approx(right[0], **TOLERANCE), right[1])


def test_texts_that_the_harnesss_own_model_fails_on(model, place):
    """A context of blanks is no context; an empty continuation is certain; neither changes the requests beside it."""
    pairs = [("  ", "a"), ("", ""), ("ab", ""), ("ab", "c"), ("\n", "")]
    expected = oracle_of(place, "loglikelihood", ("", "  a"), ("ab", "c"))
    blank, *nothing, plain, last = model.loglikelihood(instances("loglikelihood", *pairs), True)
    assert blank == (pytest.approx(expected[0][0], **TOLERANCE), expected[0][1])
    assert plain == (pytest.approx(expected[1][0], **TOLERANCE), expected[1][1])
    assert [*nothing, last] == [(0.0, True)] * 3


def test_rolling_likelihoods_of_short_long_and_no_texts(model, place):
    texts = [("a",), ("ab c",), ("x" * 300,), (" ",)]
    expected = oracle_of(place, "loglikelihood_rolling", *texts)
    got = model.loglikelihood_rolling(instances("loglikelihood_rolling", *texts, ("",)), True)
    assert got[:-1] == [pytest.approx(one, **TOLERANCE) for one in expected]
    assert got[-1] == 0.0


def test_a_token_without_an_embedding_is_named(model):
    rows = model.engine.model.get_input_embeddings().weight.shape[0]
    for context, answer in (([5, rows], [6]), ([5], [6, rows])):
        with pytest.raises(PromptError, match=f"token {rows}"):
            model._loglikelihood_tokens([(("a", "b"), context, answer)], True)


@pytest.mark.parametrize("until", ["e", ["e"], ["", "e"], [None, "e"], [], [""], None])
def test_every_form_of_until(model, place, until):
    context, options = "8 + 5", {"max_gen_toks": 12}
    (free,) = model.generate_until(instances("generate_until", (context, options)), True)
    (cut,) = model.generate_until(instances("generate_until", (context, {**options, "until": until})), True)
    assert cut == (free.split("e")[0] if until and "e" in until else free)


def test_generation_from_an_empty_and_from_a_long_context(model, place):
    options = {"until": ["e"], "max_gen_toks": 6}
    (expected,) = oracle_of(place, "generate_until", ("x" * 300, options))
    prefix = model.tokenizer.decode([model.prefix_token_id])
    empty, start, long = model.generate_until(
        instances("generate_until", ("", options), (prefix, options), ("x" * 300, options)), True
    )
    assert long == expected
    assert empty == start


@pytest.mark.parametrize("options", [{"max_gen_toks": 0}, {"max_gen_toks": -1}, {"until": [5]}, {"until": 5},
                                     {"temperature": "hot", "do_sample": True}, {"max_gen_toks": "many"}])  # fmt: skip
def test_generation_options_without_a_meaning(model, options):
    with pytest.raises(ConfigError, match="max_gen_toks"):
        model.generate_until(instances("generate_until", ("say", options)), True)


def test_no_token_for_an_empty_context(model, monkeypatch):
    monkeypatch.setattr(HFLM, "prefix_token_id", property(lambda self: None))  # neither bos nor eos
    with pytest.raises(ConfigError, match="prefix_token_id"):
        model.loglikelihood(instances("loglikelihood", ("", "a")), True)


def test_sampling_follows_the_seed_and_repeats_differ(model):
    options = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8, "until": []}
    requests = instances("generate_until", *[("say", options)] * 4)
    torch.manual_seed(5)
    first = model.generate_until(requests, True)
    torch.manual_seed(5)
    assert model.generate_until(requests, True) == first
    assert len(set(first)) > 1
    torch.manual_seed(6)
    assert model.generate_until(requests, True) != first


def test_a_special_token_as_a_stop_string(model, place):
    (free,) = model.generate_until(instances("generate_until", ("say", {"until": [], "max_gen_toks": 8})), True)
    token = model.engine.generate([model.tok_encode("say")], MIX, max_new_tokens=8)[0].ids[2]
    stop = model.tokenizer.convert_ids_to_tokens(token)
    other = SigmixLM(str(place.base), MIX, bank=str(place.bank), dtype="float32", device="cpu")
    other.tokenizer.add_special_tokens({"additional_special_tokens": [stop]})
    (cut,) = other.generate_until(instances("generate_until", ("say", {"until": [stop], "max_gen_toks": 8})), True)
    assert len(cut) <= 2 < len(free)


def test_sampling_options(model):
    def ask(**options):
        return model.generate_until(instances("generate_until", ("say", {"max_gen_toks": 12, **options})), True)

    greedy = ask()
    assert ask(do_sample=True, temperature=2.0, top_k=1) == ask(do_sample=True, temperature=2.0, min_p=1.0) == greedy
    for option in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert ask(**{option: 1.9}) != greedy


def test_what_generation_cannot_do(model):
    def ask(**options):
        return model.generate_until(instances("generate_until", ("say", options)), True)

    with pytest.raises(ConfigError, match="num_beams=4 .* -> .*until"):
        ask(num_beams=4)
    with pytest.raises(ContextError, match="256 .* -> .*max_gen_toks"):
        ask(max_gen_toks=256)
    assert ask(num_beams=1, do_sample=False, temperature=0.7, top_k=50, max_gen_toks=2)
    with pytest.raises(ContextError, match="300 tokens.* 256"):
        model.loglikelihood(instances("loglikelihood", ("a", "b" * 300)), True)
    with pytest.raises(UnknownNameError, match="nearest: bank"):
        SigmixLM(banks="x")


def test_the_harness_finds_the_model_by_its_name_and_by_the_entry_point():
    from importlib.metadata import EntryPoint

    from lm_eval.api.registry import get_model

    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (name, value), = project["entry-points"]["lm_eval.models"].items()
    assert EntryPoint(name, value, "lm_eval.models").load() is get_model("sigmix") is SigmixLM
