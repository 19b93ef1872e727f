"""Peak memory of one contestant of `train-step`, measured in a process of its own.

The figure is VmHWM, the kernel's high-water mark of this very address space. ``ru_maxrss`` will not do on Linux: it
survives ``exec``, so a child begins with the size of the process that started it.
"""

from __future__ import annotations

import dataclasses
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from sigmix.errors import SigmixError


def peak_memory(setting: Any, name: str) -> dict[str, int]:
    """Bytes: ``peak`` of loading and one step, ``imported`` before anything was loaded, ``ready`` before the step."""
    given = json.dumps({"setting": dataclasses.asdict(setting), "name": name})
    command = [sys.executable, "-m", "benchmarks.train_child", given]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SigmixError(f"the memory of contestant {name!r} cannot be measured: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def high_water() -> int:
    """This process's largest resident size so far, in bytes."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    # not Linux: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
