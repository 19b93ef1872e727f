"""Where `peak_memory` measures one contestant of `train-step`: ``python -m benchmarks.train_child``."""

from __future__ import annotations

import json
import sys

from benchmarks.peak import high_water


def _main(given: str) -> None:
    from benchmarks.train_step import Setting, contestant

    asked = json.loads(given)
    setting = Setting(**asked["setting"])
    imported = high_water()
    one = contestant(setting, asked["name"])
    ready = high_water()
    one.step(0, setting.samples(0))
    print(json.dumps({"peak": high_water(), "ready": ready, "imported": imported}))


if __name__ == "__main__":
    _main(sys.argv[1])
