"""`sigmix eval`, `sigmix tasks` and what they stand on, `sigmix.evals.accuracy`."""

from __future__ import annotations

import json

import pytest

pytest_plugins = ["helpers_cli"]

TASK = "addition?digits=1"


@pytest.fixture
def measure(run, home):
    def call(*arguments):
        options = ("--base", home.base, "--bank", home.bank, "--max-new-tokens", 4)
        return run("eval", "--task", TASK, *arguments, *options)

    return call


def test_base_and_mixes_on_the_same_items(measure, tmp_path):
    out = tmp_path / "out"
    options = ("--expert", "arithmetic", "--mix", "arithmetic:.5+reading:.5", "--n", 12, "--out", out)
    figures = measure(*options, "--json").json
    base, expert, mix = figures["results"]
    assert [one["mix"] for one in figures["results"]] == ["base", "arithmetic", "arithmetic:0.5+reading:0.5"]
    assert base["paired"] is None
    assert expert["paired"]["n"] == mix["n"] == figures["n"] == 12
    for one in figures["results"]:
        low, high = one["interval"]
        assert low <= one["accuracy"] <= high
        assert one["unscorable"] == 0
        assert one["answer_entropy"] >= 0
        assert 0 <= one["no_answer"] <= one["n"] - one["accuracy"] * one["n"]
    assert 0 < figures["best_constant"]["accuracy"] < 1

    summary = json.loads((out / "summary.json").read_text())
    assert {"command", "seed", "n", "commit", "date", "machine"} <= set(summary)
    ids = []
    for one in summary["results"]:
        items = [json.loads(line) for line in (out / one["file"]).read_text().splitlines()]
        assert sum(item["score"] == 1.0 for item in items) / len(items) == one["accuracy"]
        ids.append([item["id"] for item in items])
    assert ids[0] == ids[1] == ids[2]


def test_the_table(measure):
    done = measure("--expert", "reading", "--n", 5)
    assert done.code == 0
    assert "McNemar p" in done.out
    assert "best constant answer" in done.out
    assert "…" not in done.out  # nothing is cut off
    assert not done.err


def test_equal_mixes_count_once_and_the_base_is_always_there(measure):
    figures = measure("--mix", "base", "--mix", "arithmetic:1", "--expert", "arithmetic", "--n", 3, "--json").json
    assert [one["mix"] for one in figures["results"]] == ["base", "arithmetic"]


def test_strategies_answer_within_max_new_tokens(measure, tmp_path):
    figures = measure("--strategy", "base", "--n", 3, "--out", tmp_path / "out", "--json").json
    assert figures["max_new_tokens"] == 4
    assert [one["strategy"] for one in figures["results"]] == ["base"]


def test_sampled_answers_follow_the_seed(measure, tmp_path):
    def replies(name, *more):
        measure("--n", 6, "--temperature", 2, "--out", tmp_path / name, *more)
        return [json.loads(line)["reply"] for line in (tmp_path / name / "0-base.jsonl").read_text().splitlines()]

    assert replies("a") == replies("b", "--batch", 4) != replies("c", "--seed", 1)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--task", "adition"], "nearest: addition"),
        (["--task", TASK, "--expert", "arithmetc"], "nearest: arithmetic"),
        (["--task", TASK, "--mix", "a:b"], "finite number"),
        (["--task", TASK, "--split", "tests"], "no split 'tests'"),
        (["--task", "addition?digit=2"], "no option 'digit'"),
        (["--task", "gsm8k", "--data-dir", "/no/such/folder"], "/no/such/folder"),
        (["--task", "no/such.py:task"], "no/such.py"),
        (["--task", TASK, "--strategy", "A", "--temperature", 1], "--temperature"),
        (["--task", TASK, "--strategy", "A", "--basis", "original"], "--basis"),
        (["--dispatch", "--max-new-tokens", 4], "--max-new-tokens"),
    ],
)
def test_bad_input(refused, home, arguments, expected):
    assert expected in refused("eval", *arguments, "--base", home.base, "--bank", home.bank)


