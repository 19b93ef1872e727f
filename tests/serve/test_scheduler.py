"""Scheduler under load: every request gets the output that it would get alone; none is lost or mixed up."""

from __future__ import annotations

import queue
import random
import threading
import time

import pytest
from helpers_serve import NAMES, TIMEOUT, bank, gate_steps, hold, wait_until
from helpers_tiny import build_tiny, build_tokenizer

from sigmix.adapt import OTHER, Decision, FewShotSearch, TwoPass
from sigmix.engine import Engine
from sigmix.engine.execution import BREAK_EVEN
from sigmix.engine.generation import SamplingParams, choice_seed
from sigmix.engine.structured_output import StructuredOutput
from sigmix.experts.mix import Mix
from sigmix.serve.fair_queue import QueueFullError
from sigmix.serve.scheduler import (
    ClosingError,
    Failed,
    FIFOLock,
    Finished,
    GenerationRequest,
    Scheduler,
    SharedEngine,
    Started,
    Token,
)
from sigmix.serve.settings import load_settings

pytestmark = pytest.mark.usefixtures("cache")


class Events:
    """Collects a request's events."""

    def __init__(self) -> None:
        self.queue: queue.Queue = queue.Queue()
        self.all: list = []

    def __call__(self, event) -> None:
        self.queue.put(event)

    def wait(self, choices: int = 1) -> list:
        finished = 0
        while finished < choices:
            event = self.queue.get(timeout=TIMEOUT)
            self.all.append(event)
            if isinstance(event, Failed):
                break
            finished += isinstance(event, Finished)
        return self.all

    def text(self, index: int = 0) -> str:
        return "".join(e.text for e in self.all if isinstance(e, (Token, Finished)) and e.index == index)

    def ids(self, index: int = 0) -> list[int]:
        return [e.id for e in self.all if isinstance(e, Token) and e.index == index]


class Math:
    """Strategy that chooses the expert math, or fails on the text "bad"."""

    name = "math"

    def decide(self, prompts):
        if "bad" in prompts:
            raise RuntimeError("bug")
        return [Decision(Mix.one("math"), "math", "test") for _ in prompts]


@pytest.fixture
def shared():
    return SharedEngine(build_tiny(), build_tokenizer(), bank())


@pytest.fixture
def alone():
    return Engine(build_tiny(), build_tokenizer(), bank())


@pytest.fixture
def start(shared):
    """Factory of running schedulers, closed at the end."""
    schedulers = []

    def make(**settings) -> Scheduler:
        scheduler = Scheduler(shared, {"math": TwoPass(shared, Math())}, load_settings(None, **settings))
        schedulers.append(scheduler)
        scheduler.start()
        return scheduler

    yield make
    for scheduler in schedulers:
        scheduler.close(0)


def request(ids, mix="base", client="a", **options) -> tuple[GenerationRequest, Events]:
    events = Events()
    parsed = None if mix is None else Mix.parse(mix)
    sampling = {name: options.pop(name) for name in list(options) if name in SamplingParams.__dataclass_fields__}
    params = SamplingParams(do_sample="temperature" in sampling, **sampling)
    return GenerationRequest(client, ids, parsed, events, strategy="math", params=params, **options), events


def random_ids(draw, length) -> list[int]:
    return [draw.randrange(4, 250) for _ in range(length)]


def endless(engine, mix) -> list[int]:
    """A prompt with a long answer under a mixture."""
    draw = random.Random(1)
    while True:
        ids = random_ids(draw, 6)
        if len(engine.generate([ids], mix, max_new_tokens=2 * BREAK_EVEN)[0].ids) == 2 * BREAK_EVEN:
            return ids


def random_mix(draw) -> str:
    return "+".join(f"{name}:{draw.choice([-0.5, 0.3, 0.7, 1])}" for name in draw.sample(NAMES, draw.randrange(1, 4)))


# --- Batching


