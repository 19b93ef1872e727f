"""Continuous batching: sequences join and leave between steps, and each is decoded as if it were alone."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers_engine import expert, rows

from sigmix.engine import Engine, continuous_batching
from sigmix.engine.continuous_batching import ContinuousBatch
from sigmix.engine.detokenizer import StreamingDetokenizer
from sigmix.engine.generation import SamplingParams, SequenceState
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix

pytestmark = pytest.mark.usefixtures("cache")
MIXES = ["base", "math", "code:-0.4", "math:0.7+code:0.3", "plan", "plan:0.6+math:0.4"]


@pytest.fixture(params=["llama", "gpt2", "qwen3", "gemma3"])
def setup(request, tiny, tiny_tokenizer):
    bank = {name: expert(tiny(request.param), name, seed) for name, seed in (("math", 1), ("code", 2), ("plan", 3))}
    bank["plan"] = replace(bank["plan"], meta={"positions": "prompt"})
    return SimpleNamespace(
        engine=Engine(tiny(request.param), tiny_tokenizer, bank),
        alone=Engine(tiny(request.param), tiny_tokenizer, bank),
    )


PARAMS = ("max_new_tokens", "do_sample", "temperature", "top_p", "seed")


def sequence(ids, mix="base", **options) -> SequenceState:
    params = SamplingParams(**{name: options.pop(name) for name in PARAMS if name in options})
    return SequenceState(ids, params, Mix.parse(mix), **options)


def expected(engine, one: SequenceState):
    options = {name: getattr(one.params, name) for name in PARAMS[:-1]}
    (found,) = engine.generate([one.prompt_ids], one.mix, seeds=[one.params.seed], form="factored", **options)
    return found


def finish(batch: ContinuousBatch) -> None:
    while batch:
        batch.step()


def run(batch, arrivals: dict[int, list[SequenceState]], leaving: dict[int, list[SequenceState]], steps: int = 200):
    for step in range(steps):
        if arrivals.get(step):
            batch.add(arrivals[step])
        batch.remove(leaving.get(step, []))
        batch.step()
        if not len(batch) and step >= max(arrivals):
            return
    raise AssertionError("it does not end")


def test_log_probabilities_of_prompts(setup, monkeypatch):
    """In ragged batches, in chunks, and where the beginning is cached, they are those of one plain pass."""
    monkeypatch.setattr(continuous_batching, "CHUNK_TOKENS", 24)
    draw = random.Random(0)
    batch = ContinuousBatch(setup.engine)
    for number, ids in enumerate(rows([5, 9, 20, 23, 60, 24, 1, 70], shared=0)):
        count, options = draw.choice([0, 2, 9]), {"mix": MIXES[number % len(MIXES)], "top_logprobs": 2}
        first = sequence(ids, max_new_tokens=count, cache_prefix=True, **options)
        again = sequence([*ids, 7, 9], max_new_tokens=2, **options)
        plain = sequence(ids, draw.choice(MIXES), max_new_tokens=5)
        found = {one: [] for one in (first, again)}
        first.on_prompt, again.on_prompt = found[first].extend, found[again].extend
        batch.add([first, plain])
        if number % 2:
            finish(batch)
        batch.add([again])
        finish(batch)
        assert plain.ids == expected(setup.alone, plain).ids
        for one, scores in found.items():
            prompt = torch.tensor([one.prompt_ids])
            logprobs = setup.alone.logits(prompt, mix=one.mix, form="factored")[0, :-1].log_softmax(-1)
            assert len(scores) == len(one.prompt_ids) - 1
            own = logprobs.gather(1, prompt[0, 1:, None])[:, 0].tolist()
            assert [score for score, _ in scores] == pytest.approx(own, abs=1e-3)
            for place, (_, top) in enumerate(scores):
                assert [value for _, value in top] == pytest.approx(logprobs[place].topk(2).values.tolist(), abs=1e-3)
        assert len(first.ids) <= count


@pytest.mark.parametrize("seed", range(3))
def test_each_answers_as_if_alone(setup, monkeypatch, seed):
    monkeypatch.setattr(continuous_batching, "CHUNK_TOKENS", 24)
    draw = random.Random(seed)
    lengths = [draw.choice([5, 9, 20, 60]) for _ in range(24)]
    shared = 4 if seed else 0
    members, arrivals, leaving = [], {}, {}
    for number, ids in enumerate(rows(lengths, shared=shared, seed=seed)):
        warm = draw.choice([0.0, 0.0, 0.8])
        one = sequence(
            ids, draw.choice(MIXES), max_new_tokens=draw.choice([1, 4, 15, 40]), do_sample=warm > 0, temperature=warm,
            top_p=draw.choice([1.0, 0.7]), seed=number,
        )  # fmt: skip
        members.append(one)
        start = draw.randrange(20)
        arrivals.setdefault(start, []).append(one)
        if draw.random() < 0.25:
            leaving.setdefault(start + draw.randrange(1, 12), []).append(one)
    cut = {id(one) for gone in leaving.values() for one in gone}
    run(ContinuousBatch(setup.engine), arrivals, leaving)
    for one in members:
        whole = expected(setup.alone, one)
        if id(one) in cut and not one.finish:
            assert one.ids == whole.ids[: len(one.ids)]
        else:
            assert (one.ids, one.finish) == (whole.ids, whole.finish)
    assert any(one.finish == "length" for one in members)


def test_logprobs_and_the_most_probable(setup):
    tokens = []
    ids = rows([12])[0]
    one = sequence(ids, "math", max_new_tokens=5, top_logprobs=3)
    one.on_token = lambda *each: tokens.append(each)
    other = sequence(rows([9])[0], "code", max_new_tokens=7)
    batch = ContinuousBatch(setup.engine)
    batch.add([other, one])
    finish(batch)
    whole = expected(setup.alone, one)
    assert [token for token, *_ in tokens] == whole.ids
    torch.testing.assert_close(torch.tensor([logprob for _, logprob, *_ in tokens]), torch.tensor(whole.logprobs))
    for token, logprob, best, _ in tokens:
        assert len(best) == 3
        assert best[0] == pytest.approx((token, logprob), abs=1e-4)
        assert best[0][1] >= best[1][1] >= best[2][1]


def test_a_stop_string_ends_a_sequence_and_the_text_is_streamed(setup):
    one = sequence(rows([8])[0], max_new_tokens=20)
    whole = setup.alone.generate([one.prompt_ids], max_new_tokens=20)[0].text
    stop, pieces = whole[5:7], []
    one.detokenizer = StreamingDetokenizer(setup.engine.tokenizer, [stop])
    one.on_token = lambda *each: pieces.append(each[-1])
    batch = ContinuousBatch(setup.engine)
    batch.add([one])
    finish(batch)
    assert (one.finish, one.detokenizer.stopped) == ("stop", stop)
    assert "".join(pieces) == one.detokenizer.text == whole[: whole.index(stop)]


def test_between_steps_others_may_use_the_engine(setup):
    one, two = sequence(rows([8])[0], "math", max_new_tokens=6), sequence(rows([11])[0], "code", max_new_tokens=6)
    batch = ContinuousBatch(setup.engine)
    batch.add([one, two])
    batch.step()
    batch.release()
    between = setup.engine.generate([one.prompt_ids], "base", max_new_tokens=4)
    assert between[0].ids == setup.alone.generate([one.prompt_ids], "base", max_new_tokens=4)[0].ids
    finish(batch)
    assert one.ids == expected(setup.alone, one).ids
    assert two.ids == expected(setup.alone, two).ids


def test_a_turn_is_not_read_twice(setup, monkeypatch):
    first = sequence(rows([100])[0], "math", max_new_tokens=8, cache_prefix=True)  # too long to be padded to
    batch = ContinuousBatch(setup.engine)
    batch.add([first])
    finish(batch)
    following = first.prompt_ids + first.ids + [5, 6, 7]
    second, other = sequence(following, "math", max_new_tokens=8), sequence(following, "code", max_new_tokens=8)
    read = []
    batch.add([second, other])
    hook = setup.engine.model.register_forward_pre_hook(
        lambda _, __, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    finish(batch)
    hook.remove()
    # of a cached turn the last token was chosen, but not read; sliding windows cannot be continued
    assert read[0] == (4 if setup.engine.prefix_cache.usable(range(99)) else len(following))
    assert second.ids == expected(setup.alone, second).ids
    assert other.ids == expected(setup.alone, other).ids


def test_a_broken_row_breaks_no_other(setup):
    # finite, as an expert must be, but what it computes is not
    sick = {path: torch.full_like(z, 1e30) for path, z in setup.engine.bank["math"].z.items()}
    bank = {**setup.engine.bank, "sick": Expert("sick", sick)}
    engine = Engine(setup.engine.model, setup.engine.tokenizer, bank)
    good, bad = sequence(rows([8])[0], "code", max_new_tokens=9), sequence(rows([30])[0], "sick", max_new_tokens=9)
    later = sequence(rows([30])[0], "math", max_new_tokens=9)
    batch = ContinuousBatch(engine)
    batch.add([bad, good])
    batch.step()
    assert (bad.finish, len(bad.ids)) == ("error", 1)
    # as a row that breaks while it is under way would leave it
    for layer in batch.kv_cache.cache.layers:
        for buffer in layer.buffers:
            buffer[1:] = float("nan")
    batch.step()
    batch.add([later])
    finish(batch)
    assert good.ids == expected(setup.alone, good).ids
    assert later.ids == expected(setup.alone, later).ids


@pytest.fixture
def passes(setup):
    """Shapes (rows, columns) of the engine's forward passes."""
    shapes = []
    hook = setup.engine.model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    hook.remove()


