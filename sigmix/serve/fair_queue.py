"""Who is next: a queue in which no client waits because another one asks for more.

Each client has a counter of the tokens that it was served, as in the virtual token counter of Sheng et al. (Fairness in
Serving Large Language Models, OSDI 2024): the next request is the oldest of the client with the lowest counter, and a
client that was away comes back with the lowest counter of those who are there, so that being away saves up nothing.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

READ, WRITTEN = 1.0, 2.0
"""What a token of a prompt and one of an answer count: the paper's weights."""


class HasClient(Protocol):
    client: str


Job = TypeVar("Job", bound=HasClient)


class QueueFull(Exception):
    """No more may wait. ``own``: it is this client who has too many."""

    def __init__(self, own: bool) -> None:
        super().__init__("this client has too many requests waiting" if own else "too many requests are waiting")
        self.own = own


class FairQueue(Generic[Job]):
    """Jobs that wait.

    Args:
        limit: of all jobs. each: of one client's.
    """

    def __init__(self, limit: int, each: int) -> None:
        self.limit, self.each = limit, each
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self._served: dict[str, float] = {}
        self._running: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Job]:
        for jobs in list(self._waiting.values()):
            yield from list(jobs)

    def push(self, job: Job) -> None:
        """Add a job.

        Raises:
            QueueFull: too many wait.
        """
        if len(self._waiting.get(job.client, ())) >= self.each:
            raise QueueFull(own=True)
        if len(self) >= self.limit:
            raise QueueFull(own=False)
        if not self._present(job.client):
            others = [self._served.get(client, 0.0) for client in {*self._waiting, *self._running}]
            self._served[job.client] = max(self._served.get(job.client, 0.0), min(others, default=0.0))
        self._waiting.setdefault(job.client, deque()).append(job)

    def pop(self, fits: Callable[[Job], bool]) -> Job | None:
        """The next job, or None if there is none or the next one does not fit yet (no other overtakes it)."""
        if not self._waiting:
            return None
        client = min(self._waiting, key=lambda name: self._served.get(name, 0.0))
        job = self._waiting[client][0]
        if not fits(job):
            return None
        self._take(job)
        self._running[client] = self._running.get(client, 0) + 1
        return job

    def remove(self, job: Job) -> bool:
        """Take a job out that waits; False if it does not."""
        if job not in self._waiting.get(job.client, ()):
            return False
        self._take(job)
        return True

    def charge(self, client: str, read: int = 0, written: int = 0) -> None:
        """Count tokens of a client's prompts and answers."""
        self._served[client] = self._served.get(client, 0.0) + READ * read + WRITTEN * written

    def done(self, client: str) -> None:
        """A job that was popped has ended. When nobody is there any more the counters start anew."""
        self._running[client] -= 1
        if not self._running[client]:
            del self._running[client]
        if not self._running and not self._waiting:
            self._served.clear()

    def _take(self, job: Job) -> None:
        jobs = self._waiting[job.client]
        jobs.remove(job)
        if not jobs:
            del self._waiting[job.client]

    def _present(self, client: str) -> bool:
        return client in self._waiting or client in self._running
