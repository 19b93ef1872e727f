"""The server's small parts, without a model: queue, text, turnstile."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field

import pytest
from helpers_tiny import build_tokenizer

from sigmix.engine.detokenizer import Pieces
from sigmix.serve.fair_queue import FairQueue, QueueFull
from sigmix.serve.scheduler import Turnstile

# ------------------------------------------------------------------ the queue


@dataclass(eq=False)
class Asks:
    client: str
    size: int = 10
    context: dict = field(default_factory=dict)


def anything(_) -> bool:
    return True


def test_a_client_with_many_requests_does_not_keep_another_waiting():
    queue = FairQueue(100, 100)
    for _ in range(20):
        queue.push(Asks("many"))
    served = []
    for step in range(12):
        if step == 4:
            queue.push(Asks("few"))
            queue.push(Asks("few"))
        job = queue.pop(anything)
        served.append(job.client)
        queue.charge(job.client, read=job.size)
    assert served[:4] == ["many"] * 4
    assert "few" in served[4:6]
    assert served.count("few") == 2


def test_being_away_saves_up_nothing():
    queue = FairQueue(100, 100)
    for client in ("a", "b"):
        queue.push(Asks(client))
    for _ in range(2):
        job = queue.pop(anything)
        queue.charge(job.client, written=10)
    queue.done("b")  # b goes away, a goes on and is served much
    for _ in range(5):
        queue.push(Asks("a"))
        job = queue.pop(anything)
        queue.charge("a", written=1000)
        queue.done("a")
    for _ in range(3):
        queue.push(Asks("a"))
        queue.push(Asks("b"))
    order = []
    while (job := queue.pop(anything)) is not None:
        order.append(job.client)
        queue.charge(job.client, written=10)
    assert order[:4] in (["a", "b", "a", "b"], ["b", "a", "b", "a"])


def test_shares_are_even_whatever_is_asked_for():
    draw, queue, served = random.Random(0), FairQueue(10_000, 10_000), {"small": 0, "large": 0}
    for client, size in (("small", 10), ("large", 100)):
        for _ in range(2000):
            queue.push(Asks(client, size))
    for _ in range(1000):
        job = queue.pop(anything)
        written = draw.randrange(1, job.size)
        served[job.client] += job.size + 2 * written
        queue.charge(job.client, read=job.size, written=written)
    assert abs(served["small"] - served["large"]) < 400


def test_the_queue_has_ends():
    queue = FairQueue(3, 2)
    first, second = Asks("a"), Asks("a")
    queue.push(first)
    queue.push(second)
    with pytest.raises(QueueFull) as full:
        queue.push(Asks("a"))
    assert full.value.own
    queue.push(Asks("b"))
    with pytest.raises(QueueFull) as full:
        queue.push(Asks("c"))
    assert not full.value.own
    assert queue.remove(first)
    assert not queue.remove(first)
    assert queue.pop(lambda job: job is not second) in queue or len(queue) >= 1


def test_no_job_overtakes_one_that_does_not_fit_yet():
    queue = FairQueue(10, 10)
    large, small = Asks("a", 100), Asks("b", 1)
    queue.push(large)
    queue.push(small)
    assert queue.pop(lambda job: job.size < 50) is None
    assert queue.pop(anything) is large
    assert queue.pop(anything) is small


# ------------------------------------------------------------------ text


@pytest.mark.parametrize("stop", [(), ("ab",), ("b c", "c"), ("never",)])
def test_pieces_are_the_text(stop):
    tokenizer, draw = build_tokenizer(), random.Random(1)
    for _ in range(40):
        ids = [draw.randrange(4, 250) for _ in range(60)]
        pieces, shown = Pieces(tokenizer, stop), ""
        for number, token in enumerate(ids, 1):
            shown += pieces.add(token)
            whole = tokenizer.decode(ids[:number], skip_special_tokens=True)
            cuts = [whole.find(mark) for mark in stop if mark in whole]
            if cuts:
                assert pieces.stopped in stop
                assert shown == whole[: min(cuts)]
                break
            assert whole.startswith(shown)
        else:
            shown += pieces.end()
            assert shown == tokenizer.decode(ids, skip_special_tokens=True)


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(ids).decode("utf-8", "replace")


def test_no_half_characters():
    text = "grün 🙂🙂 ende" * 5
    pieces = Pieces(Bytes())
    parts = [pieces.add(byte) for byte in text.encode()]
    assert "".join(parts) == text
    assert not any("�" in part for part in parts)
    broken = Pieces(Bytes())
    assert "".join(broken.add(byte) for byte in "🙂".encode()[:3]) + broken.end() == "�"


# ------------------------------------------------------------------ the turnstile


def test_first_come_first_served():
    turnstile, order = Turnstile(), []

    def wait(number: int) -> None:
        with turnstile:
            order.append(number)

    threads = []
    with turnstile:
        for number in range(8):
            threads.append(threading.Thread(target=wait, args=(number,)))
            threads[-1].start()
            until = time.monotonic() + 5
            while turnstile.waiting != number + 1 and time.monotonic() < until:
                time.sleep(0.001)
    for thread in threads:
        thread.join(5)
    assert order == list(range(8))
    assert turnstile.waiting == 0
