"""Models with other caches than keys and values of one width are served, and a request's answer is its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers_architectures import build
from helpers_engine import expert
from helpers_serve import CHAT, serving

pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.slow]
TEXTS = ("one two three", "one two", "one two three four five six seven", "ten", "one two three four", "two")


@pytest.mark.parametrize(
    "name", ["phi3, longrope", "deepseek_v3", "mamba", "jamba", "falcon_h1", "lfm2", "qwen3_5_text", "qwen3_next"]
)
def test_requests_beside_each_other(tmp_path, name):
    bodies = [
        {
            "model": "math:0.5" if number % 2 else "base",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 12 - number,
            "logprobs": True,
        }
        for number, text in enumerate(TEXTS)
    ]
    with serving(tmp_path, {"math": expert(build(name), "math", 1)}, model=build(name)) as client:

        def reply(body):
            status, answer, _ = client.call("POST", CHAT, body)
            assert status == 200, answer
            return [one["token"] for one in answer["choices"][0]["logprobs"]["content"]]

        alone = [reply(body) for body in bodies]
        with ThreadPoolExecutor(len(bodies)) as pool:
            for _ in range(3):
                assert list(pool.map(reply, bodies)) == alone
