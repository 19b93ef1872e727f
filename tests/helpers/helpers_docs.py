"""Reads a Markdown page as a user would: fenced blocks in order, in one folder, with one Python process for its Python.

What is different from typing: training and searches are made short by options put at the end of the command
(`SHORTER`), a server gets a free port and is stopped at the end of the page, ``make`` and ``pip`` lines are checked but
not run. A block below a line ``<!-- not run: WHY -->`` is left out; WHY must begin with one of `REASONS` (a test's path
means that this test runs it).
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path

import pytest

from sigmix.engine.cpu.native import has_int8

ROOT = Path(__file__).parents[2]
REASONS = (
    "needs a GPU", "needs the hub", "needs a download", "needs vLLM", "needs SGLang", "needs llama.cpp", "takes hours",
    "needs a domain of your own", "needs GPUs", "tests/",
)  # fmt: skip
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<why>[^\n]*?) -->\n+)?```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
SHELL = re.compile(r"[|<>&;$*]")
SHORTER = {
    "train": "--max-steps 1 --generation-batch-size 8 --max-eval-samples 4 --test-n 4",
    "eval": "--n 4",
    "search": "--population 2 --iterations 1 --settings light",
}


@dataclass
class Block:
    """A fenced block: its language, text, the line that it starts in, and why it is not run (None: it is)."""

    kind: str
    text: str
    line: int
    why: str | None


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [Block(m["kind"], m["text"], text[: m.start("text")].count("\n"), m["why"]) for m in FENCE.finditer(text)]


def commands(script: str) -> list[str]:
    """A bash block's commands: comments and blank lines dropped, continued lines and here-documents kept whole."""
    found: list[str] = []
    lines = iter(script.splitlines())
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        command = line
        while command.endswith("\\"):
            command += "\n" + next(lines)
        if here := re.search(r"<<'?(\w+)'?", command):
            for inner in lines:
                command += "\n" + inner
                if inner == here[1]:
                    break
        found.append(command)
    return found


def together(single: list[str]) -> list[str]:
    """Neighbouring commands of the shell made one script, so that they share variables."""
    joined: list[str] = []
    for command in single:
        ours = command.startswith(("sigmix ", "make ", "pip "))
        if joined and not ours and not joined[-1].startswith(("sigmix ", "make ", "pip ")):
            joined[-1] += "\n" + command
        else:
            joined.append(command)
    return joined


class Reader:
    """Runs a page's blocks in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.names = folder, {"__name__": "__main__"}
        self.port = _free_port()
        self.servers: list[subprocess.Popen] = []
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "SIGMIX_SERVE_STATE": str(folder / "state"),
        }

    def run(self, block: Block) -> None:
        """Run one block; raises with the command and its output where something fails."""
        text = block.text.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}").replace(
            "localhost:8000", f"127.0.0.1:{self.port}"
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            for name, value in self.environment.items():
                patch.setenv(name, value)
            if block.kind == "python":
                if named := re.match(r"# (\w+\.py)\n", text):  # shown as a file
                    (self.folder / named[1]).write_text(text, encoding="utf-8")
                exec(compile("\n" * block.line + text, "page", "exec"), self.names)
            elif block.kind in ("bash", "sh", "console"):
                for command in together(commands(text)):
                    self.command(command)

    def command(self, command: str) -> None:
        words = shlex.split(command, comments=True)
        if "--decode-weights" in words and not has_int8():
            return  # refused on this CPU, see tests/engine/cpu/test_native.py
        if words[0] == "make":
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        elif words[:2] == ["pip", "install"]:
            _check_extras(command)
        elif words[:2] == ["sigmix", "serve"]:
            self._serve(words[1:])
        elif words[0] == "sigmix" and not SHELL.search(command):
            self._inside(shlex.split(_shorter(command, words), comments=True))
        else:
            self._shell(_shorter(command, words))

    def _inside(self, words: list[str]) -> None:
        """A sigmix command in this process, which saves its imports."""
        from sigmix.cli import main

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words)
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
            code = None
            try:
                main()
            except SystemExit as left:
                code = left.code
        assert not code, f"{shlex.join(words)} ended with {code}"

    def _shell(self, command: str) -> None:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"

    def _serve(self, words: list[str]) -> None:
        log = (self.folder / "serve.log").open("w")
        command = [sys.executable, "-m", "sigmix", *words, "--port", str(self.port)]
        server = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        self.servers.append(server)
        until = time.monotonic() + 300
        while time.monotonic() < until:
            assert server.poll() is None, (self.folder / "serve.log").read_text()[-2000:]
            with contextlib.suppress(OSError):
                if urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).status == 200:
                    return
            time.sleep(0.2)
        raise AssertionError("the server did not start: " + (self.folder / "serve.log").read_text()[-2000:])

    def close(self) -> None:
        for server in self.servers:
            server.terminate()
            server.wait(timeout=120)


def _shorter(command: str, words: list[str]) -> str:
    kind = words[1] if words[0] == "sigmix" and len(words) > 1 else ""
    if kind == "adapt":
        kind = "search" if "--out" in words else ""
    if kind not in SHORTER:
        return command
    assert "\n" not in command.replace("\\\n", ""), command
    command = re.sub(r"\s#\s.*$", "", command)
    return f"{command} {SHORTER[kind]}"


def _check_extras(command: str) -> None:
    extras = metadata("sigmix").get_all("Provides-Extra") or []
    for extra in ",".join(re.findall(r"sigmix\[([\w,-]+)\]", command)).split(","):
        assert not extra or extra in extras, f"{command}: there is no extra {extra!r}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
