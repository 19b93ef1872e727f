"""Peak memory of one contestant of `train-step`, measured in a process of its own: ``python -m benchmarks.peak``.

The figure is VmHWM, the high-water mark of the process's address space. On Linux ``ru_maxrss`` survives ``exec``, so a
child would start at the size of its parent.
"""

from __future__ import annotations

import dataclasses
import json
import re
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peers import in_child

if TYPE_CHECKING:
    from benchmarks.train_step import Setting


def peak_memory(setting: Setting, name: str) -> dict[str, int]:
    """Return bytes: ``imported`` after the imports, ``ready`` before the step, ``peak`` after one step."""
    given = {"setting": dataclasses.asdict(setting), "name": name}
    return in_child("benchmarks.peak", given, f"the memory of {name!r}")


def high_water() -> int:
    """Return this process's peak resident size, in bytes."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    # not Linux: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _child(options: str) -> None:
    from benchmarks.train_step import Setting, contestant

    given = json.loads(options)
    setting = Setting(**given["setting"])
    imported = high_water()
    one = contestant(setting, given["name"])
    ready = high_water()
    one.step(0, setting.samples(0))
    print(json.dumps({"peak": high_water(), "ready": ready, "imported": imported}))


if __name__ == "__main__":
    _child(sys.argv[1])
