"""Several processes of one run in a test: forked from a server that has imported torch once, joined over gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["sigmix.cli", "sigmix.train.trainer", "sigmix.models.loading"])
SECONDS = 300


def in_processes(count: int, work: Callable, *args: object, folder: Path) -> list[int]:
    """Run ``work(*args)`` in `count` processes, as a launcher would start them; exit codes by rank (-9: killed).

    What they print goes to ``folder/out-RANK`` and ``folder/err-RANK``. Processes that are still there after five
    minutes are killed, so a run that hangs fails.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
                   "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1",
                   **{name: os.environ[name] for name in ("SIGMIX_CACHE", "PLAN") if name in os.environ}}  # fmt: skip
    started = []
    for rank in range(count):
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(context.Process(target=_begin, args=(own, str(folder), rank, work, args)))
        started[-1].start()
    deadline = time.monotonic() + SECONDS
    for process in started:
        process.join(max(deadline - time.monotonic(), 0))
    hung = [process for process in started if process.is_alive()]
    for process in hung:
        process.kill()
        process.join()
    assert not hung, f"{len(hung)} of {count} processes hang"
    return [process.exitcode for process in started]


def _begin(environment: dict[str, str], folder: str, rank: int, work: Callable, args: tuple) -> None:
    import torch

    os.environ.update(environment)
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        file = os.open(f"{folder}/{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream.fileno())
    torch.set_num_threads(1)
    work(*args)


def command(*arguments: object) -> None:
    """The command line, as ``python -m sigmix``."""
    from sigmix.cli import main

    sys.argv = ["sigmix", *map(str, arguments)]
    main()
