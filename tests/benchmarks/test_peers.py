"""Peers: processes that work in their turns only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.peers import Peer, equal_start, in_child
from sigmix.errors import SigmixError

ECHO = """
import json, os, sys
print(json.dumps({"pid": os.getpid(), "setting": os.environ.get("PEER_SETTING")}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked.get("fail"):
        sys.exit("out of memory")
    print(json.dumps({"twice": 2 * asked["number"]}), flush=True)
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def state(pid: int) -> str:
    """Of a process as Linux shows it: S sleeping, T stopped, Z ended."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


def reached(pid: int, states: str) -> bool:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        try:
            if state(pid) in states:
                return True
        except OSError:
            return "gone" in states
        time.sleep(0.01)
    return False


@linux
def test_a_peer_answers_in_its_turns_and_is_stopped_between_them():
    with Peer([sys.executable, "-c", ECHO], {"PEER_SETTING": "7"}) as peer:
        assert peer.ready["setting"] == "7"
        for number in (1, 2):
            assert reached(peer.ready["pid"], "T")
            assert peer.ask(number=number) == {"twice": 2 * number}
    assert not Path(f"/proc/{peer.ready['pid']}").exists()


def test_a_peer_that_ends_or_prints_something_else_is_named_with_its_last_words():
    with Peer([sys.executable, "-c", ECHO]) as peer, pytest.raises(SigmixError, match="out of memory"):
        peer.ask(fail=True)
    with pytest.raises(SigmixError, match="no such model"):
        Peer([sys.executable, "-c", "import sys; sys.exit('no such model')"])
    with pytest.raises(SigmixError, match="loading"):
        Peer([sys.executable, "-c", "print('loading')"])


@linux
def test_a_stopped_peer_ends_with_a_benchmark_that_is_killed():
    program = f"""
import sys, time
from benchmarks.peers import Peer
peer = Peer([sys.executable, "-c", {ECHO!r}])
print(peer.ready["pid"], flush=True)
time.sleep(60)
"""
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}
    ) as bench:
        pid = int(bench.stdout.readline())
        assert reached(pid, "T")
        bench.send_signal(signal.SIGKILL)
    assert reached(pid, ("Z", "gone"))


def test_a_child_that_fails_is_named():
    with pytest.raises(SigmixError, match=r"the memory .*no_such_module"):
        in_child("benchmarks.no_such_module", {}, "the memory")


def test_equal_start():
    assert equal_start([1, 2, 3], [1, 2, 4]) == 2
    assert equal_start([1, 2], [1, 2, 4]) == 2
    assert equal_start([], [1]) == 0
