"""`sigmix generate`."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers_experts import at

from sigmix import Bank
from sigmix.engine.cpu import native
from sigmix.errors import ConfigError

pytest_plugins = ["helpers_cli"]


@pytest.fixture
def generate(run, home):
    def call(*arguments, **options):
        return run("generate", *arguments, "--base", home.base, "--bank", home.bank, **options)

    return call


def test_8_bit_decode_weights_leave_the_first_token_exact(generate):
    try:
        native.load_kernels()
    except ConfigError as error:
        pytest.skip(str(error))
    plain, small = (generate("hi", "--json", *more).json["answers"][0] for more in ((), ("--decode-weights", "int8")))
    assert plain["ids"][0] == small["ids"][0]
    assert plain["logprobs"][0] == small["logprobs"][0]
    assert plain["logprobs"][1:] != small["logprobs"][1:]


def test_json_holds_text_ids_logprobs_mix_and_finish(generate):
    done = generate("hi", "--mix", "arithmetic:.7+reading:.3", "--max-new-tokens", 6, "--json")
    (answer,) = done.json["answers"]
    assert answer["mix"] == "arithmetic:0.7+reading:0.3"
    assert answer["finish"] in ("stop", "length")
    assert len(answer["ids"]) == len(answer["logprobs"]) <= 6
    assert all(value <= 0 for value in answer["logprobs"])
    assert answer["prompt"] == "hi"
    assert not done.err


def test_several_prompts_each_with_its_mix(generate):
    both = generate("hi", "hi", "--mix", "arithmetic", "--mix", "base", "--json").json["answers"]
    assert [one["mix"] for one in both] == ["arithmetic", "base"]
    assert both[0]["ids"] == generate("hi", "--mix", "arithmetic", "--json").json["answers"][0]["ids"]
    assert both[1]["ids"] == generate("hi", "--json").json["answers"][0]["ids"]
    text = generate("hi", "ho", "--max-new-tokens", 3).out
    assert "> hi" in text
    assert "[base]" in text


def test_a_mixture_of_both_positions_names_the_experts_that_act_on_answers(run, home, tmp_path):
    bank = Bank(shutil.copytree(home.bank, tmp_path / "bank"))
    bank.add(at("prompt", bank["arithmetic"], "prompts"))
    given = ("--base", home.base, "--bank", bank.folder, "--max-new-tokens", 2)
    done = run("generate", "hi", "--mix", "prompts:0.5+reading:0.5", *given)
    assert any("on answer tokens only reading" in line for line in done.err)
    for mix in ("prompts", "reading", "base"):
        assert not any("answer tokens" in line for line in run("generate", "hi", "--mix", mix, *given).err)


def test_prompts_from_stdin_and_from_a_file(generate, tmp_path):
    assert generate("--json", stdin="two\nlines\n").json["answers"][0]["prompt"] == "two\nlines"
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")
    assert [one["prompt"] for one in generate("--file", file, "--json").json["answers"]] == ["one", "two"]


def test_a_mix_from_a_file_is_that_mix(generate, tmp_path):
    file = tmp_path / "mix.json"
    file.write_text(json.dumps({"weights": {"arithmetic": 0.5}}))
    assert generate("hi", "--mix", file, "--json").json == generate("hi", "--mix", "arithmetic:0.5", "--json").json


def test_sampling_follows_the_seed(generate):
    options = ("hi", "--temperature", 2, "--max-new-tokens", 12, "--json")
    first, again, other = (generate(*options, "--seed", seed).json["answers"][0]["ids"] for seed in (1, 1, 2))
    assert first == again != other


def test_raw_leaves_the_chat_template_out(generate):
    assert generate("hello", "--raw", "--json").json["answers"][0]["prompt_tokens"] == len("hello")
    assert generate("hello", "--json").json["answers"][0]["prompt_tokens"] > len("hello")


def test_a_stop_text_ends_the_answer(generate):
    full = generate("hello", "--raw", "--max-new-tokens", 20, "--temperature", 1, "--json").json["answers"][0]
    mark = full["text"][2]
    cut = generate("hello", "--raw", "--max-new-tokens", 20, "--temperature", 1, "--stop", mark, "--json").json[
        "answers"
    ][0]
    assert cut["text"] == full["text"].partition(mark)[0]
    assert cut["finish"] == "stop"


def test_sampling_options(generate):
    def ids(*options):
        return generate("hello", "--json", "--max-new-tokens", 12, *options).json["answers"][0]["ids"]

    greedy = ids()
    assert ids("--temperature", 2, "--top-k", 1) == ids("--temperature", 2, "--min-p", 1) == greedy
    for option in ("--repetition-penalty", "--presence-penalty", "--frequency-penalty"):
        assert ids(option, 1.9) != greedy


def test_answers_match_a_schema_a_regex_or_a_choice(generate, tmp_path):
    file = tmp_path / "schema.json"
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}
    file.write_text(json.dumps(schema), encoding="utf-8-sig")
    options = ("hello", "you", "--temperature", 1, "--max-new-tokens", 120, "--json")
    for one in generate(*options, "--json-schema", file).json["answers"]:
        assert one["finish"] == "stop"
        assert {type(item) for item in json.loads(one["text"])} == {bool}
    for one in generate(*options, "--regex", "[xyz]{9}").json["answers"]:
        assert len(one["text"]) == 9
    for one in generate(*options, "--choice", "yes", "--choice", "no").json["answers"]:
        assert one["text"] in ("yes", "no")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["hi", "--mix", "arithmetc"], "nearest: arithmetic"),
        (["hi", "--mix", "a:b:c"], "expected name:weight"),
        (["hi", "--mix", "arithmetic:lots"], "finite number"),
        (["hi", "--mix", "no/such.json"], "No such file"),
        (["hi", "--mix", "base", "--mix", "base"], "2 --mix for 1 prompts"),
        ([""], "the prompt is empty"),
        (["  "], "the prompt is empty"),
        ([], "the prompt is empty"),
        (["x" * 300], "context of 256"),
        (["hi", "--max-new-tokens", "999"], "context of 256"),
        (["hi", "--top-p", "0"], "top_p"),
        (["hi", "--top-k", "-5"], "--top-k"),
        (["hi", "--min-p", "1.5"], "--min-p"),
        (["hi", "--repetition-penalty", "0"], "repetition_penalty"),
        (["hi", "--presence-penalty", "3"], "--presence-penalty"),
        (["hi", "--regex", "(a"], "unclosed"),
        (["hi", "--regex", "a", "--choice", "a"], "regex and choice"),
        (["hi", "--json-schema", "/no/such/file"], "/no/such/file"),
        (["--file", "/no/such/file"], "/no/such/file"),
        (["hi", "--file", "/no/such/file"], "both"),
        (["--file", "."], "cannot read ."),
        (["--file", "/dev/null"], "no prompts"),
        (["hi\udcff"], "Unicode"),
        (["hi\udcff", "--raw"], "Unicode"),
        (["hi", "--system", "\udcff"], "Unicode"),
        (["hi", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["hi", "--temperature", "nan"], "--temperature"),
        (["hi", "--temperature", "inf"], "temperature"),
        (["hi", "--form", "mergd"], "merged"),
        (["hi", "--mix", "auto", "--strategy", "Z"], "'Z'"),
        (["hi", "--quantization", "int9"], "int8"),
        (["hi", "--decode-weights", "int9"], "int8"),
        (["hi", "--decode-weights", "int8", "--quantization", "nf4"], "nf4"),
    ],
)
def test_bad_input(refused, home, arguments, expected):
    assert expected in refused("generate", *arguments, "--base", home.base, "--bank", home.bank)


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbfhello\r\nyou\r\n\r\n \r\n", b"hello\nyou", b"\nhello\n\nyou\n\n", b"hello\ryou\r"]
)
def test_byte_order_marks_windows_line_ends_and_blank_lines_are_no_prompts(generate, tmp_path, content):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    for arguments, stdin in ((("--file", file), b""), (("--file", "-"), content)):
        answers = generate(*arguments, "--json", stdin=stdin).json["answers"]
        assert [one["prompt"] for one in answers] == ["hello", "you"]


def test_stdin_is_one_prompt_without_its_byte_order_mark(generate):
    assert generate("--json", stdin=b"\xef\xbb\xbfhello\r\nyou\r\n").json["answers"][0]["prompt"] == "hello\r\nyou"


@pytest.mark.parametrize(("content", "found"), [("hi".encode("utf-16"), "UTF-16"), (b"a\ncaf\xe9", ":2")])
def test_other_encodings_are_named(refused, home, tmp_path, content, found):
    at = ("--base", home.base, "--bank", home.bank)
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    for arguments, stdin in ((("--file", file), b""), ((), content)):
        line = refused("generate", *arguments, *at, stdin=stdin)
        assert found in line
        assert "UTF-8" in line
    mix = tmp_path / "mix.json"
    mix.write_bytes(content)
    assert "mix.json" in refused("generate", "hi", "--mix", mix, *at)


def test_a_mix_with_a_byte_order_mark(generate, tmp_path):
    file = tmp_path / "mix.json"
    file.write_bytes(b'\xef\xbb\xbf{"weights": {"arithmetic": 0.5}}\r\n')
    assert generate("hi", "--mix", file, "--json").json["answers"][0]["mix"] == "arithmetic:0.5"


def test_a_template_that_refuses_system_messages(run, refused, home):
    at = ("--base", home.strict, "--bank", home.bank)
    line = refused("generate", "hi", "--system", "be brief", *at)
    assert "System role not supported" in line
    assert "system message" in line.partition(" -> ")[2]
    assert run("generate", "hi", *at, "--max-new-tokens", 1).code == 0
    assert run("generate", "hi", "--system", "be brief", "--raw", *at, "--max-new-tokens", 1).code == 0


def test_no_base_and_no_bank(refused, home, tmp_path):
    assert "no base at" in refused("generate", "hi", "--base", tmp_path / "nothing")
    line = refused("generate", "hi", "--mix", "a", "--base", home.base, "--bank", tmp_path / "none")
    assert "does not exist" in line


def test_an_expert_of_another_base(refused, home):
    line = refused("generate", "hi", "--mix", "arithmetic", "--base", home.other, "--bank", home.bank)
    assert "'arithmetic' was made on" in line
    assert str(home.other) in line


def test_a_damaged_expert(refused, home, tmp_path):
    bank = tmp_path / "bank"
    shutil.copytree(home.bank, bank)
    weights = bank / "arithmetic" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    assert str(weights) in refused("generate", "hi", "--mix", "arithmetic", "--base", home.base, "--bank", bank)


def test_a_damaged_cache_entry(run, refused, home, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    shutil.copytree(home.cache, cache)
    monkeypatch.setenv("SIGMIX_CACHE", str(cache))
    files = sorted(cache.glob("svd/**/*.safetensors"))
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    command = ("generate", "hi", "--mix", "arithmetic", "--base", home.base, "--bank", home.bank)
    assert "is damaged" in refused(*command)
    assert len(run("cache", "list", "--damaged", "--json").json["entries"]) == len(files)
    assert len(run("cache", "clear", "--damaged", "--yes", "--json").json["removed"]) == len(files)
    assert run(*command).code == 0


def test_a_prompt_over_the_context_does_not_keep_the_others_from_their_answers(generate):
    done = generate("hi", "x" * 300, "ho", "--max-new-tokens", 3)
    assert done.code == 2
    assert len(done.err) == 1
    assert "prompt 1" in done.err[0]
    assert "> hi" in done.out
    assert "> ho" in done.out
