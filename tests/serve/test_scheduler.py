"""The batcher under load: every answer is the one that the request would get alone, none is lost, none is mixed up."""

from __future__ import annotations

import queue
import random
import threading
import time

import pytest
from helpers_serve import NAMES, bank
from helpers_tiny import build_tiny, build_tokenizer

from sigmix.adapt import OTHER, Decision
from sigmix.engine import Engine
from sigmix.engine.continuous_batching import MERGE_AFTER
from sigmix.experts.mix import Mix
from sigmix.serve.fair_queue import QueueFull
from sigmix.serve.scheduler import Batcher, Closing, Failed, Finished, Job, Limits, SharedEngine, Started, Token

pytestmark = pytest.mark.usefixtures("cache")


class Box:
    """Collects a job's events."""

    def __init__(self) -> None:
        self.events: queue.Queue = queue.Queue()
        self.all: list = []

    def __call__(self, event) -> None:
        self.events.put(event)

    def wait(self, answers: int = 1, timeout: float = 120) -> list:
        ended = 0
        while ended < answers:
            event = self.events.get(timeout=timeout)
            self.all.append(event)
            if isinstance(event, Failed):
                break
            ended += isinstance(event, Finished)
        return self.all

    def text(self, index: int = 0) -> str:
        return "".join(e.piece for e in self.all if isinstance(e, (Token, Finished)) and e.index == index)

    def ids(self, index: int = 0) -> list[int]:
        return [e.id for e in self.all if isinstance(e, Token) and e.index == index]


def choose_math(jobs):
    return [Decision(Mix.one("math"), "math", "a test says so") for _ in jobs]


@pytest.fixture
def shared():
    return SharedEngine(build_tiny(), build_tokenizer(), bank())


@pytest.fixture
def alone():
    return Engine(build_tiny(), build_tokenizer(), bank())


@pytest.fixture
def started(shared):
    """A factory of running batchers, all closed at the end."""
    made = []

    def start(decide=choose_math, **limits) -> Batcher:
        made.append(Batcher(shared, decide, Limits(**limits)))
        made[-1].start()
        return made[-1]

    yield start
    for batcher in made:
        batcher.close(0)


def job(ids, mix="base", client="a", **more) -> tuple[Job, Box]:
    box = Box()
    return Job(client, ids, None if mix is None else Mix.parse(mix), box, **more), box


def random_ids(draw, length) -> list[int]:
    return [draw.randrange(4, 250) for _ in range(length)]


def endless(engine, mix) -> list[int]:
    """A prompt whose answer under a mix goes on for long."""
    draw = random.Random(1)
    while True:
        ids = random_ids(draw, 6)
        if len(engine.generate([ids], mix, max_new_tokens=2 * MERGE_AFTER)[0].ids) == 2 * MERGE_AFTER:
            return ids


def random_mix(draw) -> str:
    return "+".join(f"{name}:{draw.choice([-0.5, 0.3, 0.7, 1])}" for name in draw.sample(NAMES, draw.randrange(1, 4)))


def test_a_mix_is_merged_when_it_has_answered_alone_for_some_time(started, shared, alone):
    batcher = started()
    mix = Mix.parse("math:0.3+code:0.4")
    ids = endless(alone, mix.id)
    for known in (False, True):
        one, box = job(ids, mix.id, max_new_tokens=MERGE_AFTER - 10)
        batcher.submit(one)
        box.wait()
        assert box.ids() == alone.generate([ids], mix.id, max_new_tokens=MERGE_AFTER - 10)[0].ids
        assert batcher.call(lambda: shared.is_merged(mix)).result(20) == known


