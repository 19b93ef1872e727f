"""Fair request queue (virtual token counter per client).

Sheng et al., Fairness in Serving Large Language Models, OSDI 2024: each client has a counter of served tokens; the next
request is the oldest one of the client with the lowest counter. A client that returns after being idle starts at the
lowest counter of the active clients, so idle time earns no credit.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sigmix.serve.scheduler import GenerationRequest

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
"""Cost of a prompt token and of a generated token (section 3 of the paper)."""


class QueueFullError(Exception):
    """Queue limit reached.

    Attributes:
        per_client: whether it is the limit per client.
    """

    def __init__(self, per_client: bool) -> None:
        super().__init__("too many queued requests of this client" if per_client else "too many queued requests")
        self.per_client = per_client


class FairQueue:
    """Queue of requests; not thread-safe.

    Args:
        max_size: limit of all requests.
        max_size_per_client: limit of one client's requests.
    """

    def __init__(self, max_size: int, max_size_per_client: int) -> None:
        self.max_size, self.max_size_per_client = max_size, max_size_per_client
        self._queued: dict[str, deque[GenerationRequest]] = {}
        self._size = 0
        self._running: Counter[str] = Counter()
        self._counters: defaultdict[str, float] = defaultdict(float)

    def __len__(self) -> int:
        return self._size  # a counter: other threads read the length

    def __iter__(self) -> Iterator[GenerationRequest]:
        for requests in list(self._queued.values()):
            yield from list(requests)

    def push(self, request: GenerationRequest) -> None:
        """Append a request. Raises QueueFullError: one of the limits is reached."""
        client, active = request.client, {*self._queued, *self._running}
        if len(self._queued.get(client, ())) >= self.max_size_per_client:
            raise QueueFullError(per_client=True)
        if len(self) >= self.max_size:
            raise QueueFullError(per_client=False)
        if client not in active:
            lowest = min((self._counters[other] for other in active), default=0.0)
            self._counters[client] = max(self._counters[client], lowest)
        self._queued.setdefault(client, deque()).append(request)
        self._size += 1

    def pop(self, fits: Callable[[GenerationRequest], bool]) -> GenerationRequest | None:
        """Remove and return the next request; None if the queue is empty or that request does not fit.

        No other request overtakes one that does not fit.
        """
        if not self._queued:
            return None
        client = min(self._queued, key=self._counters.__getitem__)
        request = self._queued[client][0]
        if not fits(request):
            return None
        self.remove(request)
        self._running[client] += 1
        return request

    def remove(self, request: GenerationRequest) -> bool:
        """Remove a queued request; return False if it is not queued."""
        requests = self._queued.get(request.client, deque())
        if request not in requests:
            return False
        requests.remove(request)
        self._size -= 1
        if not requests:
            del self._queued[request.client]
        return True

    def charge(self, client: str, prompt_tokens: int = 0, output_tokens: int = 0) -> None:
        """Add served tokens to a client's counter."""
        self._counters[client] += PROMPT_WEIGHT * prompt_tokens + OUTPUT_WEIGHT * output_tokens

    def finish(self, client: str) -> None:
        """Mark one popped request of a client as finished. Counters are reset once no client is active."""
        self._running -= Counter([client])  # drops a client without requests
        if not self._running and not self._queued:
            self._counters.clear()
