"""OpenMP thread pools: one for every Python thread that has computed, until it is released."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from sigmix.engine.cpu.openmp import release_thread_pool

TASKS = Path("/proc/self/task")
NAME = "test_openmp"


def name_of(task: Path) -> str:
    with contextlib.suppress(OSError):  # it has ended
        return (task / "comm").read_text().strip()
    return ""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_a_released_pool_ends_and_is_started_again():
    counts = []

    def named() -> int:
        return sum(name == NAME for name in map(name_of, TASKS.iterdir()))

    def count(expected=None):
        deadline = time.monotonic() + 120  # threads end a moment later
        while expected is not None and named() != expected and time.monotonic() < deadline:
            time.sleep(0.01)
        counts.append(named())

    def compute():
        (TASKS / str(threading.get_native_id()) / "comm").write_text(NAME)  # its pool's threads inherit it
        torch.set_num_threads(3)
        count()
        for _ in range(2):
            assert torch.ones(1 << 20).sum() == 1 << 20
            count()
            release_thread_pool()
            count(counts[0])

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    start, *rest = counts
    assert rest == [start + 2, start, start + 2, start]