def test_mixes_that_share_steps_are_not_merged(started, shared, alone):
    batcher = started()
    boxes = []
    hold = threading.Event()
    batcher.call(lambda: hold.wait(20))
    for mix in ("math:0.3", "code:0.4"):
        one, box = job(endless(alone, mix), mix, max_new_tokens=2 * MERGE_AFTER)
        batcher.submit(one)
        boxes.append(box)
    hold.set()
    for box in boxes:
        assert len([e for e in box.wait() if isinstance(e, Token)]) == 2 * MERGE_AFTER
    assert not any(batcher.call(lambda: [shared.is_merged(Mix.parse(m)) for m in ("math:0.3", "code:0.4")]).result(20))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_short_answer_to_a_prompt_whose_beginning_is_known(started, alone, length):
    batcher = started()
    ids = random_ids(random.Random(3), 30)
    first, box = job(ids, "math", max_new_tokens=4)
    batcher.submit(first)
    box.wait()
    longer = ids + box.ids() + [5, 6, 7]
    second, box = job(longer, "math", max_new_tokens=length)
    assert batcher.call(lambda: batcher.engine.known_beginning(longer, second.mix, None) is not None).result(20)
    batcher.submit(second)
    box.wait(timeout=20)
    assert box.ids() == alone.generate([longer], "math", max_new_tokens=length)[0].ids
    assert not batcher.jobs


def test_two_hundred_at_once_under_fifty_mixtures(started, alone):
    draw = random.Random(0)
    mixes = [random_mix(draw) for _ in range(49)] + ["base"]
    batcher = started(rows=24, tokens=4096, reading=200, waiting=300, each=300)
    wanted, threads = [], []
    for number in range(200):
        more = {"temperature": 0.7, "top_p": 0.9, "seed": number} if number % 5 == 0 else {}
        one, box = job(
            random_ids(draw, draw.choice([3, 8, 20, 60])), mixes[number % 50], f"client-{number % 7}",
            max_new_tokens=draw.choice([1, 5, 12, 30]), **more,
        )  # fmt: skip
        wanted.append((one, box, draw.random() < 0.2))

    def send(part) -> None:
        for one, _, dropped in part:
            batcher.submit(one)
            time.sleep(random.random() / 200)
            if dropped:
                batcher.cancel(one)

    for start in range(8):
        threads.append(threading.Thread(target=send, args=(wanted[start::8],)))
        threads[-1].start()
    for thread in threads:
        thread.join(60)
    kept = [(one, box) for one, box, dropped in wanted if not dropped]
    for _, box in kept:
        box.wait()
    for one, box in kept:
        (whole,) = alone.generate(
            [one.ids], one.mix, max_new_tokens=one.max_new_tokens, do_sample=one.temperature > 0,
            temperature=one.temperature, top_p=one.top_p, seeds=[one.seed], form="factored",
        )  # fmt: skip
        assert isinstance(box.all[0], Started)
        assert box.ids() == whole.ids
        assert box.text() == whole.text
        assert box.all[-1].reason == whole.finish
    until = time.monotonic() + 10
    while (batcher.load() != (0, 0) or batcher.jobs) and time.monotonic() < until:
        time.sleep(0.01)
    assert batcher.load() == (0, 0)
    assert not batcher.jobs
    for _, box, dropped in wanted:
        if dropped:
            assert not any(isinstance(event, Failed) for event in list(box.events.queue))


def test_several_answers_and_a_stop_string(started, alone):
    batcher = started()
    one, box = job(random_ids(random.Random(3), 9), "math", n=3, temperature=1.0, seed=40, max_new_tokens=12)
    batcher.submit(one)
    box.wait(3)
    texts = []
    for index in range(3):
        (whole,) = alone.generate(
            [one.ids], "math", max_new_tokens=12, do_sample=True, seeds=[40 + index], form="factored"
        )
        assert box.ids(index) == whole.ids
        texts.append(whole.text)
    assert len(set(texts)) > 1
    mark = max(texts, key=len)[2:4]
    two, box = job(one.ids, "math", n=3, temperature=1.0, seed=40, max_new_tokens=12, stop=(mark,))
    batcher.submit(two)
    box.wait(3)
    for index, text in enumerate(texts):
        assert box.text(index) == text.split(mark)[0]


def test_pass_one_decides_and_may_fail(started, alone):
    calls = []

    def decide(jobs):
        calls.append(len(jobs))
        if any(one.text == "bad" for one in jobs):
            raise RuntimeError("a bug")
        return choose_math(jobs)

    batcher = started(decide)
    ids = random_ids(random.Random(4), 8)
    one, box = job(ids, None, text="good", max_new_tokens=5)
    batcher.submit(one)
    assert box.wait()[0].decision.label == "math"
    assert box.ids() == alone.generate([ids], "math", max_new_tokens=5)[0].ids
    two, box = job(ids, None, text="bad", max_new_tokens=5)
    batcher.submit(two)
    first = box.wait()[0]
    assert (first.decision.mix, first.decision.label) == (Mix.base(), OTHER)
    assert "failed" in first.decision.reason
    assert box.ids() == alone.generate([ids], "base", max_new_tokens=5)[0].ids


