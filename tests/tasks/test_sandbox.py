"""The sandbox: verdicts, and what a program cannot do."""

import contextlib
import gc
import os
import sys
import time

import pytest

from sigmix.errors import ConfigError
from sigmix.tasks import sandbox
from sigmix.tasks.programs import score_program
from sigmix.tasks.sandbox import Guards, guards, require_permission, run_function, run_tests

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the sandbox needs Linux or macOS")
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


def kind(program, tests="pass", **options):
    return run_tests(program, tests, **options).kind


def test_verdicts():
    assert kind("def f(x):\n    return x + 1", "assert f(1) == 2") == "passed"
    assert kind("def f(x):\n    return x", "assert f(1) == 2") == "failed"
    assert "SyntaxError" in run_tests("def f(:", "pass").detail
    assert "ZeroDivisionError" in run_tests("1/0", "pass").detail


@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)", "import sys; sys.exit(0)", "raise SystemExit", "print('passed'); quit()",
        "import os\nfor i in range(3, 20):\n    try: os.write(i, b'passed\\n')\n    except OSError: pass\nos._exit(0)",
        "def f(): \n    import os; os._exit(0)", "print('passed ' + '0' * 32)",
        "import builtins; builtins.exec = print",
        "import atexit, os; atexit.register(os._exit, 0); raise ValueError", "import ctypes; ctypes.string_at(0)",
        "def f(): raise KeyboardInterrupt", "import os; os.closerange(0, 50)\ndef f(): return 1",
    ],
)  # fmt: skip
def test_success_cannot_be_faked(program):
    assert kind(program, "assert f() == 2") == "failed"


@pytest.mark.parametrize(
    "program", ["while True: pass", "import time; time.sleep(60)", "try:\n  while 1: pass\nfinally: pass"]
)
def test_endless_programs_end(program):
    assert kind(program, timeout=1) == "timeout"


@linux
def test_memory_is_limited():
    assert "MemoryError" in run_tests("x = bytearray(10**10)", "pass").detail
    assert kind("x = bytearray(10**7)") == "passed"


@linux
def test_fork_bomb_is_limited():
    program = "import os\nwhile True: os.fork()"
    if guards() == Guards("plain", False) and os.geteuid() == 0:
        pytest.skip("root without namespaces has no process limit")
    assert kind(program, timeout=1) in ("failed", "timeout")
    assert kind("x = 1") == "passed"


def alive(name: str) -> bool:
    """True if there is a process of this name."""
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{process}/comm") as file:
            if file.read().strip() == name:
                return True
    return False


@linux
def test_a_program_that_leaves_its_group_dies_too(tmp_path):
    if guards().level == "plain":
        pytest.skip("needs namespaces")
    name = f"sigmix{os.getpid()}"
    program = (
        f"import os, time, ctypes\nos.setsid()\nctypes.CDLL(None).prctl(15, b'{name[:15]}', 0, 0, 0)\ntime.sleep(60)"
    )
    assert kind(program, timeout=0.5) == "timeout"
    until = time.monotonic() + 30  # less than it sleeps; the kernel ends a namespace a moment after its first process
    while alive(name[:15]) and time.monotonic() < until:
        time.sleep(0.01)
    assert not alive(name[:15])


def test_network_is_refused():
    program = "import socket\nsocket.create_connection(('127.0.0.1', 9), 1)"
    detail = run_tests(program, "pass").detail
    assert "unreachable" in detail if guards().level != "plain" else "no network" in detail


@linux
def test_network_has_no_listener_even_at_home():
    if guards().level == "plain":
        pytest.skip("needs namespaces")
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert kind(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)") == "failed"


def test_environment_and_files(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    assert "EOFError" in run_tests("input()", "pass").detail
    assert kind("import os", "assert 'SECRET_TOKEN' not in os.environ and os.listdir('.') == []") == "passed"
    assert kind("open('a', 'w').write('x')", "assert open('a').read() == 'x'") == "passed"
    assert kind("open('a', 'w').write('x' * 10**8)") == "failed"
    assert kind("files = [open('f', 'w') for _ in range(100)]") == "failed"


@linux
def test_jail_hides_the_users_files(tmp_path):
    if guards().level != "jail":
        pytest.skip("needs mount namespaces")
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0o644)
    assert "FileNotFoundError" in run_tests(f"open({str(secret)!r})", "pass").detail
    assert kind("open('/usr/x', 'w')") == "failed"


@linux
def test_the_jail_takes_the_systems_python(monkeypatch):
    system = "/usr/bin/python3"  # its prefix is /usr, one of the folders that every jail has
    if guards().level != "jail" or not os.path.exists(system):
        pytest.skip("needs mount namespaces and a Python in /usr/bin")
    monkeypatch.setattr(sys, "executable", system)
    assert run_tests("import json, random", "pass") == sandbox.Outcome("passed", value=1.0)


def descriptors() -> set[tuple[str, str]]:
    """Open descriptors of this process, and what they refer to."""
    found = set()
    for end in os.listdir("/proc/self/fd") if sys.platform == "linux" else ():
        with contextlib.suppress(FileNotFoundError):  # of the listing itself
            found.add((end, os.readlink(f"/proc/self/fd/{end}")))
    return found


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    guards()
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    gc.collect()
    before = descriptors()
    for program in ("open('a', 'w').write('x')", "1/0", "import os; os._exit(3)"):
        run_tests(program, "pass")
    assert list(tmp_path.iterdir()) == []
    assert descriptors() <= before