def test_a_mixture_is_merged_after_some_steps_alone(start, shared, alone):
    scheduler = start()
    mix = Mix.parse("math:0.3+code:0.4")
    ids = endless(alone, mix.id)
    for merged in (False, True):
        one, events = request(ids, mix.id, max_new_tokens=BREAK_EVEN - 10)
        scheduler.submit(one)
        events.wait()
        assert events.ids() == alone.generate([ids], mix.id, max_new_tokens=BREAK_EVEN - 10)[0].ids
        assert scheduler.call(lambda: shared.execution.choose([mix]) == "merged").result(TIMEOUT) == merged


def test_mixtures_that_share_steps_are_not_merged(start, shared, alone):
    scheduler = start()
    received = []
    release = hold(scheduler)
    for mix in ("math:0.3", "code:0.4"):
        one, events = request(endless(alone, mix), mix, max_new_tokens=2 * BREAK_EVEN)
        scheduler.submit(one)
        received.append(events)
    release.set()
    for events in received:
        assert len([e for e in events.wait() if isinstance(e, Token)]) == 2 * BREAK_EVEN
    for mix in ("math:0.3", "code:0.4"):
        assert scheduler.call(lambda mix=mix: shared.execution.choose([Mix.parse(mix)])).result(TIMEOUT) == "factored"