def test_an_expert_that_is_gone_fails_its_own_request_only(started, shared, alone):
    batcher = started()
    ids = random_ids(random.Random(5), 8)
    good, box = job(ids, "code", max_new_tokens=40)
    batcher.submit(good)
    lost, other = job(ids, "math", max_new_tokens=5)

    def forget():
        shared.bank = {name: expert for name, expert in shared.bank.items() if name != "math"}

    batcher.call(forget).result(10)
    batcher.submit(lost)
    (failed,) = other.wait()
    assert (failed.kind, "math" in failed.message) == ("mix", True)
    box.wait()
    assert box.ids() == alone.generate([ids], "code", max_new_tokens=40)[0].ids


def test_a_step_that_fails_gives_its_requests_up_and_goes_on(started, shared, monkeypatch):
    batcher = started()
    ids = random_ids(random.Random(6), 8)
    real = shared.model.forward
    broken = threading.Event()

    def forward(*args, **kwargs):
        if broken.is_set():
            broken.clear()
            raise RuntimeError("out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(shared.model, "forward", forward)
    broken.set()
    one, box = job(ids, "math", max_new_tokens=5)
    batcher.submit(one)
    assert box.wait()[-1].kind == "internal"
    two, box = job(ids, "math", max_new_tokens=5)
    batcher.submit(two)
    assert isinstance(box.wait()[-1], Finished)


def test_ends_of_the_queue_and_of_time(started):
    hold = threading.Event()
    batcher = started(rows=1, waiting=3, each=2)
    batcher.call(lambda: hold.wait(20))
    ids = random_ids(random.Random(7), 5)
    first, box = job(ids, "math", client="a", deadline=time.monotonic() - 1)
    batcher.submit(first)
    batcher.submit(job(ids, client="a")[0])
    with pytest.raises(QueueFull) as full:
        batcher.submit(job(ids, client="a")[0])
    assert full.value.own
    last, after = job(ids, client="b")
    batcher.submit(last)
    with pytest.raises(QueueFull):
        batcher.submit(job(ids, client="c")[0])
    hold.set()
    assert box.wait()[-1].kind == "time"
    assert isinstance(after.wait()[-1], Finished)


def test_closing_finishes_what_there_is(started):
    batcher = started(rows=2)
    boxes = []
    for number in range(6):
        one, box = job(random_ids(random.Random(number), 6), "math", max_new_tokens=10)
        batcher.submit(one)
        boxes.append(box)
    assert batcher.close(60)
    for box in boxes:
        assert isinstance(box.wait()[-1], Finished)
    with pytest.raises(Closing):
        batcher.submit(job([5, 6])[0])


def test_closing_gives_up_what_takes_too_long(started):
    hold = threading.Event()
    batcher = started(rows=1)
    batcher.call(lambda: hold.wait(1))
    one, box = job(random_ids(random.Random(1), 6), "math", max_new_tokens=200)
    two, waiting = job(random_ids(random.Random(2), 6), "math", max_new_tokens=200)
    batcher.submit(one)
    batcher.submit(two)
    assert not batcher.close(0)
    assert box.wait()[-1].kind == "closing"
    assert waiting.wait()[-1].kind == "closing"


def test_a_search_goes_on_between_the_steps(started, shared):
    from sigmix.adapt import FewShotSearch

    batcher = started()
    boxes = []
    for number in range(4):
        one, box = job(random_ids(random.Random(number), 6), "code", max_new_tokens=150)
        batcher.submit(one)
        boxes.append(box)
    search = FewShotSearch(
        shared, [("one two", "three"), ("four", "five")], lambda *_: 0.0, settings="light", iterations=2, batch_size=8
    )
    mix = search.fit()
    assert mix.id in search.known
    for box in boxes:
        assert isinstance(box.wait()[-1], Finished)
