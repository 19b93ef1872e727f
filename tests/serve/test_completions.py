"""POST /v1/completions: echo, log-probabilities of prompts, best_of."""

from __future__ import annotations

import math

import pytest
import torch
from helpers_serve import serving
from helpers_tiny import build_tiny, build_tokenizer

from sigmix.engine import Engine
from sigmix.engine.continuous_batching import CHUNK_TOKENS

PATH = "/v1/completions"
MIXES = ["base", "math", "math:.7+code:.3"]
TOLERANCE = {"abs": 1e-3}


def complete(server, prompt, **options):
    status, found, _ = server.call("POST", PATH, {"model": "math", "prompt": prompt, **options})
    assert status == 200, found
    return found


def logprobs_of(engine, ids, mix):
    """Log-probabilities [T - 1, V] after each token of a sequence but the last one, from one plain pass."""
    return engine.logits(torch.tensor([ids]), mix=mix)[0, :-1].float().log_softmax(-1)


def check_logprobs(choice, engine, ids, mix, top=1):
    """Compare the log-probabilities of a choice that is all of ``ids``."""
    found, expected = choice["logprobs"], logprobs_of(engine, ids, mix)
    assert {len(values) for values in found.values()} == {len(ids)}
    assert found["token_logprobs"][0] is None is found["top_logprobs"][0]
    following = expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert found["token_logprobs"][1:] == pytest.approx(following, **TOLERANCE)
    for place, (most, own) in enumerate(zip(found["top_logprobs"][1:], found["token_logprobs"][1:], strict=True)):
        best = expected[place].topk(top).values.tolist()
        assert max(most.values()) == pytest.approx(best[0], **TOLERANCE)
        # clients compare the two numbers
        assert (own == max(most.values())) == (int(expected[place].argmax()) == ids[place + 1])
        others = [value for value in most.values() if value != own]  # tokens of equal text share an entry
        assert all(any(abs(value - one) < 1e-3 for one in best) for value in others)
        assert len(most) <= top + 1


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_echo_with_logprobs(server, alone, mix, max_tokens):
    prompt = "one two three"
    ids = alone.encode(prompt, chat=False)
    found = complete(server, prompt, model=mix, max_tokens=max_tokens, echo=True, logprobs=3)
    (choice,) = found["choices"]
    replies = alone.generate([ids], mix, max_new_tokens=max_tokens) if max_tokens else []
    generated = [token for reply in replies for token in reply.ids]
    assert choice["text"] == prompt + "".join(reply.text for reply in replies)
    assert choice["finish_reason"] == "length"
    usage = found["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(ids), len(generated)) == (len(ids), max_tokens)
    check_logprobs(choice, alone, [*ids, *generated], mix, top=3)
    tokens, offsets = choice["logprobs"]["tokens"][: len(ids)], choice["logprobs"]["text_offset"]
    assert "".join(tokens) == prompt
    assert all(prompt[start:].startswith(token) for start, token in zip(offsets, tokens, strict=False))
    assert offsets[len(ids) :][:1] in ([], [len(prompt)])


def test_echo_without_logprobs(server, alone):
    (plain,) = complete(server, "one two", max_tokens=4)["choices"]
    (echoed,) = complete(server, "one two", max_tokens=4, echo=True)["choices"]
    assert echoed["text"] == "one two" + plain["text"]
    assert echoed["logprobs"] is None
    ids = alone.encode("one two", chat=False)
    assert complete(server, ids, max_tokens=4, echo=True)["choices"][0]["text"] == echoed["text"]
    nothing = complete(server, "one two", max_tokens=0, temperature=1.0, n=2)["choices"]
    assert [(choice["text"], choice["finish_reason"]) for choice in nothing] == [("", "length")] * 2


def test_several_prompts_and_choices(server, alone):
    prompts = [alone.encode(text, chat=False) for text in ("one", "two three " * 9, "a", "four five six")]
    options = {"max_tokens": 3, "echo": True, "logprobs": 2, "n": 2, "temperature": 1.0, "seed": 3}
    choices = complete(server, prompts, **options)["choices"]
    assert [choice["index"] for choice in choices] == list(range(8))
    plain = complete(server, prompts, **{**options, "echo": False})["choices"]
    for number, ids in enumerate(prompts):
        for index in (2 * number, 2 * number + 1):
            echoed, own = choices[index], plain[index]
            text = alone.tokenizer.decode(ids)
            assert echoed["text"] == text + own["text"]
            assert echoed["logprobs"]["tokens"][len(ids) :] == own["logprobs"]["tokens"]
            expected = logprobs_of(alone, ids, "math").gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
            assert echoed["logprobs"]["token_logprobs"][1 : len(ids)] == pytest.approx(expected, **TOLERANCE)


@pytest.mark.parametrize("logprobs", [None, 0, 2])
def test_stream_equals_the_whole_response(server, logprobs):
    options = {"model": "math", "prompt": ["one two", "three"], "max_tokens": 4, "echo": True, "n": 2, "seed": 1,
               "temperature": 1.0, "logprobs": logprobs}  # fmt: skip
    whole = complete(server, **options)
    events = server.stream({**options, "stream_options": {"include_usage": True}}, PATH)
    assert events[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        own = [c for event in events for c in event["choices"] if c["index"] == choice["index"]]
        assert own[0]["text"] == options["prompt"][choice["index"] // 2]
        assert "".join(c["text"] for c in own) == choice["text"]
        parts = [c["logprobs"] for c in own if c["logprobs"]]
        for name, values in (choice["logprobs"] or {}).items():
            assert [value for part in parts for value in part[name] or []] == (values or [])


def test_a_prompt_in_chunks_and_in_the_cache(tmp_path, cache):
    model = {"max_position_embeddings": 2048}
    alone = Engine(build_tiny(**model), build_tokenizer())
    ids = [3 + (7 * place) % 200 for place in range(2 * CHUNK_TOKENS + 50)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("helpers_serve.build_tiny", lambda: build_tiny(**model))
        with serving(tmp_path, {}) as server:
            options = {"model": "base", "max_tokens": 2, "echo": True, "logprobs": 1}
            (reply,) = alone.generate([ids], max_new_tokens=2)
            # the first request leaves its conversation in the prefix cache
            for prompt in (ids, ids, ids[:-3], ids[: CHUNK_TOKENS + 1], ids[:CHUNK_TOKENS], ids[:1]):
                (choice,) = complete(server, prompt, **options)["choices"]
                read = ids + reply.ids if prompt is ids else prompt + alone.generate([prompt], max_new_tokens=2)[0].ids
                check_logprobs(choice, alone, read, None)


def test_a_failing_prompt_leaves_its_neighbours_alone(tmp_path, cache):
    """An expert of huge weights: logits are not finite."""
    with serving(tmp_path) as server:
        body = {"prompt": "one two", "max_tokens": 0, "echo": True, "logprobs": 1}
        status, found, _ = server.call("POST", PATH, {**body, "model": "math:1e38"})
        assert (status, found["error"]["code"]) == (503, "model")
        assert complete(server, **body)["choices"][0]["logprobs"]["token_logprobs"]


def test_best_of(server):
    options = {"max_tokens": 6, "temperature": 1.5, "seed": 4, "logprobs": 0}
    every = complete(server, "one two", n=5, **options)
    means = [sum(scores) / len(scores) for c in every["choices"] for scores in [c["logprobs"]["token_logprobs"]]]
    best = sorted(range(5), key=lambda index: -means[index])
    found = complete(server, "one two", best_of=5, n=2, **options)
    assert [choice["text"] for choice in found["choices"]] == [every["choices"][index]["text"] for index in best[:2]]
    assert [choice["index"] for choice in found["choices"]] == [0, 1]
    assert found["usage"] == every["usage"]
    both = complete(server, ["one two", "three"], best_of=3, **options)
    assert [choice["index"] for choice in both["choices"]] == [0, 1]
    as_many = complete(server, "one two", best_of=2, n=2, **options)["choices"]
    assert [choice["text"] for choice in as_many] == [choice["text"] for choice in every["choices"][:2]]
    assert server.stream({"prompt": "one", "model": "math", "best_of": 1, "max_tokens": 2}, PATH)


@pytest.mark.parametrize(
    "options, param",
    [
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 10**6}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 0}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"logprobs": 10**3, "echo": True}, "logprobs"),
    ],
)
def test_invalid_options(server, options, param):
    status, found, _ = server.call("POST", PATH, {"prompt": "one", "model": "math", **options})
    assert status == 400
    assert param in found["error"]["message"]


def test_a_prompt_as_long_as_the_context(server, alone):
    ids = [3 + place % 200 for place in range(alone.context_length)]
    (choice,) = complete(server, ids, max_tokens=0, echo=True, logprobs=0)["choices"]
    assert len(choice["logprobs"]["tokens"]) == len(ids)
    assert all(math.isfinite(value) for value in choice["logprobs"]["token_logprobs"][1:])
    assert server.call("POST", PATH, {"prompt": ids, "max_tokens": 1, "echo": True})[0] == 400
