"""`sigmix chat`."""

from __future__ import annotations

import pytest

from sigmix.cli.chat import Session
from sigmix.engine.tokenization import encode

pytest_plugins = ["helpers_cli"]


@pytest.fixture
def chat(run, home):
    def call(lines, *arguments):
        given = "".join(f"{line}\n" for line in lines)
        return run("chat", "--base", home.base, "--bank", home.bank, "--max-new-tokens", 5, *arguments, stdin=given)

    return call


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


def test_a_chat_answers_as_generate_does(chat, run, home):
    options = ("--mix", "arithmetic", "--max-new-tokens", 5, "--base", home.base, "--bank", home.bank)
    text = run("generate", "hello", *options).out
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
    assert "--min-p" in refused("chat", "--min-p", 2, *at)
    assert "repetition_penalty" in refused("chat", "--repetition-penalty", 0, *at)
    assert "does not exist" in refused("chat", "--base", home.base, "--bank", "no-such-folder")
    strict = ("--base", home.strict, "--bank", home.bank, "--system", "be brief")
    assert "System role" in refused("chat", *strict, stdin="hi\n")


def test_bytes_that_are_not_utf8_are_an_error_and_the_session_goes_on(run, home):
    at = ("--base", home.base, "--bank", home.bank, "--max-new-tokens", 5)
    done = run("chat", *at, stdin=b"\xef\xbb\xbfcaf\xe9\r\nhello\r\n")
    assert done.code == 0
    assert len(done.err) == 1
    assert "Unicode" in done.err[0]
    assert done.out == run("generate", "hello", *at).out


class Parrot:
    """Engine that records its prompts and answers "ok"; a prompt with "stop" raises KeyboardInterrupt."""

    def __init__(self, tokenizer, limit=256):
        self.tokenizer, self.prompts, self.bank = tokenizer, [], {}
        self.context_length = limit

    def encode(self, turns, system):
        return encode(self.tokenizer, turns, system)

    def stream(self, ids, mix, **_):
        self.prompts.append(self.tokenizer.decode(ids))
        yield "ok"
        if "stop" in self.prompts[-1]:
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
    assert "first" in many.engine.prompts[1]
    assert "ok" in many.engine.prompts[1]
    assert all("Be brief." in prompt for prompt in many.engine.prompts)
    assert "first" not in one.engine.prompts[1]
    many.turn("/new")
    many.turn("third")
    assert "second" not in many.engine.prompts[2]


def test_ctrl_c_stops_the_answer_and_not_the_session(session, capsys):
    one = session()
    assert one.turn("stop")
    assert "ok (stopped)" in capsys.readouterr().out
    assert one.turn("next")
    assert len(one.engine.prompts) == 2


def test_overflow_forgets_the_oldest_turns_with_a_note(session, capsys):
    one = session(limit=120)
    for number in range(4):
        one.turn(f"turn {number} " + "x" * 20)
    err = capsys.readouterr().err
    assert "120 tokens" in err
    assert "turn 0" not in one.engine.prompts[3]
    assert "turn 3" in one.engine.prompts[3]


def test_without_a_chat_template_turns_are_lines(session):
    one = session()
    one.engine.tokenizer.chat_template = None
    one.turn("first")
    one.turn("second")
    assert one.engine.prompts[1] == "first\nok\nsecond"
