"""Tasks: samples with graders. See `base` for the interface and `registry` for finding and adding tasks.

No module here imports torch; reasoning-gym, math-verify and datasets are imported only by the tasks that need them.
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
