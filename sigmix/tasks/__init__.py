"""Tasks: samples with verifiers. See `base` for the contract and `registry` for finding and adding tasks.

Nothing here imports torch; reasoning-gym, math-verify and datasets are imported only when a task needs them.
"""

from __future__ import annotations

from sigmix.tasks.base import SPLITS, ProceduralTask, Sample, Score, Split, Task, ValidationReport, content_id
from sigmix.tasks.registry import get_task, register, task_names

__all__ = [
    "SPLITS",
    "ProceduralTask",
    "Sample",
    "Score",
    "Split",
    "Task",
    "ValidationReport",
    "content_id",
    "get_task",
    "register",
    "task_names",
]
