"""Embeddings: mean of the last hidden states, formats, batches, invalid requests."""

from __future__ import annotations

import base64
import struct
import threading
from itertools import pairwise

import pytest
import torch
from helpers_serve import CHAT, NEVER_ENDS, TIMEOUT, wait_until

from sigmix.engine import Engine
from sigmix.serve.routes import by_length

PATH = "/v1/embeddings"
TEXTS = ["one two three", "four", "one two", "x " * 40]


def vectors(server, **fields):
    status, found, _ = server.call("POST", PATH, {"model": "base", **fields})
    assert status == 200, found
    assert [entry["index"] for entry in found["data"]] == list(range(len(found["data"])))
    return torch.tensor([entry["embedding"] for entry in found["data"]]), found


def oracle(engine: Engine, text: str, mix: str = "base") -> torch.Tensor:
    """Mean of the last hidden states of a text alone, scaled to length 1."""
    ids = torch.tensor([engine.tokenizer(text)["input_ids"]])
    with torch.no_grad(), engine.under(engine.mixes(mix, 1)):
        states = engine.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
    return torch.nn.functional.normalize(states.mean(0), dim=0)


@pytest.mark.parametrize("model", ["base", "math", "math:.7+code:.3"])
def test_the_mean_of_the_last_hidden_states(server, alone, model):
    found, response = vectors(server, input=TEXTS, model=model)
    for vector, text in zip(found, TEXTS, strict=True):
        torch.testing.assert_close(vector, oracle(alone, text, model), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone.embeddings(TEXTS, model), found, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(TEXTS)))
    assert response["model"] == model
    tokens = sum(len(alone.tokenizer(text)["input_ids"]) for text in TEXTS)
    assert response["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_mixtures_differ_and_rows_may_have_their_own(alone):
    first, second = alone.embeddings(["one two", "one two"], ["base", "math"])
    torch.testing.assert_close(first, oracle(alone, "one two"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second, oracle(alone, "one two", "math"), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first, second, atol=1e-3)
    longer = alone.embeddings(["one two"], normalize=False)[0]
    torch.testing.assert_close(longer / longer.norm(), first, rtol=1e-4, atol=1e-5)


def test_forms_of_the_input(server, alone):
    expected = vectors(server, input=TEXTS[:2])[0]
    ids = [alone.tokenizer(text)["input_ids"] for text in TEXTS[:2]]
    torch.testing.assert_close(vectors(server, input=ids)[0], expected)
    for single in (TEXTS[0], ids[0], [TEXTS[0]], [ids[0]]):
        torch.testing.assert_close(vectors(server, input=single)[0], expected[:1], rtol=1e-4, atol=1e-5)


def test_base64(server):
    (vector,), _ = vectors(server, input="one", dimensions=64)
    status, found, _ = server.call("POST", PATH, {"input": "one", "encoding_format": "base64"})
    assert status == 200
    assert struct.unpack("<64f", base64.b64decode(found["data"][0]["embedding"])) == pytest.approx(vector.tolist())


def test_openai_client(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=server.http)
    found = client.embeddings.create(model="math", input=TEXTS)  # base64 by default
    expected, _ = vectors(server, input=TEXTS, model="math")
    torch.testing.assert_close(torch.tensor([entry.embedding for entry in found.data]), expected)


@pytest.mark.parametrize(
    "fields, status, param",
    [
        ({"input": ""}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": ["one", ""]}, 400, "input.1"),
        ({"input": [[]]}, 400, "input.0"),
        ({"input": ["one", "x " * 400]}, 400, "input.1"),
        ({"input": [[5, 10**9]]}, 400, "input.0"),
        ({"input": [-1]}, 400, "input.0"),
        ({"input": ["x"] * 2049}, 400, "input"),
        ({"input": 3}, 400, "input"),
        ({"model": "auto"}, 400, "model"),
        ({"model": "text-embedding-3-small"}, 404, "model"),
        ({"dimensions": 32}, 400, "dimensions"),
        ({"encoding_format": "hex"}, 400, "encoding_format"),
        ({"pooling": "last"}, 400, "pooling"),
    ],
)
def test_invalid_requests(server, fields, status, param):
    got, found, _ = server.call("POST", PATH, {"input": "x", "model": "base", **fields})
    assert (got, found["error"]["param"]) == (status, param)


def test_a_text_beyond_the_context(server):
    _, found, _ = server.call("POST", PATH, {"input": "x " * 400})
    assert found["error"]["code"] == "context_length_exceeded"
    assert "max" not in found["error"]["message"]  # no option would help
    assert vectors(server, input="x " * 128)[0].shape == (1, 64)


def test_running_requests_go_on_beside_embeddings(server, monkeypatch):
    """Every pass of the embeddings leaves room for a decoding step."""
    scheduler, passes, order = server.service.scheduler, Engine.embeddings, []
    step = type(scheduler)._step

    def embeddings(*args, **kwargs):
        order.append("embeddings")
        return passes(*args, **kwargs)

    monkeypatch.setattr(Engine, "embeddings", embeddings)
    monkeypatch.setattr(type(scheduler), "_step", lambda self: (order.append("step"), step(self))[1])
    body = {**NEVER_ENDS, "model": "math", "messages": [{"role": "user", "content": "one"}], "max_tokens": 60}
    with server.hold():
        chat = threading.Thread(target=lambda: server.call("POST", CHAT, body))
        chat.start()
        other = threading.Thread(target=lambda: vectors(server, input=["x " * 100] * 40))
        other.start()
        wait_until(lambda: len(scheduler.queue) == 1 and scheduler._calls)
    chat.join(TIMEOUT)
    other.join(TIMEOUT)
    assert order.count("embeddings") == 8
    first = order.index("step")
    assert "embeddings" in order[first:]
    between = order[first : len(order) - order[::-1].index("step")]
    assert ("embeddings", "embeddings") not in pairwise(between)


def test_groups_of_prompts_are_bounded():
    lengths = [700, 10, 400, 3, 400, 2000, 600]
    parts = list(by_length(lengths, 1024))
    assert sorted(number for part in parts for number in part) == list(range(len(lengths)))
    for part in parts:
        longest = max(lengths[number] for number in part)
        assert len(part) == 1 or longest * len(part) <= 1024
        assert longest <= 2 * min(lengths[number] for number in part)
