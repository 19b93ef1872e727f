"""Speed on a GPU: benchmarks with the device in every row. Without a GPU the rows stay "not run"; CPU results are in
``benchmarks/README.md``."""

from __future__ import annotations

import json
import subprocess
import sys

from reproduction.lab import Lab
from reproduction.report import NOT_RUN, Report, table

BENCHES = ("train-step", "mixed", "decompose")


class Speed:
    """Benches on a GPU."""

    name, title = "speed", "Speed on a GPU"
    needs: tuple[str, ...] = ()

    def run(self, lab: Lab) -> None:
        """Each bench in a process of its own, once."""
        import torch

        if not torch.cuda.is_available():
            lab.say("no GPU: the rows of speed stay as they are")
            return
        for bench in BENCHES:
            if lab.store.fact(f"bench-{bench}") is None:
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks", bench, "--json"],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    lab.say(f"bench {bench} failed: {done.stderr.strip()[-300:]}")
                    continue
                lab.store.write_fact(f"bench-{bench}", json.loads(done.stdout))

    def tables(self, report: Report) -> str:
        """Ratios with their range."""
        rows = []
        for bench in BENCHES:
            found = report.store.fact(f"bench-{bench}")
            if found is None:
                rows.append([bench, NOT_RUN, "", ""])
                continue
            for name, ratio in found["ratios"].items():
                rows.append([bench, json.dumps(found["device"]), name, json.dumps(ratio)])
        return table(["bench", "device", "ratio", "value"], rows)
