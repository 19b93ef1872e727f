"""`sigmix generate` and `sigmix chat`."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest

from sigmix.cli.chat import Session

pytest_plugins = ["helpers_cli"]


@pytest.fixture
def ask(run, home):
    def call(*arguments, **options):
        return run("generate", *arguments, "--base", home.base, "--bank", home.bank, **options)

    return call


@pytest.fixture
def chat(run, home):
    def call(lines, *arguments):
        given = "".join(f"{line}\n" for line in lines)
        return run("chat", "--base", home.base, "--bank", home.bank, "--max-new-tokens", 5, *arguments, stdin=given)

    return call


def test_json_holds_text_ids_logprobs_mix_and_finish(ask):
    done = ask("hi", "--mix", "arithmetic:.7+reading:.3", "--max-new-tokens", 6, "--json")
    (answer,) = done.json["answers"]
    assert answer["mix"] == "arithmetic:0.7+reading:0.3"
    assert answer["finish"] in ("stop", "length")
    assert len(answer["ids"]) == len(answer["logprobs"]) <= 6
    assert all(value <= 0 for value in answer["logprobs"])
    assert answer["prompt"] == "hi"
    assert not done.err


def test_several_prompts_each_with_its_mix(ask):
    both = ask("hi", "hi", "--mix", "arithmetic", "--mix", "base", "--json").json["answers"]
    assert [one["mix"] for one in both] == ["arithmetic", "base"]
    assert both[0]["ids"] == ask("hi", "--mix", "arithmetic", "--json").json["answers"][0]["ids"]
    assert both[1]["ids"] == ask("hi", "--json").json["answers"][0]["ids"]
    text = ask("hi", "ho", "--max-new-tokens", 3).out
    assert "> hi" in text
    assert "[base]" in text


def test_prompts_from_stdin_and_from_a_file(ask, tmp_path):
    assert ask("--json", stdin="two\nlines\n").json["answers"][0]["prompt"] == "two\nlines"
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")
    assert [one["prompt"] for one in ask("--file", file, "--json").json["answers"]] == ["one", "two"]


def test_a_mix_from_a_file_is_that_mix(ask, tmp_path):
    file = tmp_path / "mix.json"
    file.write_text(json.dumps({"weights": {"arithmetic": 0.5}}))
    assert ask("hi", "--mix", file, "--json").json == ask("hi", "--mix", "arithmetic:0.5", "--json").json


def test_sampling_follows_the_seed(ask):
    options = ("hi", "--temperature", 2, "--max-new-tokens", 12, "--json")
    first, again, other = (ask(*options, "--seed", seed).json["answers"][0]["ids"] for seed in (1, 1, 2))
    assert first == again != other


def test_raw_leaves_the_chat_template_out(ask):
    assert ask("hello", "--raw", "--json").json["answers"][0]["prompt_tokens"] == len("hello")
    assert ask("hello", "--json").json["answers"][0]["prompt_tokens"] > len("hello")


def test_a_stop_text_ends_the_answer(ask):
    full = ask("hello", "--raw", "--max-new-tokens", 20, "--temperature", 1, "--json").json["answers"][0]
    mark = full["text"][2]
    cut = ask("hello", "--raw", "--max-new-tokens", 20, "--temperature", 1, "--stop", mark, "--json").json["answers"][0]
    assert cut["text"] == full["text"].partition(mark)[0]
    assert cut["finish"] == "stop"


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
        (["--file", "/no/such/file"], "/no/such/file"),
        (["hi", "--file", "/no/such/file"], "both"),
    ],
)
def test_bad_input(refused, home, arguments, expected):
    assert expected in refused("generate", *arguments, "--base", home.base, "--bank", home.bank)


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
    asked = ("generate", "hi", "--mix", "arithmetic", "--base", home.base, "--bank", home.bank)
    assert "is damaged" in refused(*asked)
    assert len(run("cache", "list", "--damaged", "--json").json["entries"]) == len(files)
    assert len(run("cache", "clear", "--damaged", "--yes", "--json").json["removed"]) == len(files)
    assert run(*asked).code == 0


# ---------------------------------------------------------------------- chat


def test_a_session_with_wrong_commands_goes_on(chat):
    lines = ["hello", "/expert arithmetc", "/expert", "/mix a:b", "/nonsense", "/expert arithmetic", "and now", "/quit"]
    done = chat([*lines, "/experts"])
    assert done.code == 0
    assert len(done.err) == 4
    assert all(line.startswith("sigmix: ") for line in done.err)
    assert "nearest: arithmetic" in done.err[0]
    assert "(answering with arithmetic)" in done.out
    assert "knows reading" not in done.out  # /quit left before /experts


def test_commands_of_a_session(chat):
    lines = ["/help", "/experts", "/mix arithmetic:.7+reading:.3", "/mix", "/base", "/expert base", "/new", "", "/quit"]
    done = chat(lines)
    assert done.code == 0
    assert not done.err
    assert "/expert NAME" in done.out
    assert "knows reading" in done.out
    assert done.out.count("(answering with arithmetic:0.7+reading:0.3)") == 2
    assert done.out.count("(answering with base)") == 2


def test_the_end_of_input_leaves(chat):
    assert chat(["hello"]).code == 0
    assert chat([]).code == 0


def test_a_chat_answers_as_generate_does(chat, ask):
    text = ask("hello", "--mix", "arithmetic", "--max-new-tokens", 5).out
    assert chat(["hello"], "--mix", "arithmetic").out == text


def test_a_prompt_too_long_is_an_error_and_the_session_goes_on(chat):
    done = chat(["x" * 400, "hello"])
    assert done.code == 0
    assert len(done.err) == 1
    assert "context of 256" in done.err[0]
    assert done.out


def test_chat_refuses_bad_options(refused, home):
    at = ("--base", home.base, "--bank", home.bank)
    assert "nearest: reading" in refused("chat", "--mix", "readin", *at)
    assert "--top-p" in refused("chat", "--top-p", 2, *at)
    assert "does not exist" in refused("chat", "--base", home.base, "--bank", "no-such-folder")


class Parrot:
    """An engine that records what it is asked and answers "ok"; on "stop" the user presses Ctrl-C."""

    def __init__(self, tokenizer, limit=256):
        self.tokenizer, self.asked, self.bank = tokenizer, [], {}
        self.model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=limit))

    def stream(self, ids, mix, **_):
        self.asked.append(self.tokenizer.decode(ids))
        yield "ok"
        if "stop" in self.asked[-1]:
            raise KeyboardInterrupt


@pytest.fixture
def session(tiny_tokenizer):
    from sigmix import Mix

    def make(single=False, system=None, limit=256):
        return Session(Parrot(tiny_tokenizer, limit), Mix.base(), "auto", {"max_new_tokens": 16}, 0, single, system)

    return make


def test_turns_see_the_conversation_unless_single(session):
    many, one = session(system="Be brief."), session(single=True)
    for line in ("first", "second"):
        many.turn(line)
        one.turn(line)
    assert "first" in many.engine.asked[1]
    assert "ok" in many.engine.asked[1]
    assert all("Be brief." in asked for asked in many.engine.asked)
    assert "first" not in one.engine.asked[1]
    many.turn("/new")
    many.turn("third")
    assert "second" not in many.engine.asked[2]


def test_ctrl_c_stops_the_answer_and_not_the_session(session, capsys):
    one = session()
    assert one.turn("stop")
    assert "ok (stopped)" in capsys.readouterr().out
    assert one.turn("next")
    assert len(one.engine.asked) == 2


def test_overflow_forgets_the_oldest_turns_with_a_note(session, capsys):
    one = session(limit=120)
    for number in range(4):
        one.turn(f"turn {number} " + "x" * 20)
    err = capsys.readouterr().err
    assert "120 tokens" in err
    assert "turn 0" not in one.engine.asked[3]
    assert "turn 3" in one.engine.asked[3]


def test_without_a_chat_template_turns_are_lines(session):
    one = session()
    one.engine.tokenizer.chat_template = None
    one.turn("first")
    one.turn("second")
    assert one.engine.asked[1] == "first\nok\nsecond"


def test_a_prompt_over_the_context_does_not_keep_the_others_from_their_answers(ask):
    done = ask("hi", "x" * 300, "ho", "--max-new-tokens", 3)
    assert done.code == 2
    assert len(done.err) == 1
    assert "prompt 1" in done.err[0]
    assert "> hi" in done.out
    assert "> ho" in done.out
