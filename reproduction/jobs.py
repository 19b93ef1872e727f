"""Stages of a reproduction in several processes at once, each with its share of the cores.

Shared adapters and banks are created under a lock; a stage starts after the stages that it needs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from sigmix.errors import SigmixError


def run_jobs(stages: Sequence[tuple[str, Sequence[str]]], command: Sequence[str], jobs: int) -> None:
    """Run stages, ``jobs`` at a time, each as a process of its own with its share of the cores.

    Args:
        stages: (name, names of the stages that it needs), in order; needs that are not among them are done.
        command: of one stage, without its name.

    Raises:
        SigmixError: stages that failed; the others were run, but for those that need these.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    left = {name: [need for need in needs if need in dict(stages)] for name, needs in stages}
    running: dict[Future[int], str] = {}
    done: set[str] = set()
    failed: list[str] = []

    def run(name: str) -> int:
        return subprocess.run([*command, name], env=env, check=False).returncode

    with ThreadPoolExecutor(jobs) as pool:
        while left or running:
            for name in [name for name, needs in left.items() if done.issuperset(needs)][: jobs - len(running)]:
                running[pool.submit(run, name)] = name
                del left[name]
            if not running:
                break  # the rest needs failed stages
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                if future.result() == 0:
                    done.add(name)
                else:
                    failed.append(name)
    if failed:
        rest = f"; not run, since they need these: {', '.join(left)}" if left else ""
        raise SigmixError(
            f"failed: {', '.join(failed)}{rest}", remedy="see their errors above; the same command resumes"
        )


def stage_command(flags: Sequence[str]) -> list[str]:
    """Return the command of one stage, without the stage's name."""
    return [sys.executable, "-m", "reproduction", *flags, "--no-tables", "--only"]
