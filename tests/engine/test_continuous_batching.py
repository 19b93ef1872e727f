"""`Running`: members come and go between steps, and each answers as if it were alone."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from helpers_engine import expert, rows

from sigmix.engine import Engine
from sigmix.engine import continuous_batching as running
from sigmix.engine.continuous_batching import Member, Running
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix

pytestmark = pytest.mark.usefixtures("cache")
MIXES = ["base", "math", "code:-0.4", "math:0.7+code:0.3"]


@pytest.fixture(params=["llama", "gpt2", "qwen3", "gemma3"])
def made(request, tiny, tiny_tokenizer):
    bank = {name: expert(tiny(request.param), name, seed) for name, seed in (("math", 1), ("code", 2))}
    return SimpleNamespace(
        engine=Engine(tiny(request.param), tiny_tokenizer, bank),
        alone=Engine(tiny(request.param), tiny_tokenizer, bank),
    )


def member(ids, mix="base", take=None, **options) -> Member:
    return Member(ids, Mix.parse(mix), take or (lambda *_: False), **options)


def expected(engine, one: Member):
    (found,) = engine.generate(
        [one.ids], one.mix, max_new_tokens=one.max_new_tokens, do_sample=one.temperature > 0,
        temperature=one.temperature, top_p=one.top_p, seeds=[one.seed], form="factored",
    )  # fmt: skip
    return found


def run(batch: Running, arrivals: dict[int, list[Member]], leaving: dict[int, list[Member]], steps: int = 200):
    for step in range(steps):
        if arrivals.get(step):
            batch.join(arrivals[step])
        batch.leave(leaving.get(step, []))
        batch.step()
        if not len(batch) and step >= max(arrivals):
            return
    raise AssertionError("it does not end")


@pytest.mark.parametrize("seed", range(3))
def test_each_answers_as_if_alone(made, monkeypatch, seed):
    monkeypatch.setattr(running, "CHUNK", 24)
    draw = random.Random(seed)
    lengths = [draw.choice([5, 9, 20, 60]) for _ in range(24)]
    shared = 4 if seed else 0
    members, arrivals, leaving = [], {}, {}
    for number, ids in enumerate(rows(lengths, shared=shared, seed=seed)):
        warm = draw.choice([0.0, 0.0, 0.8])
        one = member(
            ids, draw.choice(MIXES), max_new_tokens=draw.choice([1, 4, 15, 40]), temperature=warm,
            top_p=draw.choice([1.0, 0.7]), seed=number,
        )  # fmt: skip
        members.append(one)
        start = draw.randrange(20)
        arrivals.setdefault(start, []).append(one)
        if draw.random() < 0.25:
            leaving.setdefault(start + draw.randrange(1, 12), []).append(one)
    cut = {id(one) for gone in leaving.values() for one in gone}
    run(Running(made.engine), arrivals, leaving)
    for one in members:
        whole = expected(made.alone, one)
        if id(one) in cut and not one.finish:
            assert one.answer == whole.ids[: len(one.answer)]
        else:
            assert (one.answer, one.finish) == (whole.ids, whole.finish)
    assert any(one.finish == "length" for one in members)


def test_logprobs_and_the_most_probable(made):
    told = []
    ids = rows([12])[0]
    one = member(ids, "math", lambda *each: told.append(each) or False, max_new_tokens=5, top=3)
    other = member(rows([9])[0], "code", max_new_tokens=7)
    batch = Running(made.engine)
    batch.join([other, one])
    while len(batch):
        batch.step()
    whole = expected(made.alone, one)
    assert [token for token, _, _ in told] == whole.ids
    torch.testing.assert_close(torch.tensor([logprob for _, logprob, _ in told]), torch.tensor(whole.logprobs))
    for token, logprob, best in told:
        assert len(best) == 3
        assert best[0] == pytest.approx((token, logprob), abs=1e-4)
        assert best[0][1] >= best[1][1] >= best[2][1]


def test_the_one_who_takes_ends_it(made):
    one = member(rows([8])[0], max_new_tokens=20)
    one.take = lambda *_: len(one.answer) == 3
    batch = Running(made.engine)
    batch.join([one])
    while len(batch):
        batch.step()
    assert (len(one.answer), one.finish) == (3, "stop")


def test_between_steps_others_may_use_the_engine(made):
    one, two = member(rows([8])[0], "math", max_new_tokens=6), member(rows([11])[0], "code", max_new_tokens=6)
    batch = Running(made.engine)
    batch.join([one, two])
    batch.step()
    batch.rest()
    between = made.engine.generate([one.ids], "base", max_new_tokens=4)
    assert between[0].ids == made.alone.generate([one.ids], "base", max_new_tokens=4)[0].ids
    while len(batch):
        batch.step()
    assert one.answer == expected(made.alone, one).ids
    assert two.answer == expected(made.alone, two).ids


def test_a_turn_is_not_read_twice(made, monkeypatch):
    if made.engine.prefixes.usable(range(99)) is False:
        pytest.skip("a sliding window keeps no beginnings")
    first = member(rows([40])[0], "math", max_new_tokens=8, remember=True)
    batch = Running(made.engine)
    batch.join([first])
    while len(batch):
        batch.step()
    following = first.ids + first.answer + [5, 6, 7]
    second, other = member(following, "math", max_new_tokens=8), member(following, "code", max_new_tokens=8)
    read = []
    batch.join([second, other])
    hook = made.engine.model.register_forward_pre_hook(
        lambda _, __, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    while len(batch):
        batch.step()
    hook.remove()
    assert read[0] == 4  # the answer's last token was chosen, but not read
    assert second.answer == expected(made.alone, second).ids
    assert other.answer == expected(made.alone, other).ids


def test_a_broken_row_breaks_no_other(made):
    # finite, as an expert must be, but what it computes is not
    sick = {path: torch.full_like(z, 1e30) for path, z in made.engine.bank["math"].z.items()}
    bank = {**made.engine.bank, "sick": Expert("sick", sick)}
    engine = Engine(made.engine.model, made.engine.tokenizer, bank)
    good, bad = member(rows([8])[0], "code", max_new_tokens=9), member(rows([30])[0], "sick", max_new_tokens=9)
    later = member(rows([30])[0], "math", max_new_tokens=9)
    batch = Running(engine)
    batch.join([bad, good])
    assert (bad.finish, bad.answer) == ("error", [])
    # as a row that breaks while it is under way would leave it
    for layer in batch.slots.cache.layers:
        for buffer in layer.buffers:
            buffer[1:] = float("nan")
    batch.step()
    batch.join([later])
    while len(batch):
        batch.step()
    assert good.answer == expected(made.alone, good).ids
    assert later.answer == expected(made.alone, later).ids


def test_slots_are_reused(made):
    batch = Running(made.engine)
    sizes = []
    for _ in range(6):
        batch.join([member(ids, mix, max_new_tokens=30) for ids, mix in zip(rows([10, 12, 14, 16]), MIXES)])
        while len(batch):
            batch.step()
        sizes.append(batch.slots.bytes())
    assert len(set(sizes[1:])) == 1