def test_arrivals_do_not_stop_the_running(setup, passes, monkeypatch):
    """Between two of their tokens at most a budget of prompt tokens is read, and every prompt has its turn."""
    monkeypatch.setattr(continuous_batching, "PAUSE", 0)
    monkeypatch.setattr(continuous_batching, "MIN_CHUNK_TOKENS", 24)
    lengths = [8, 70, *[6] * 20]
    running, long, *short = [
        sequence(ids, MIXES[number % len(MIXES)], max_new_tokens=60 if not number else 3)
        for number, ids in enumerate(rows(lengths))
    ]
    batch = ContinuousBatch(setup.engine)
    batch.add([running])
    batch.step()
    batch.add([long, *short])
    for _ in range(12):
        count, before = len(running.ids), len(passes)
        batch.step()
        assert len(running.ids) == count + 1
        read = sum(height * width for height, width in passes[before:] if width > 1)
        assert read <= 24
        if not long.ids and all(one.ids for one in short):
            break
    assert all(one.ids for one in short)  # none has waited for the whole long prompt
    assert not long.ids
    finish(batch)
    for one in (running, long, *short):
        assert one.ids == expected(setup.alone, one).ids


def test_prompts_continue_from_prefixes_of_their_own_in_one_pass(setup, passes):
    """Turns of conversations of several lengths, and a new prompt, under their mixtures."""
    batch = ContinuousBatch(setup.engine)
    first = [
        sequence(ids, mix, max_new_tokens=4, cache_prefix=True)
        for ids, mix in zip(rows([40, 47, 60]), ("math", "plan", "base"), strict=True)
    ]
    batch.add(first)
    finish(batch)
    second = [sequence([*one.prompt_ids, *one.ids, 5, 6, 7 + end][: 99 - end], str(one.mix), max_new_tokens=9)
              for end, one in enumerate(first)]  # fmt: skip
    second.append(sequence(rows([7], seed=9)[0], "code:-0.4", max_new_tokens=9))
    passes.clear()
    batch.add(second)
    batch.step()
    if setup.engine.prefix_cache.usable(range(99)):
        assert passes == [(4, 7)]
    finish(batch)
    for one in second:
        assert one.ids == expected(setup.alone, one).ids