@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_answer_after_a_cached_prefix(start, shared, alone, length):
    scheduler = start()
    ids = random_ids(random.Random(3), 30)
    first, events = request(ids, "math", max_new_tokens=4)
    scheduler.submit(first)
    events.wait()
    longer = ids + events.ids() + [5, 6, 7]
    second, events = request(longer, "math", max_new_tokens=length)
    assert scheduler.call(lambda: shared.cached_prefix(longer, second.mix) is not None).result(TIMEOUT)
    scheduler.submit(second)
    events.wait()
    assert events.ids() == alone.generate([longer], "math", max_new_tokens=length)[0].ids
    wait_until(lambda: not scheduler.running())


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_many_requests_under_many_mixtures(start, alone, count):
    draw = random.Random(0)
    mixes = [random_mix(draw) for _ in range(count // 4 - 1)] + ["base"]
    scheduler = start(max_batch_size=24, max_batch_tokens=4096, max_queue_size=300, max_queue_size_per_client=300)
    planned = []
    for number in range(count):
        options = {"temperature": 0.7, "top_p": 0.9, "seeds": [number]} if number % 5 == 0 else {}
        one, events = request(
            random_ids(draw, draw.choice([3, 8, 20, 60])), mixes[number % len(mixes)], f"client-{number % 7}",
            max_new_tokens=draw.choice([1, 5, 12, 30]), **options,
        )  # fmt: skip
        planned.append((one, events, draw.random() < 0.2))

    def send(part) -> None:
        for one, _, cancelled in part:
            scheduler.submit(one)
            time.sleep(random.random() / 200)
            if cancelled:
                scheduler.cancel(one)

    threads = [threading.Thread(target=send, args=(planned[place::8],)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    kept = [(one, events) for one, events, cancelled in planned if not cancelled]
    for one, events in kept:
        events.wait()
        (expected,) = alone.generate(
            [one.ids], one.mix, max_new_tokens=one.params.max_new_tokens, do_sample=one.params.do_sample,
            temperature=one.params.temperature, top_p=one.params.top_p, seeds=list(one.seeds), form="factored",
        )  # fmt: skip
        assert isinstance(events.all[0], Started)
        assert events.ids() == expected.ids
        assert events.text() == expected.text
        assert events.all[-1].reason == expected.finish
    wait_until(lambda: scheduler.load() == (0, 0) and not scheduler.running())
    for _, events, cancelled in planned:
        if cancelled:
            assert not any(isinstance(event, Failed) for event in list(events.queue.queue))


def test_several_choices_and_stop_strings(start, alone):
    scheduler = start()
    seeds = [choice_seed(40, index) for index in range(3)]
    options = {"seeds": seeds, "temperature": 1.0, "max_new_tokens": 12}
    one, events = request(random_ids(random.Random(3), 9), "math", **options)
    scheduler.submit(one)
    events.wait(3)
    texts = []
    for index in range(3):
        (expected,) = alone.generate(
            [one.ids], "math", max_new_tokens=12, do_sample=True, seeds=[seeds[index]], form="factored"
        )
        assert events.ids(index) == expected.ids
        texts.append(expected.text)
    assert len(set(texts)) > 1
    mark = max(texts, key=len)[2:4]
    two, events = request(one.ids, "math", stop_strings=(mark,), **options)
    scheduler.submit(two)
    events.wait(3)
    assert [events.text(index) for index in range(3)] == [text.split(mark)[0] for text in texts]


# --- Decisions


def test_strategy_decides_and_may_fail(start, alone):
    scheduler = start()
    ids = random_ids(random.Random(4), 8)
    one, events = request(ids, None, text="good", max_new_tokens=5)
    scheduler.submit(one)
    assert events.wait()[0].decision.label == "math"
    assert events.ids() == alone.generate([ids], "math", max_new_tokens=5)[0].ids
    two, events = request(ids, None, text="bad", max_new_tokens=5)
    scheduler.submit(two)
    decision = events.wait()[0].decision
    assert (decision.mix, decision.label) == (Mix.base(), OTHER)
    assert events.ids() == alone.generate([ids], "base", max_new_tokens=5)[0].ids


def test_an_unloaded_expert_fails_only_the_requests_that_name_it(start, shared, alone):
    scheduler = start()
    ids = random_ids(random.Random(5), 8)
    good, kept = request(ids, "code", max_new_tokens=40)
    scheduler.submit(good)

    def unload():
        shared.bank = {name: expert for name, expert in shared.bank.items() if name != "math"}

    scheduler.call(unload).result(TIMEOUT)
    lost, events = request(ids, "math", max_new_tokens=5)
    scheduler.submit(lost)
    (failed,) = events.wait()
    assert (failed.code, "math" in failed.message) == ("mix", True)
    automatic, events = request(ids, None, text="good", max_new_tokens=5)
    scheduler.submit(automatic)
    decision = events.wait()[0].decision
    assert (decision.mix, decision.label) == (Mix.base(), OTHER)
    assert "math" in decision.reason
    kept.wait()
    assert kept.ids() == alone.generate([ids], "code", max_new_tokens=40)[0].ids


# --- Failures, limits, shutdown


def test_a_failed_step_ends_only_its_requests(start, shared, monkeypatch):
    scheduler = start()
    ids = random_ids(random.Random(6), 8)
    forward = shared.model.forward
    broken = threading.Event()

    def failing(*args, **kwargs):
        if broken.is_set():
            broken.clear()
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(shared.model, "forward", failing)
    broken.set()
    one, events = request(ids, "math", max_new_tokens=5)
    scheduler.submit(one)
    assert events.wait()[-1].code == "internal"
    two, events = request(ids, "math", max_new_tokens=5)
    scheduler.submit(two)
    assert isinstance(events.wait()[-1], Finished)


class FaultyModel:
    """Replacement of a model's forward pass that raises for some inputs.

    Attributes:
        marker: token that no pass may read. failures: number of passes over several rows that raise. max_rows: largest
            batch.
    """

    def __init__(self, model) -> None:
        self.forward = model.forward
        self.marker, self.failures, self.max_rows = -1, 0, 10**6

    def __call__(self, *args, **kwargs):
        ids = kwargs["input_ids"]
        if self.failures and len(ids) > 1:
            self.failures -= 1
            raise RuntimeError("fault")
        if len(ids) > self.max_rows or bool((ids == self.marker).any()):
            raise RuntimeError("fault")
        return self.forward(*args, **kwargs)


@pytest.fixture
def faulty(shared, monkeypatch):
    model = FaultyModel(shared.model)
    monkeypatch.setattr(shared.model, "forward", model)
    return model


def answers(alone, one) -> list:
    """Completions that the choices of a request get alone."""
    return alone.generate(
        [one.ids] * len(one.seeds), one.mix, max_new_tokens=one.params.max_new_tokens, do_sample=one.params.do_sample,
        temperature=one.params.temperature, seeds=one.seeds, form="factored", batch_size=1,
    )  # fmt: skip


def unused_token(alone, planned) -> int:
    """Token of no prompt and no answer."""
    used = {token for one, _ in planned for answer in answers(alone, one) for token in [*one.ids, *answer.ids]}
    return max(set(range(4, 250)) - used)


def check_alone(alone, planned) -> None:
    """Check that requests got the answers that they get alone, without lost or repeated tokens."""
    for one, events in planned:
        events.wait(len(one.seeds))
        for index, expected in enumerate(answers(alone, one)):
            assert events.ids(index) == expected.ids
            assert events.text(index) == expected.text


def neighbours(scheduler, count=4, steps=5, max_new_tokens=60, **sampling):
    """Running requests with different mixtures, lengths and sampling that have already decoded some tokens."""
    draw, planned = random.Random(11), []
    for number in range(count):
        options = {"temperature": 0.8, "seeds": [number, number + 50]} if number % 2 else {}
        options |= {"max_new_tokens": max_new_tokens, **sampling}
        planned.append(request(random_ids(draw, 5 + 9 * number), random_mix(draw), **options))
        scheduler.submit(planned[-1][0])
    for _, events in planned:
        wait_until(lambda events=events: events.queue.qsize() >= steps)
    return planned


@pytest.mark.parametrize("length", [6, 700])  # read at once, and in chunks
def test_a_prompt_that_the_model_cannot_read_fails_alone(start, alone, faulty, length):
    scheduler = start(max_batch_tokens=10**6)
    planned = neighbours(scheduler)
    late = request([5, 6, 7], "code", max_new_tokens=9)
    faulty.marker = unused_token(alone, [*planned, late])
    release = hold(scheduler)
    bad, events = request([*random_ids(random.Random(1), length), faulty.marker, 7], "math", max_new_tokens=5)
    for one in (bad, late[0]):
        scheduler.submit(one)
    release.set()
    assert events.wait()[-1] == Failed("internal", "internal server error")
    check_alone(alone, [*planned, late])


def test_a_generated_token_that_the_model_cannot_read_fails_its_request_alone(start, alone, faulty):
    ids = endless(alone, "math")
    answer = alone.generate([ids], "math", max_new_tokens=12)[0].ids
    scheduler = start()
    release = hold(scheduler)
    draw = random.Random(12)
    options = {"max_new_tokens": 40}
    planned = [request([token % 240 + 4 for token in random_ids(draw, 6)], mix, **options) for mix in ("code", "base")]
    bad, events = request(ids, "math", max_new_tokens=30)
    others = [alone.generate([one.ids], one.mix, max_new_tokens=40)[0].ids + one.ids for one, _ in planned]
    faulty.marker = next(token for token in answer if token not in ids and not any(token in other for other in others))
    for one in (planned[0][0], bad, planned[1][0]):
        scheduler.submit(one)
    release.set()
    assert isinstance(events.wait()[-1], Failed)
    assert events.ids() == answer[: answer.index(faulty.marker) + 1]
    check_alone(alone, planned)


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_failed_steps_are_repeated(start, alone, faulty, failures):
    scheduler = start()
    planned = neighbours(scheduler)
    faulty.failures = failures
    check_alone(alone, planned)
    wait_until(lambda: scheduler.load() == (0, 0) and not scheduler.running())


def test_structured_outputs_survive_failed_steps(start, shared, alone, faulty):
    scheduler = start()
    output = StructuredOutput(regex="[a-z]{30}")
    ids = [5, 6, 7]
    one, events = request(ids, "math", max_new_tokens=80, matcher=shared.compile_grammar(output))
    scheduler.submit(one)
    wait_until(lambda: events.queue.qsize() >= 5)
    planned = neighbours(scheduler)
    faulty.failures = 2
    check_alone(alone, planned)
    events.wait()
    (expected,) = alone.generate([ids], "math", max_new_tokens=80, structured_output=output, form="factored")
    assert events.text() == expected.text
    assert len(expected.text) == 30


def test_a_batch_that_is_too_large_for_the_memory_gets_smaller(start, alone, faulty):
    scheduler = start()
    planned = neighbours(scheduler)  # six sequences
    faulty.max_rows = 2
    check_alone(alone, planned)


def test_a_cancelled_request_that_cannot_be_removed_leaves_the_others(start, alone, monkeypatch):
    scheduler = start()
    planned = neighbours(scheduler)
    cancelled, _ = planned.pop(1)

    def broken(*_):
        monkeypatch.undo()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(scheduler.batch.kv_cache, "remove", broken)
    scheduler.cancel(cancelled)
    check_alone(alone, planned)
    wait_until(lambda: scheduler.load() == (0, 0) and not scheduler.running())


def test_a_conversation_that_cannot_be_cached_is_answered(start, shared, alone, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(shared.prefix_cache, "put", broken)
    scheduler = start()
    planned = neighbours(scheduler)
    check_alone(alone, planned)


def test_a_model_that_always_fails_leaves_no_request(start, faulty, monkeypatch):
    scheduler = start()
    permits = gate_steps(monkeypatch)
    planned = neighbours(scheduler, steps=0, max_new_tokens=200, logit_bias={2: -100.0})
    permits.release(40)  # none ends before the fault
    wait_until(lambda: all(events.queue.qsize() >= 5 for _, events in planned))
    faulty.max_rows = 0
    permits.release(1000)
    for _, events in planned:
        assert events.wait(2)[-1].code == "internal"
    wait_until(lambda: scheduler.load() == (0, 0) and not scheduler.running())
    faulty.max_rows = 10
    one, events = request([5, 6, 7], "math", max_new_tokens=3)
    scheduler.submit(one)
    assert isinstance(events.wait()[-1], Finished)


@pytest.mark.parametrize("kind", [Started, Token, Finished])
def test_a_receiver_that_raises_ends_its_request_alone(start, alone, kind):
    scheduler = start()
    release = hold(scheduler)
    planned = [request(random_ids(random.Random(n), 6), "math", max_new_tokens=20) for n in range(3)]
    bad, failed = planned.pop(1)

    def receive(event) -> None:
        if isinstance(event, kind):
            raise RuntimeError("receiver")
        failed(event)

    bad.on_event = receive
    for one in (bad, *(one for one, _ in planned)):
        scheduler.submit(one)
    release.set()
    check_alone(alone, planned)
    assert failed.wait()[-1].code == "internal"
    wait_until(lambda: scheduler.load() == (0, 0) and not scheduler.running())


def test_a_token_that_cannot_be_decoded_fails_its_request_alone(start, shared, alone, monkeypatch):
    scheduler = start()
    ids = random_ids(random.Random(1), 6)
    (answer,) = alone.generate([ids], "math", max_new_tokens=20)
    planned = [request(random_ids(random.Random(n), 6), "code", max_new_tokens=20) for n in (7, 8)]
    others = {token for one, _ in planned for token in alone.generate([one.ids], one.mix, max_new_tokens=20)[0].ids}
    marker = next(token for token in answer.ids if token not in others)
    decode = shared.tokenizer.decode

    def failing(tokens, **options):
        if marker in tokens:
            raise ValueError("cannot decode")
        return decode(tokens, **options)

    monkeypatch.setattr(shared.tokenizer, "decode", failing)
    bad, events = request(ids, "math", max_new_tokens=20)
    release = hold(scheduler)
    for one in (planned[0][0], bad, planned[1][0]):
        scheduler.submit(one)
    release.set()
    assert events.wait()[-1].code == "internal"
    check_alone(alone, planned)


def test_a_strategy_that_fails_on_one_text_decides_on_the_others(start, alone):
    scheduler = start()
    release = hold(scheduler)
    planned = [request(random_ids(random.Random(n), 6), None, text=text, max_new_tokens=4)
               for n, text in enumerate(["good", "bad", "fine"])]  # fmt: skip
    for one, _ in planned:
        scheduler.submit(one)
    release.set()
    check_alone(alone, planned)
    assert [events.all[0].decision.label for _, events in planned] == ["math", OTHER, "math"]


def test_a_scheduler_that_dies_fails_all_requests(start, monkeypatch):
    scheduler = start(max_batch_size=1)
    release = hold(scheduler)
    running, queued = (request([5, 6, number], "math", max_new_tokens=200) for number in (7, 8))
    scheduler.submit(running[0])
    scheduler.submit(queued[0])

    def broken(*_):
        raise SystemError("bug")

    monkeypatch.setattr(scheduler.queue, "charge", broken)
    release.set()
    for _, events in (running, queued):
        assert events.wait()[-1].code == "internal"
    wait_until(lambda: not scheduler.alive)
    with pytest.raises(RuntimeError):
        scheduler.submit(request([5, 6])[0])


def test_limits_of_queue_and_time(start):
    scheduler = start(max_batch_size=1, max_queue_size=3, max_queue_size_per_client=2)
    release = hold(scheduler)
    ids = random_ids(random.Random(7), 5)
    late, events = request(ids, "math", client="a", deadline=time.monotonic() - 1)
    scheduler.submit(late)
    scheduler.submit(request(ids, client="a")[0])
    with pytest.raises(QueueFullError) as full:
        scheduler.submit(request(ids, client="a")[0])
    assert full.value.per_client
    last, after = request(ids, client="b")
    scheduler.submit(last)
    with pytest.raises(QueueFullError):
        scheduler.submit(request(ids, client="c")[0])
    release.set()
    assert events.wait()[-1].code == "timeout"
    assert isinstance(after.wait()[-1], Finished)


def test_users_can_be_counted_while_requests_come_and_go(start):
    scheduler = start()
    received = []
    for number in range(60):
        one, events = request(random_ids(random.Random(number), 4), "math", max_new_tokens=2)
        scheduler.submit(one)
        received.append(events)
        assert 0 <= scheduler.users("math") <= 60  # iterates in this thread
    for events in received:
        events.wait()
    wait_until(lambda: scheduler.users("math") == 0)


def test_closing_finishes_accepted_requests(start):
    scheduler = start(max_batch_size=2)
    received = []
    for number in range(6):
        one, events = request(random_ids(random.Random(number), 6), "math", max_new_tokens=10)
        scheduler.submit(one)
        received.append(events)
    assert scheduler.close(TIMEOUT)
    for events in received:
        assert isinstance(events.wait()[-1], Finished)
    with pytest.raises(ClosingError):
        scheduler.submit(request([5, 6])[0])


def test_closing_gives_up_after_the_timeout(start):
    scheduler = start(max_batch_size=1)
    release = hold(scheduler)
    one, running = request(random_ids(random.Random(1), 6), "math", max_new_tokens=200)
    two, queued = request(random_ids(random.Random(2), 6), "math", max_new_tokens=200)
    scheduler.submit(one)
    scheduler.submit(two)
    finished = []
    closing = threading.Thread(target=lambda: finished.append(scheduler.close(0)))
    closing.start()
    wait_until(lambda: scheduler._stopped)
    release.set()
    closing.join(TIMEOUT)
    assert finished == [False]
    assert running.wait()[-1].code == "closing"
    assert queued.wait()[-1].code == "closing"


def test_calls_at_shutdown_do_not_block(start):
    scheduler = start()
    release = hold(scheduler)
    pending = scheduler.call(lambda: 1)
    closing = threading.Thread(target=scheduler.close, args=(0,))
    closing.start()
    wait_until(lambda: scheduler._stopped)
    release.set()
    with pytest.raises(ClosingError):
        pending.result(TIMEOUT)
    with pytest.raises(ClosingError):
        scheduler.call(lambda: 1)
    closing.join(TIMEOUT)


# --- Sharing the engine


def test_a_search_runs_between_the_steps(start, shared):
    scheduler = start()
    received = []
    for number in range(4):
        one, events = request(random_ids(random.Random(number), 6), "code", max_new_tokens=150)
        scheduler.submit(one)
        received.append(events)
    examples = [("one two", "three"), ("four", "five")]
    search = FewShotSearch(shared, examples, lambda *_: 0.0, settings="light", iterations=2, batch_size=8)
    assert isinstance(search.fit(), Mix)
    for events in received:
        assert isinstance(events.wait()[-1], Finished)


def test_lock_is_granted_in_order_of_arrival():
    lock, order = FIFOLock(), []

    def enter(number: int) -> None:
        with lock:
            order.append(number)

    threads = []
    with lock:
        for number in range(8):
            threads.append(threading.Thread(target=enter, args=(number,)))
            threads[-1].start()
            wait_until(lambda: lock.waiting == number + 1)  # noqa: B023
    for thread in threads:
        thread.join(TIMEOUT)
    assert order == list(range(8))
    assert lock.waiting == 0
