"""Fine-tuning jobs in tests: training files, a server on a saved tiny base, and a process in place of training."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers_engine import expert
from helpers_serve import Caller, Live, make_service
from helpers_tiny import build_tiny, build_tokenizer

from sigmix.evals.report import MISTAKE_COLUMNS, MISTAKES
from sigmix.models.loading import load_base

CHECK = {
    "type": "string_check", "name": "same", "input": "{{sample.output_text}}", "reference": "{{item.answer}}",
    "operation": "eq",
}  # fmt: skip

TRAINER = """
import json, pathlib, shutil, signal, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
run, out, steps = pathlib.Path(options["--run"]), pathlib.Path(options["--out"]), 4
run.mkdir(parents=True, exist_ok=True)
(run / "config.json").write_text(json.dumps({"max_steps": steps, "generation_batch_size": 16}))
metrics = run / "metrics.jsonl"
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
print("started at", done, file=sys.stderr, flush=True)
with open(metrics, "a") as file:
    for step in range(done, steps):
        while not (pathlib.Path(options["--gate"]) / f"{step}").exists():
            time.sleep(0.01)
        entry = {"kind": "step", "step": step, "loss": 1.0, "reward": 0.5, "kl": 0, "entropy": 1, "learning_rate": 1,
                 "completion_tokens": 2.5}
        print(json.dumps(entry), file=file, flush=True)
if (pathlib.Path(options["--gate"]) / "fail").exists():
    print("sigmix: cannot write /x/best: the disk is full -> free some space", file=sys.stderr)
    sys.exit(2)
if not out.exists():
    shutil.copytree(options["--expert"], out)
mistakes = pathlib.Path(options["--gate"]) / "mistakes.csv"
if mistakes.exists():
    (run / "report").mkdir()
    shutil.copy(mistakes, run / "report")
figures = {"best": {"accuracy": 0.5, "step": 4}, "test": {"accuracy": 0.5, "n": 7}, "seconds": 1.0}
print(json.dumps({**figures, "report": {"verdict": "Do not use this expert: base is as good."}}))
"""


def rows(count: int = 60) -> bytes:
    """Conversations with two labels, as JSONL."""
    pairs = [(f"one {n}", ("two", "four")[n % 2]) for n in range(count)]
    lines = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
        for prompt, answer in pairs
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def questions(count: int = 60, field: str = "answer") -> bytes:
    """Rows that end with the user, with a field for graders."""
    lines = [
        {"messages": [{"role": "user", "content": f"one {n}"}], field: ("two", "four")[n % 2]} for n in range(count)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def form(content: bytes, name: str = "rows.jsonl") -> bytes:
    """Body of an upload with the boundary "b"."""
    start = "--b\r\ncontent-disposition: form-data; name="
    head = f'{start}"purpose"\r\n\r\nfine-tune\r\n{start}"file"; filename="{name}"\r\n\r\n'
    return head.encode() + content + b"\r\n--b--\r\n"


def upload(server: Caller, content: bytes | None = None, name: str = "rows.jsonl", **headers: str) -> str:
    """Upload a training file; return its id."""
    sent = form(rows() if content is None else content, name)
    status, file, _ = server.call("POST", "/v1/files", sent, content_type="multipart/form-data; boundary=b", **headers)
    assert status == 200, file
    return file["id"]


def save_base(folder: Path) -> Path:
    """Save the tiny Llama and its tokenizer."""
    build_tiny().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@contextmanager
def training(folder: Path, experts: Any = None, **settings: Any) -> Iterator[Live]:
    """Server on a socket, on the base in ``folder/tiny-llama``, which is saved there if it is missing."""
    base = folder / "tiny-llama"
    if not base.exists():
        save_base(base)
    model = load_base(base, "float32")[0]
    options = {"base": str(base), "strategy": "A", "training_threads": 1, **settings}
    server = Live(make_service(folder, {} if experts is None else experts, model, **options))
    try:
        yield server
    finally:
        server.stop()


class Gate:
    """Lets the steps of `TRAINER` pass."""

    def __init__(self, folder: Path, monkeypatch: Any) -> None:
        self.folder = folder / "gate"
        self.folder.mkdir()
        script = folder / "trainer.py"
        script.write_text(TRAINER)
        saved = folder / "saved"

        def command(place: Path, job: Any, resume: bool) -> list[str]:
            name = job.value["expert"]
            if not (saved / name).exists():
                expert(load_base(folder / "tiny-llama", "float32")[0], name, 1).save_pretrained(saved / name)
            return [
                sys.executable, str(script), "--run", str(place / "run"), "--out", str(place / name), "--gate",
                str(self.folder), "--expert", str(saved / name), "train", "x",
            ]  # fmt: skip

        monkeypatch.setattr("sigmix.serve.fine_tuning.manager.train_command", command)

    def open(self, *steps: int | str) -> None:
        """Let steps pass."""
        for step in steps:
            (self.folder / str(step)).touch()

    def write_mistakes(self, *rows: tuple[Any, ...]) -> None:
        """Write the table of mistakes of the jobs that follow."""
        with open(self.folder / MISTAKES, "w", newline="") as file:
            csv.writer(file).writerows([MISTAKE_COLUMNS, *rows])

    def close(self) -> None:
        """Hold all steps."""
        for path in self.folder.iterdir():
            path.unlink()


def wait_for(server: Caller, id: str, *statuses: str, timeout: float = 540.0, **headers: str) -> dict[str, Any]:
    """Poll a job until it has one of some statuses."""
    until = time.monotonic() + timeout
    while (job := server.call("GET", f"/v1/fine_tuning/jobs/{id}", **headers)[1])["status"] not in statuses:
        assert job["status"] not in ("failed", "succeeded", "cancelled"), job
        assert time.monotonic() < until, job
        time.sleep(0.05)
    return job
