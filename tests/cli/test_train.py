"""`sigmix train` from the command line to the files, on a tiny base folder."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image

from sigmix.cli import main
from sigmix.experts.expert import Expert
from sigmix.models.loading import load_base
from sigmix.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("cache")
QUICK = ["--max-steps", "2", "--generation-batch-size", "8", "--num-generations", "4", "--eval-steps", "1",
         "--max-eval-samples", "4", "--test-n", "5", "--max-new-tokens", "3"]  # fmt: skip


@pytest.fixture
def sigmix(monkeypatch, capsys, model_folder, tmp_path):
    """sigmix("--out", …) -> (exit code, stdout, stderr) of `sigmix train` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*args, task="addition?digits=1"):
        command = ["sigmix", "train", "--task", task, "--base", str(model_folder), *QUICK, *map(str, args)]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()  # what making the base printed
        code = 0
        try:
            main()
        except SystemExit as done:
            code = done.code or 0
        return code, *capsys.readouterr()

    return run


def test_train_end_to_end(sigmix, tmp_path, model_folder):
    code, out, err = sigmix("--out", "bank/sums", "--json", "--seed", 3)
    assert code == 0, err
    figures = json.loads(out)
    assert (figures["name"], figures["task"]) == ("sums", "addition?digits=1")
    assert figures["test"]["n"] == figures["base"]["n"] == figures["paired"]["n"] == 5
    assert 0 <= figures["paired"]["p"] <= 1
    assert figures["best_constant"]["reply"]
    assert "step 2" in err  # progress is on stderr

    expert = Expert.from_pretrained(tmp_path / "bank/sums", base=load_base(model_folder)[0])
    assert expert.verified
    assert expert.meta["seed"] == 3
    assert [metric["name"] for metric in expert.meta["metrics"]] == ["test accuracy", "validation accuracy"]
    test = expert.meta["metrics"][0]
    assert (test["value"], test["n"]) == (figures["test"]["accuracy"], 5)
    assert "mean_score" not in test  # a reply is right or wrong here
    assert "test accuracy" in (tmp_path / "bank/sums/README.md").read_text()

    lines = (tmp_path / "runs/sums/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["validation", "step", "validation", "step", "validation"]
    with Image.open(tmp_path / "bank/sums/curve.png") as picture:
        picture.verify()
        assert picture.format == "PNG"
    base, items = (
        [json.loads(line) for line in (tmp_path / f"runs/sums/test-{who}.jsonl").read_text().strip().split("\n")]
        for who in ("base", "expert")
    )
    assert sum(item["score"] == 1.0 for item in items) / 5 == figures["test"]["accuracy"]
    assert [item["id"] for item in base] == [item["id"] for item in items]


def test_a_task_with_marks_in_between_shows_them(sigmix, tmp_path):
    (tmp_path / "marks.py").write_text(
        "from sigmix.tasks.base import Sample, Score, Task\n"
        "class Half(Task):\n"
        "    name, domain, description, max_new_tokens = 'half', 'test', 'Half marks for all.', 2\n"
        "    def samples(self, split, n=None, seed=0):\n"
        "        return [Sample.make(f'{split} {i}?', 'a') for i in range(n or 8)]\n"
        "    def score(self, sample, reply):\n"
        "        return Score(0.5, reply)\n"
    )
    code, out, err = sigmix("--out", "bank/half", task="marks.py:Half")
    assert code == 0, err
    assert "validation 0.000 (mean score 0.500) at step 0" in out
    assert ", mean score 0.500, base 0.500, p = " in out
    test, validation = Expert.from_pretrained(tmp_path / "bank/half").meta["metrics"]
    assert (test["mean_score"], test["base_mean_score"], validation["mean_score"]) == (0.5, 0.5, 0.5)
    assert "base_mean_score" in (tmp_path / "bank/half/README.md").read_text()


def test_the_same_command_gives_the_same_expert(sigmix, tmp_path):
    for folder in ("one", "two"):
        assert sigmix("--out", f"{folder}/sums", "--run", f"{folder}/run", "--test-n", 0)[0] == 0
    one, two = (Expert.from_pretrained(tmp_path / folder / "sums").z for folder in ("one", "two"))
    assert all(torch.equal(one[path], two[path]) for path in one)


def test_lora_prints_figures_and_writes_no_expert(sigmix, tmp_path):
    code, out, err = sigmix("--out", "lora", "--policy", "lora", "--json")
    assert code == 0, err
    assert json.loads(out)["best"]["step"] in (0, 1, 2)
    assert not (tmp_path / "lora").exists()


def refused(result, *words):
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("sigmix: ")
    assert len(err.splitlines()) == 1
    for word in words:
        assert word in err
    return True


def test_an_existing_expert_is_refused(sigmix, tmp_path):
    (tmp_path / "sums").mkdir()
    (tmp_path / "sums/adapter_config.json").write_text("{}")
    assert refused(sigmix("--out", "sums"), "sums")
    assert not (tmp_path / "runs").exists()


HOLD = """
import sys
from sigmix.utils.cache import claimed
with claimed(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_runs_cannot_have_one_out(sigmix, tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, "bank/sums"], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        assert other.stdout.readline() == "held\n"
        place = tmp_path / "bank" / ".." / "bank" / "sums"  # the same folder under another name
        assert refused(sigmix("--out", place, "--run", "another"), "sums")
        assert not (tmp_path / "another").exists()
    finally:
        other.communicate()
    assert sigmix("--out", "bank/sums", "--run", "another", "--test-n", 0)[0] == 0


def test_a_terminated_run_keeps_its_checkpoint(sigmix, tmp_path, monkeypatch):
    log = Trainer._log

    def terminate(self, entry):
        log(self, entry)
        if (entry["kind"], entry["step"]) == ("step", 0):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_log", terminate)
        assert sigmix("--out", "bank/sums")[0] == 130
    assert json.loads((tmp_path / "runs/sums/checkpoint/state.json").read_text())["step"] == 0
    assert not (tmp_path / "bank/sums").exists()
    code, _, err = sigmix("--out", "bank/sums", "--resume")
    assert code == 0, err


@pytest.mark.parametrize("number", ["ENOSPC", "EROFS"])
def test_a_disk_that_fills_up_while_training(sigmix, tmp_path, monkeypatch, number):
    whole = os.replace

    def full(source, target, **options):
        if "checkpoint" in str(target):
            raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))
        return whole(source, target, **options)

    monkeypatch.setattr(os, "replace", full)
    code, out, err = sigmix("--out", "bank/sums")
    assert (code, out) == (2, "")
    assert err.strip().splitlines()[-1].startswith("sigmix: cannot write")
    assert {"ENOSPC": "the disk is full", "EROFS": "read-only"}[number] in err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("bank/*"))  # nothing half-written
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.setattr(os, "replace", whole)
    assert sigmix("--out", "bank/sums", "--resume", "--test-n", 0)[0] == 0


def test_an_out_that_cannot_be_written_is_refused_before_training(sigmix, tmp_path):
    (tmp_path / "file").write_text("")
    assert refused(sigmix("--out", "file/sums"), "file")
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_that_cannot_be_written(sigmix, tmp_path):
    (tmp_path / "file").write_text("")
    assert refused(sigmix("--out", "sums", "--run", "file/run"), "file")


def test_bad_options_are_one_line(sigmix, tmp_path):
    assert refused(sigmix("--out", "sums", "--learning-rate", "-1"), "learning_rate")
    assert refused(sigmix("--out", "sums", "--preset", "papers"), "'papers'", "paper")
    assert refused(sigmix("--out", "Sums!"), "Sums!")
    assert refused(sigmix("--out", "sums", task="additoin"), "additoin", "addition")
    assert refused(sigmix("--out", "sums", "--speed", "3"), "--speed")
    assert not (tmp_path / "runs").exists()


def test_a_used_run_and_another_configuration(sigmix):
    assert sigmix("--out", "a/sums", "--run", "run", "--test-n", 0)[0] == 0
    assert refused(sigmix("--out", "b/sums", "--run", "run"), "--resume")
    assert refused(sigmix("--out", "b/sums", "--run", "run", "--resume", "--learning-rate", 0.1), "learning_rate")
    code, _, err = sigmix("--out", "b/sums", "--run", "run", "--resume", "--test-n", 0)
    assert code == 0, err


def test_the_dtype_is_chosen_recorded_and_kept(sigmix, tmp_path):
    code, _, err = sigmix("--out", "a/sums", "--run", "run", "--test-n", 0, "--dtype", "fp32")
    assert code == 0, err
    assert json.loads((tmp_path / "run/config.json").read_text())["dtype"] == "float32"
    assert "Base's dtype: float32" in (tmp_path / "a/sums/README.md").read_text()
    again = ("--out", "b/sums", "--run", "run", "--resume", "--test-n", 0)
    assert refused(sigmix(*again, "--dtype", "bfloat16"), "dtype")
    assert sigmix(*again, "--dtype", "float32")[0] == 0
    assert refused(sigmix("--out", "c/sums", "--dtype", "int8"), "int8", "bfloat16")


def test_tensorboard(sigmix, tmp_path):
    assert sigmix("--out", "sums", "--tensorboard", "events", "--test-n", 0)[0] == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [event.step for event in events.Scalars("validation/accuracy")] == [0, 1, 2]
    assert "step/reward" in events.Tags()["scalars"]


def test_a_finished_run_resumes_into_its_own_folder(sigmix, tmp_path):
    assert sigmix("--out", "bank/sums")[0] == 0
    before = Expert.from_pretrained(tmp_path / "bank/sums")
    code, _, err = sigmix("--out", "bank/sums", "--resume")
    assert code == 0, err
    assert Expert.from_pretrained(tmp_path / "bank/sums").digest == before.digest
    assert (tmp_path / "bank/sums/curve.png").exists()


def test_an_out_folder_with_other_files_is_refused_before_training(sigmix, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    code, _, err = sigmix("--out", "mine")
    assert code == 2
    assert "thesis.txt" in err
    assert "step" not in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--targets", "q_proj,v_porj"], ["v_porj", "v_proj"]), (["--targets", "v_porj"], ["v_porj", "v_proj"]),
        (["--targets", "atention"], ["atention", "attention"]), (["--targets", "mlp,q_proj"], ["mlp"]),
        (["--targets", "embed_tokens"], ["embed_tokens"]), (["--targets", ","], ["target_modules"]),
        (["--targets", ""], ["target_modules"]), (["--targets", "("], ["("]),
        (["--targets", "v_porj", "--policy", "lora"], ["v_porj", "v_proj"]), (["--layers", "99"], ["99", "[0, 1]"]),
        (["--layers", "0,99"], ["99"]), (["--layers", "-1"], ["-1"]), (["--layers", "haf"], ["haf", "half"]),
        (["--layers", "0-1"], ["0-1"]), (["--learning-rate", "inf"], ["learning_rate"]), (["--beta", "nan"], ["beta"]),
        (["--test-n", "-1"], ["--test-n"]), (["--max-new-tokens", "0"], ["max_new_tokens"]),
        (["--max-train-samples", "0"], ["max_train_samples"]), (["--tensorboard", "file"], ["file"]),
        (["--device-map", "none.json"], ["none.json"]),
    ],
)  # fmt: skip
def test_options_that_fit_nothing_are_named_before_training(sigmix, tmp_path, options, words):
    (tmp_path / "file").write_text("")
    refused(sigmix("--out", "sums", *options), *words)
    assert not (tmp_path / "sums").exists()


def test_blanks_between_names_of_modules(sigmix, tmp_path):
    assert sigmix("--out", "sums", "--targets", "q_proj, v_proj,", "--test-n", 0)[0] == 0
    config = json.loads((tmp_path / "sums" / "adapter_config.json").read_text())
    assert {path.split(".")[-1] for path in config["target_modules"]} == {"q_proj", "v_proj"}


def test_a_file_in_place_of_the_out_folder(sigmix, tmp_path):
    (tmp_path / "sums").write_text("mine")
    refused(sigmix("--out", "sums"), "sums")
    assert (tmp_path / "sums").read_text() == "mine"
    assert not (tmp_path / "runs").exists()


def test_layers_that_are_no_numbers_are_named(sigmix):
    code, _, err = sigmix("--out", "sums", "--layers", "first,last")
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert "first,last" in err