def write_gsm8k(folder, bad=False):
    (folder / "gsm8k").mkdir()
    rows = [json.dumps({"question": f"What is {n}+{n}?", "answer": f"#### {2 * n}"}) for n in range(30)]
    (folder / "gsm8k" / "test.jsonl").write_text("\n".join(rows[:10]) + "\n")
    (folder / "gsm8k" / "train.jsonl").write_text("\n".join(rows[10:] + ['{"question": "?"}'] * bad) + "\n")


def test_a_bad_row_is_named_with_file_and_line(refused, home, tmp_path):
    write_gsm8k(tmp_path, bad=True)
    line = refused("eval", "--task", "gsm8k", "--data-dir", tmp_path, "--base", home.base)
    assert f"{tmp_path}/gsm8k/train.jsonl:21" in line


def test_an_item_that_does_not_fit_the_context(refused, home, tmp_path):
    write_gsm8k(tmp_path)
    assert "context of 256" in refused("eval", "--task", "gsm8k", "--data-dir", tmp_path, "--base", home.base)


def test_programs_need_permission_before_anything_runs(refused, home, tmp_path):
    (tmp_path / "mbpp").mkdir()
    rows = [
        {"task_id": n, "text": f"{n}?", "code": f"def f():\n    return {n}", "test_list": [f"assert f() == {n}"]}
        for n in (11, 12, 511, 512, 601, 602)
    ]
    (tmp_path / "mbpp" / "mbpp.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "--allow-code" in refused("eval", "--task", "mbpp", "--data-dir", tmp_path, "--base", home.base)


def test_out_is_checked_before_the_work(refused, home, tmp_path):
    at = ("--base", home.base, "--n", 3)
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused("eval", "--task", TASK, "--out", tmp_path / "file" / "out", *at)
    assert str(tmp_path / "file") in refused("eval", "--task", TASK, "--out", tmp_path / "file", *at)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "summary.json").write_text("{}")
    assert "summary.json" in refused("eval", "--task", TASK, "--out", tmp_path / "old", *at)


# ---------------------------------------------------------------------- tasks


def test_the_list_of_tasks(run):
    rows = run("tasks", "--json").json["tasks"]
    assert {"name", "domain", "description"} == set(rows[0])
    assert "addition" in [row["name"] for row in rows]
    assert "first-letter" in run("tasks").out


def test_one_task_with_samples_and_validation(run):
    figures = run("tasks", TASK, "--validate", "--json").json
    assert figures["name"] == TASK
    assert len(figures["samples"]) == 2
    assert figures["validation"]["ok"]
    assert "validation: passed" in run("tasks", TASK, "--validate").out
    assert "license" in run("tasks", TASK).out


def test_a_task_of_the_users_with_an_unsound_verifier(run, refused, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from sigmix.tasks import Sample, Score, ProceduralTask\n"
        "class Lax(ProceduralTask):\n"
        "    description = 'Everything is right.'\n"
        "    def stream(self, seed):\n"
        "        for n in range(10**6):\n"
        "            yield Sample.make(f'Say {n}.', str(n)), None\n"
        "    def score(self, sample, reply):\n"
        "        return Score.of(True, reply)\n"
    )
    line = refused("tasks", f"{file}:Lax", "--validate", silent=False)
    assert "wrong reply" in line
    assert "FAILED" in run("tasks", f"{file}:Lax", "--validate").out
    assert run("tasks", f"{file}:Lax").code == 0


def test_tasks_refuses(refused, tmp_path):
    assert "nearest: addition" in refused("tasks", "adition")
    assert "sigmix tasks" in refused("tasks", "--validate")
    assert str(tmp_path) in refused("tasks", "gsm8k", "--data-dir", tmp_path)
