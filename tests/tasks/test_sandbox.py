"""The sandbox: verdicts, and what a program cannot do."""

import os
import sys

import pytest

from sigmix.errors import ConfigError
from sigmix.tasks import sandbox
from sigmix.tasks.programs import require_permission, score_program
from sigmix.tasks.sandbox import Guards, guards, run_tests

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


@linux
def test_a_program_that_leaves_its_group_dies_too(tmp_path):
    if guards().level == "plain":
        pytest.skip("needs namespaces")
    name = f"sigmix{os.getpid()}"
    program = (
        f"import os, time, ctypes\nos.setsid()\nctypes.CDLL(None).prctl(15, b'{name[:15]}', 0, 0, 0)\ntime.sleep(60)"
    )
    assert kind(program, timeout=0.5) == "timeout"
    alive = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{process}/comm") as file:
                alive.append(file.read().strip())
        except OSError:
            continue
    assert name[:15] not in alive


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


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    guards()
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    ends = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    for program in ("open('a', 'w').write('x')", "1/0", "import os; os._exit(3)"):
        run_tests(program, "pass")
    assert list(tmp_path.iterdir()) == []
    assert ends == (len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0)


def test_plain_level_blocks_python_sockets():
    how = Guards("plain", False)
    outcome = sandbox._run("import socket\nsocket.socket()", "pass", 2.0, sandbox.MEMORY, how)
    assert outcome.kind == "failed"
    assert "no network" in outcome.detail
    assert sandbox._run("import socket, urllib.request", "pass", 2.0, sandbox.MEMORY, how).kind == "passed"
    assert sandbox._run("x = 1", "assert x", 2.0, sandbox.MEMORY, how).kind == "passed"


def test_a_broken_sandbox_is_not_the_programs_fault(monkeypatch):
    guards()
    monkeypatch.setattr(sandbox, "_LAUNCHER", sandbox._LAUNCHER.with_name("no_such_launcher.py"))
    assert kind("x = 1") == "sandbox"
    score = score_program("x = 1", "pass")
    assert score.value is None
    assert "sandbox" in score.explanation


def test_permission():
    with pytest.raises(ConfigError, match="--allow-code"):
        require_permission(False, "mbpp")
    require_permission(True, "mbpp")
