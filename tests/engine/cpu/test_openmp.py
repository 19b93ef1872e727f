"""OpenMP thread pools: one for every Python thread that has computed, until it is released."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from sigmix.engine.cpu.openmp import release_thread_pool

TASKS = Path("/proc/self/task")


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_a_released_pool_ends_and_is_started_again():
    counts = []

    def count(expected=None):
        deadline = time.monotonic() + 10  # threads end a moment later
        while expected is not None and len(list(TASKS.iterdir())) != expected and time.monotonic() < deadline:
            time.sleep(0.01)
        counts.append(len(list(TASKS.iterdir())))

    def compute():
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
