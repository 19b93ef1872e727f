"""A file of examples on the command line: shown, trained on, evaluated, answered."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time

import pytest
from helpers_disk import small_disk

pytest_plugins = ["helpers_cli"]

TINY = ["--generation-batch-size", 4, "--eval-steps", 1, "--max-eval-samples", 4, "--test-n", 5]


@pytest.fixture
def tickets(tmp_path):
    """A CSV file of 60 requests with three labels, one of them twice and one with two answers."""
    path = tmp_path / "tickets.csv"
    values = [(f"request {number} for {'abc'[number % 3]}", ["refund", "delivery", "other"][number % 3])
              for number in range(60)]  # fmt: skip
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "category"), *values, values[0], (values[1][0], "other")])
    return path


def test_data_are_shown_before_training(run, home, tickets):
    done = run("data", tickets, "--base", home.base, "--json")
    assert done.code == 0, done.err
    figures = done.json
    assert (figures["rows"], figures["prompts"], figures["repeats"], figures["conflicts"]) == (62, 60, 1, 1)
    assert set(figures["labels"]) == {"refund", "delivery", "other"}
    assert figures["grader"] == "label"
    assert figures["answer_tokens"] > 1
    assert figures["over_context"] == 0
    assert ["repeat" in text for text in figures["problems"]] == [True, False]
    text = run("data", tickets).out
    for part in ("'text'", "'category'", "refund 33%", "tickets.csv:3", "repeat"):
        assert part in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "absent"), [(False, ("torch", "transformers", "numpy")), (True, ("transformers.modeling_utils", "peft"))]
)
def test_data_are_shown_without_importing_models(home, tickets, base, absent):
    code = (
        "import json, sys; from sigmix.cli import main\n"
        "try: main()\n"
        "finally: print(json.dumps(list(sys.modules)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "data", tickets, *(["--base", home.base] if base else [])]
    environment = {**os.environ, "SIGMIX_CACHE": str(home.cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("tokens: longest answer" in done.stdout) == base
    modules = json.loads(done.stderr.splitlines()[-1])
    assert "sigmix.tasks.dataset" in modules
    assert not set(absent) & set(modules)


def test_data_become_an_expert_that_answers(run, home, tickets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "bank" / "tickets"
    done = run("train", "--data", tickets, "--out", out, "--base", home.base, "--max-steps", 2, *TINY, "--json")
    assert done.code == 0, done.err
    assert done.json["objectives"] == ["sft"]
    assert done.json["test"]["n"] == 5
    report = json.loads((tmp_path / "runs/tickets/report/report.json").read_text())
    assert report["verdict"] == done.json["report"]["verdict"]
    assert set(report["others"]) == {"base", "TF-IDF and logistic regression"}
    assert 0 <= report["calibration"]["error"] <= 1
    assert sum(map(sum, report["confusion"]["counts"])) == 5
    for name in ("report.md", "report.png", "mistakes.csv"):
        assert (tmp_path / "runs/tickets/report" / name).stat().st_size > 100
    record = json.loads((out / "sigmix.json").read_text())
    assert record["task"] == "data:tickets.csv"
    assert record["training"]["data"]["rows"] == 62
    assert record["objective"] == "sft"
    where = ("--base", home.base, "--bank", tmp_path / "bank")
    measured = run("eval", "--data", tickets, "--expert", "tickets", "--n", 5, *where, "--json")
    assert measured.json["results"][1]["accuracy"] == done.json["test"]["accuracy"]
    answered = run("generate", "--data", tickets, "--mix", "tickets", "--max-new-tokens", 2, *where, "--json")
    prompts = [answer["prompt"] for answer in answered.json["answers"]]
    assert prompts[:2] == ["request 0 for a", "request 1 for b"]  # in the order of the file
    assert len(prompts) == 62


def test_a_time_budget_gives_the_steps_and_holds_for_a_resumed_run(run, home, tickets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["train", "--data", tickets, "--out", tmp_path / "bank" / "x", "--base", home.base, "--minutes", 0.1,
               "--generation-batch-size", 4, "--max-eval-samples", 4, "--test-n", 0]  # fmt: skip
    assert run(*command).code == 0
    stored = json.loads((tmp_path / "runs/x/config.json").read_text())
    assert stored["max_steps"] > stored["eval_steps"] >= 1
    done = run(*command, "--resume", "--json")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "runs/x/config.json").read_text()) == stored


def test_one_objective_after_the_other(run, home, tickets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "bank" / "both"
    done = run("train", "--data", tickets, "--out", out, "--objective", "sft+reinforce", "--base", home.base,
               "--max-steps", 1, *TINY, "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["objectives"] == ["sft", "reinforce"]
    configs = [json.loads((tmp_path / "runs/both" / phase / "config.json").read_text()) for phase in
               ("sft", "reinforce")]  # fmt: skip
    assert [config["objective"] for config in configs] == ["sft", "reinforce"]
    assert configs[1]["init_from"].endswith("sft/best")


def test_lora_is_compared_in_the_same_loop(run, home, tickets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("train", "--data", tickets, "--out", tmp_path / "bank" / "x", "--base", home.base, "--max-steps", 2,
               "--compare", "lora", *TINY, "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["report"]["others"]["LoRA of rank 16"]["n"] == 5
    config = json.loads((tmp_path / "runs/x/lora/sft/config.json").read_text())
    assert (config["policy"], config["max_steps"], config["objective"]) == ("lora", 2, "sft")


@pytest.mark.slow
def test_a_disk_that_fills_while_training_keeps_the_checkpoint(home, tickets, tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        command = [
            *disk.inside, sys.executable, "-m", "sigmix", "train", "--data", tickets, "--base", home.base, "--out",
            disk.folder / "bank" / "x", "--run", disk.folder / "run", *TINY, "--max-steps", 60,
        ]  # fmt: skip
        state = disk.outside / "run" / "checkpoint" / "state.json"
        started = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
        while not state.exists():
            assert started.poll() is None
            time.sleep(0.01)
        filler = disk.fill()
        message = started.communicate(timeout=300)[1].strip().splitlines()[-1]
        assert started.returncode == 2, message
        for part in ("the disk is full", str(disk.folder / "run"), "--resume"):
            assert part in message
        assert json.loads(state.read_text())["step"] >= 0
        assert not list((disk.outside / "bank").glob("x"))
        assert not list(disk.outside.rglob("*.tmp"))
        filler.unlink()
        done = subprocess.run([*map(str, command), "--resume"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert (disk.outside / "bank" / "x" / "sigmix.json").exists()


def test_bad_data_leave_nothing_behind(refused, home, tickets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = ("--out", tmp_path / "bank" / "x", "--base", home.base)
    assert "'colour'" in refused("train", "--data", tickets, "--answer", "colour", *out)
    assert "--data" in refused("train", "--answer", "category", *out, "--task", "addition")
    assert "--task" in refused("train", *out)
    assert "--task" in refused("train", "--data", tickets, "--task", "addition", *out)
    assert "'nothing'" in refused("train", "--data", tickets, "--objective", "nothing", *out)
    assert "--minutes" in refused("train", "--data", tickets, "--minutes", 1, "--max-steps", 3, *out)
    assert "none.csv" in refused("train", "--data", "none.csv", *out)
    short = refused("train", "--data", tickets, "--max-new-tokens", 1, "--max-steps", 1, *out)
    assert "tickets.csv:" in short
    assert "--max-new-tokens" in short
    tickets.write_text("text,category\nhi,a\nho,b\n")
    assert "2 distinct prompts" in refused("train", "--data", tickets, *out)
    assert "--data" in refused("generate", "hi", "--data", tickets, "--base", home.base)
    assert not (tmp_path / "bank" / "x").exists()
    assert not (tmp_path / "runs").exists()
