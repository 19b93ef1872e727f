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
from typing import TYPE_CHECKING

from sigmix.errors import SigmixError

if TYPE_CHECKING:
    from sigmix.bench.train_step import Setting


def peak_memory(setting: Setting, name: str) -> dict[str, int]:
    """Bytes: ``peak`` of loading and one step, ``imported`` before anything was loaded, ``ready`` before the step."""
    given = json.dumps({"setting": dataclasses.asdict(setting), "name": name})
    command = [sys.executable, "-m", "sigmix.bench.peak", given]
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


def _main(given: str) -> None:
    from sigmix.bench.train_step import Setting, contestant

    asked = json.loads(given)
    setting = Setting(**asked["setting"])
    imported = high_water()
    one = contestant(setting, asked["name"])
    ready = high_water()
    one.step(0, setting.samples(0))
    print(json.dumps({"peak": high_water(), "ready": ready, "imported": imported}))


if __name__ == "__main__":
    _main(sys.argv[1])