def test_plain_level_blocks_python_sockets(monkeypatch):
    monkeypatch.setattr(sandbox, "guards", lambda: Guards("plain", False))
    outcome = run_tests("import socket\nsocket.socket()", "pass")
    assert outcome.kind == "failed"
    assert "no network" in outcome.detail
    assert kind("import socket, urllib.request") == "passed"
    assert kind("x = 1", "assert x") == "passed"
    assert kind("while True: pass", timeout=0.5) == "timeout"
    assert kind("import time; time.sleep(60)", timeout=0.5) == "timeout"


def test_a_broken_sandbox_is_not_the_programs_fault(monkeypatch):
    guards()
    monkeypatch.setattr(sandbox, "_LAUNCHER", sandbox._LAUNCHER.with_name("no_such_launcher.py"))
    assert kind("x = 1") == "sandbox"
    score = score_program("x = 1", "pass")
    assert score.value is None
    assert "sandbox" in score.explanation


def test_a_function_returns_numbers():
    program = "def f(x, y=2):\n    if x == 'raise': raise KeyError('no answer')\n    return x if y == 2 else x + y"
    calls = [[1], [0.25], [True], [1, 5], ["raise"], ["0.5"], [None], [], [[1]], [-0.0], [1e308]]
    outcomes = run_function(program, "f", calls)
    assert [outcome.value for outcome in outcomes[:4]] == [1, 0.25, 1, 6]
    assert [outcome.kind for outcome in outcomes] == ["passed"] * 4 + ["failed"] * 5 + ["passed"] * 2
    assert "no answer" in outcomes[4].detail
    assert "str" in outcomes[5].detail
    assert all(type(outcome.value) is float for outcome in outcomes if outcome.kind == "passed")
    assert run_function(program, "f", []) == []
    assert "g" in run_function(program, "g", [[1]])[0].detail
    values = [outcome.value for outcome in run_function("def f(x): return float(x)", "f", [["nan"], ["inf"]])]
    assert values[0] != values[0]
    assert values[1] == float("inf")


@pytest.mark.parametrize(
    "body",
    [
        "print(1.0); print('passed 1.0'); os._exit(0)", "sys.exit(0)", "sys.stdout.write('1.0'); quit(1)",
        "[os.write(i, b'passed ' + b'0' * 32 + b' 1.0\\n') for i in range(3, 30) if ok(i)]; os._exit(0)",
        "builtins.exec = builtins.float = builtins.type = lambda *x: 1.0; os.write = print; return 'x'",
        "return type('F', (float,), {'__repr__': lambda self: '1.0'})(0.5)", "return 10 ** 400",
        "return type('N', (), {'__float__': lambda self: 1.0})()", "os.kill(os.getpid(), 11)",
    ],
)  # fmt: skip
def test_a_number_cannot_be_faked(body):
    ok = "def ok(i):\n    try: os.fstat(i)\n    except OSError: return False\n    return True\n"
    program = f"import builtins, os, sys\n{ok}def f(x):\n    if x: return 0.5\n    {body}"
    first, second, third = run_function(program, "f", [[1], [0], [1]])
    assert (first.value, second.value, third.value) == (0.5, None, 0.5)
    assert second.kind == "failed"


@pytest.mark.parametrize("level", ["strongest", "plain"])
def test_calls_share_nothing_and_one_that_hangs_stops_no_other(level, monkeypatch):
    if level == "plain":
        monkeypatch.setattr(sandbox, "guards", lambda: Guards("plain", False))
    program = (
        "import os, time\nseen = []\ndef f(x):\n    if x == 'loop':\n        while True: pass\n"
        "    if x == 'sleep': time.sleep(60)\n    seen.append(x)\n    found = len(os.listdir('.'))\n"
        "    open('a', 'w').write('x')\n    return len(seen) + found"
    )
    outcomes = run_function(program, "f", [[1], ["loop"], [2], ["sleep"], [3]], timeout=1)
    assert [outcome.value for outcome in outcomes] == [1, None, 1, None, 1]
    assert [outcomes[1].kind, outcomes[3].kind] == ["timeout", "timeout"]


@linux
def test_calls_do_not_share_the_temporary_folder():
    if guards().level != "jail":
        pytest.skip("needs mount namespaces")
    program = "import os\ndef f():\n    n = len(os.listdir('/tmp'))\n    open('/tmp/x', 'w').close()\n    return n"
    assert [outcome.value for outcome in run_function(program, "f", [[], []])] == [0, 0]


def test_a_sandbox_that_breaks_leaves_calls_without_a_value(monkeypatch):
    guards()
    monkeypatch.setattr(sandbox, "_LAUNCHER", sandbox._LAUNCHER.with_name("no_such_launcher.py"))
    outcomes = run_function("def f(): return 1", "f", [[], []])
    assert [(outcome.kind, outcome.value) for outcome in outcomes] == [("sandbox", None)] * 2


def test_permission():
    with pytest.raises(ConfigError, match="--allow-code"):
        require_permission(False, "mbpp")
    require_permission(True, "mbpp")