@pytest.mark.parametrize("when", [0, 1, 3])
def test_a_sequence_leaves_while_it_is_read(setup, monkeypatch, when):
    monkeypatch.setattr(continuous_batching, "CHUNK_TOKENS", 16)
    running, gone, later = [
        sequence(ids, mix, max_new_tokens=20)
        for ids, mix in zip(rows([8, 70, 30]), ("plan", "math", "plan:0.6+math:0.4"), strict=True)
    ]
    batch = ContinuousBatch(setup.engine)
    batch.add([running])
    batch.step()
    batch.add([gone, later])
    for _ in range(when):
        batch.step()
    batch.remove([gone])
    assert len(batch) == 2
    finish(batch)
    assert not gone.ids
    for one in (running, later):
        assert one.ids == expected(setup.alone, one).ids


def test_an_error_of_one_prompt_ends_no_other(setup):
    """Prompts of one pass are read again, each alone."""
    poison = 3
    sequences = [
        sequence(ids, mix, max_new_tokens=8) for ids, mix in zip(rows([8, 9, 8]), ("plan", "math", "base"), strict=True)
    ]
    sequences[1].prompt_ids[4] = poison

    def fail(_, __, given):
        if (given["input_ids"] == poison).any():
            raise RuntimeError("broken")

    hook = setup.engine.model.register_forward_pre_hook(fail, with_kwargs=True)
    batch = ContinuousBatch(setup.engine, isolate=True)
    batch.add(sequences)
    finish(batch)
    hook.remove()
    assert sequences[1].finish == "error"
    for one in (sequences[0], sequences[2]):
        assert one.ids == expected(setup.alone, one).ids


def test_buffers_are_reused(setup):
    batch = ContinuousBatch(setup.engine)
    sizes = []
    for _ in range(6):
        batch.add([sequence(ids, mix, max_new_tokens=30) for ids, mix in zip(rows([10, 12, 14, 16]), MIXES[:4])])
        while len(batch):
            batch.step()
        sizes.append(batch.kv_cache.nbytes)
    assert len(set(sizes[1:])) == 1
