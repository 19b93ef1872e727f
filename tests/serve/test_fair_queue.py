"""Fair request queue."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from sigmix.serve.fair_queue import FairQueue, QueueFullError


@dataclass(eq=False)
class Request:
    client: str
    size: int = 10


def fits(_: Request) -> bool:
    return True


def test_many_requests_of_one_client_do_not_delay_another():
    queue = FairQueue(100, 100)
    for _ in range(20):
        queue.push(Request("many"))
    served = []
    for step in range(12):
        if step == 4:
            queue.push(Request("few"))
            queue.push(Request("few"))
        request = queue.pop(fits)
        served.append(request.client)
        queue.charge(request.client, prompt_tokens=request.size)
    assert served[:4] == ["many"] * 4
    assert "few" in served[4:6]
    assert served.count("few") == 2


def test_idle_time_earns_no_credit():
    queue = FairQueue(100, 100)
    for client in ("a", "b"):
        queue.push(Request(client))
    for _ in range(2):
        queue.charge(queue.pop(fits).client, output_tokens=10)
    queue.finish("b")
    for _ in range(5):
        queue.push(Request("a"))
        queue.pop(fits)
        queue.charge("a", output_tokens=1000)
        queue.finish("a")
    for _ in range(3):
        queue.push(Request("a"))
        queue.push(Request("b"))
    order = []
    while (request := queue.pop(fits)) is not None:
        order.append(request.client)
        queue.charge(request.client, output_tokens=10)
    assert order[:4] in (["a", "b", "a", "b"], ["b", "a", "b", "a"])


def test_served_tokens_are_shared_evenly():
    draw, queue, served = random.Random(0), FairQueue(10_000, 10_000), {"small": 0, "large": 0}
    for client, size in (("small", 10), ("large", 100)):
        for _ in range(2000):
            queue.push(Request(client, size))
    for _ in range(1000):
        request = queue.pop(fits)
        output = draw.randrange(1, request.size)
        served[request.client] += request.size + 2 * output
        queue.charge(request.client, prompt_tokens=request.size, output_tokens=output)
    assert abs(served["small"] - served["large"]) < 400


def test_limits():
    queue = FairQueue(3, 2)
    first, second = Request("a"), Request("a")
    queue.push(first)
    queue.push(second)
    with pytest.raises(QueueFullError) as full:
        queue.push(Request("a"))
    assert full.value.per_client
    queue.push(Request("b"))
    with pytest.raises(QueueFullError) as full:
        queue.push(Request("c"))
    assert not full.value.per_client
    assert queue.remove(first)
    assert not queue.remove(first)
    assert len(queue) == 2
    assert second in list(queue)


def test_no_request_overtakes_one_that_does_not_fit():
    queue = FairQueue(10, 10)
    large, small = Request("a", 100), Request("b", 1)
    queue.push(large)
    queue.push(small)
    assert queue.pop(lambda request: request.size < 50) is None
    assert queue.pop(fits) is large
    assert queue.pop(fits) is small
