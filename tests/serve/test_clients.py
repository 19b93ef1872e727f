"""One conversation through the `openai` client, `litellm` and `curl`."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from helpers_serve import bank, live
from helpers_tiny import build_tiny, build_tokenizer

from sigmix.engine import Engine
from sigmix.serve.auth import add_key

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]
FIRST, SECOND = "one two three", "four five"
LIMIT = 9


@pytest.fixture
def server(tmp_path):
    key = add_key(tmp_path / "state" / "keys.json", "client")
    with live(tmp_path) as server:
        server.key = key
        yield server


def converse(answer) -> list[str]:
    """Replies of a conversation of two turns; ``answer`` maps messages to the reply."""
    turns = [{"role": "user", "content": FIRST}]
    turns.append({"role": "assistant", "content": answer(turns)})
    turns.append({"role": "user", "content": SECOND})
    return [turns[1]["content"], answer(turns)]


@pytest.fixture
def expected():
    """Replies of the engine in this conversation, by mixture."""

    def find(model: str) -> list[str]:
        engine = Engine(build_tiny(), build_tokenizer(), bank())

        def answer(turns):
            ids = engine.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True)
            ids = list(ids["input_ids"] if hasattr(ids, "keys") else ids)
            return engine.generate([ids], model, max_new_tokens=LIMIT)[0].text

        return converse(answer)

    return find


@pytest.mark.parametrize("model", ["math", "math:0.7+code:0.3"])
def test_openai(server, expected, model):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0)

    def whole(turns):
        found = client.chat.completions.create(model=model, messages=turns, max_tokens=LIMIT)
        assert found.model_extra["sigmix"]["weights"]
        return found.choices[0].message.content

    def streamed(turns):
        parts = client.chat.completions.create(
            model=model, messages=turns, max_tokens=LIMIT, stream=True, stream_options={"include_usage": True}
        )
        parts = list(parts)
        assert parts[-1].usage.completion_tokens <= LIMIT
        return "".join(part.choices[0].delta.content or "" for part in parts if part.choices)

    assert converse(whole) == converse(streamed) == expected(model)
    listed = {one.id for one in client.models.list()}
    assert {"auto", "base", "math"} <= listed
    assert client.models.retrieve("math").id == "math"
    plain = client.completions.create(model=model, prompt="one", max_tokens=4, logprobs=1)
    assert len(plain.choices[0].logprobs.tokens) == plain.usage.completion_tokens
    auto = client.chat.completions.create(model="auto", messages=[{"role": "user", "content": "hi"}], max_tokens=3)
    assert auto.model_extra["sigmix"]["reason"]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="maths", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hi"}], temperature=3)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_litellm(server, expected):
    litellm = pytest.importorskip("litellm")
    options = {"model": "openai/math", "api_base": f"{server.url}/v1", "api_key": server.key, "max_tokens": LIMIT}

    def whole(turns):
        return litellm.completion(messages=turns, **options).choices[0].message.content

    def streamed(turns):
        return "".join(
            part.choices[0].delta.content or "" for part in litellm.completion(messages=turns, stream=True, **options)
        )

    assert converse(whole) == converse(streamed) == expected("math")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server, expected):
    def call(turns, stream):
        body = json.dumps({"model": "math", "messages": turns, "max_tokens": LIMIT, "stream": stream})
        words = ["curl", "-sS", "--fail-with-body", "-N", f"{server.url}/v1/chat/completions", "-d", "@-"]
        for header in (f"Authorization: Bearer {server.key}", "Content-Type: application/json"):
            words += ["-H", header]
        done = subprocess.run(words, input=body, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout

    def streamed(turns):
        lines = [line[6:] for line in call(turns, True).split("\n") if line.startswith("data: {")]
        parts = [choice["delta"].get("content", "") for line in lines for choice in json.loads(line)["choices"]]
        return "".join(parts)

    assert converse(lambda turns: json.loads(call(turns, False))["choices"][0]["message"]["content"]) == expected(
        "math"
    )
    assert converse(streamed) == expected("math")
