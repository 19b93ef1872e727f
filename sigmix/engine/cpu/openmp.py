"""OpenMP thread pools of several Python threads."""

from __future__ import annotations

import contextlib
import ctypes

SOFT = 1  # omp_pause_soft of OpenMP 5.0


def release_thread_pool() -> None:
    """End the OpenMP threads of the calling Python thread; its next parallel region starts new ones.

    libgomp keeps a pool of threads for every Python thread that has computed. While all pools together have more
    threads than there are cores, their threads sleep at each barrier instead of spinning, and a decoding step of a
    small model takes twice as long. So a thread that computes no more should release its pool.
    """
    with contextlib.suppress(OSError, AttributeError):  # torch without OpenMP, or with an older one
        ctypes.CDLL(None).omp_pause_resource_all(SOFT)
