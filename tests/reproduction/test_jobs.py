"""Stages in several processes: order, failures, and what they share is made once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
from helpers_reproduce import call, lab

from reproduction.jobs import run_jobs
from reproduction.store import Store
from sigmix.errors import SigmixError

STAGE = """
import os, sys, time
folder, name = sys.argv[1:]
with open(os.path.join(folder, "log"), "a") as log: log.write(f"+{name} {os.environ['OMP_NUM_THREADS']}\\n")
beside, until = {"one": "two", "two": "one"}.get(name, name), time.monotonic() + 120
while f"+{beside} " not in open(os.path.join(folder, "log")).read() and time.monotonic() < until: time.sleep(0.01)
with open(os.path.join(folder, "log"), "a") as log: log.write(f"-{name}\\n")
sys.exit(name == "bad")
"""


@pytest.fixture
def command(tmp_path):
    (tmp_path / "stage.py").write_text(STAGE)
    return [sys.executable, str(tmp_path / "stage.py"), str(tmp_path)]


def lines(tmp_path) -> list[str]:
    return (tmp_path / "log").read_text().split("\n")[:-1]


def test_stages_wait_for_what_they_need(tmp_path, command):
    run_jobs([("first", ()), ("one", ("first",)), ("two", ("first",)), ("three", ("first", "absent"))], command, 2)
    found = [line.split()[0] for line in lines(tmp_path)]
    assert found[:2] == ["+first", "-first"]
    assert found[2:4] == ["+one", "+two"] or found[2:4] == ["+two", "+one"]  # side by side
    assert set(found) == {f"{sign}{name}" for sign in "+-" for name in ("first", "one", "two", "three")}
    share = max(1, (os.cpu_count() or 1) // 2)
    assert {line.split()[1] for line in lines(tmp_path) if line[0] == "+"} == {str(share)}


def test_a_stage_that_fails_stops_only_what_needs_it(tmp_path, command):
    with pytest.raises(SigmixError, match="bad.*after"):
        run_jobs([("bad", ()), ("after", ("bad",)), ("other", ())], command, 2)
    assert {line.split()[0] for line in lines(tmp_path)} == {"+bad", "-bad", "+other", "-other"}


def test_what_another_process_is_making_is_waited_for(tmp_path):
    home, said = lab(tmp_path), []
    home.say = said.append
    path = home.work / "locks"
    hold = (
        "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
        "print('held', flush=True); sys.stdin.readline(); lock.release()"
    )
    path.mkdir(parents=True)
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(path / "it.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    entered = threading.Event()

    def enter() -> None:
        with home.held("it"):
            entered.set()

    thread = threading.Thread(target=enter)
    thread.start()
    until = time.monotonic() + 120
    while not said and time.monotonic() < until:
        time.sleep(0.01)
    assert said == ["waiting for it"]
    assert not entered.is_set()
    other.stdin.write("\n")
    other.stdin.close()
    thread.join(120)
    assert entered.is_set()
    other.wait(120)


@pytest.mark.slow
def test_stages_side_by_side_give_what_one_process_gives(tmp_path, cache, monkeypatch, capsys):
    stores = []
    for jobs in ("1", "2"):
        out = tmp_path / jobs
        words = ["--scale", "smoke", "--out", str(out), "--work", str(tmp_path / f"work{jobs}"), "--jobs", jobs]
        code, _, err = call(monkeypatch, capsys, *words, "--only", "transfer", "--only", "spectra")
        assert code == 0, err
        stores.append(Store(out / "smoke"))
        assert (out / "smoke.md").exists()
    one, two = ({path.relative_to(store.folder) for path in store.folder.rglob("*.*")} for store in stores)
    assert one == two
    for task in ("addition", "larger"):
        for who in stores[0].cells(task):
            replies = [[item.reply for item in store.cell(task, who).result.items] for store in stores]
            assert replies[0] == replies[1], (task, who)
