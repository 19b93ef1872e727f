"""`--mix auto`, `sigmix adapt`, and `sigmix eval` with strategies and dispatch."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers_cli import add_expert, root

from sigmix.experts.bank import Bank

pytest_plugins = ["helpers_cli"]


@pytest.fixture
def bank(home, tmp_path):
    """A copy of the bank, to add statistics to."""
    return shutil.copytree(home.bank, tmp_path / "bank")


@pytest.fixture
def routed(run, home, bank):
    """The bank with request statistics."""
    done = run("experts", "statistics", "--base", home.base, "--bank", bank, "--json")
    assert done.code == 0, done.err
    assert [one["name"] for one in done.json["experts"]] == ["arithmetic", "reading"]
    assert all(one["train_n"] and one["validation_n"] for one in done.json["experts"])
    return bank


def test_auto_decides_for_every_prompt_with_a_reason(run, home, routed):
    done = run(
        "generate", "What is 1 + 2? Answer with the number only.", "hello", "x", "--mix", "auto", "--mix", "auto",
        "--mix", "reading", "--explain", "--max-new-tokens", 2, "--base", home.base, "--bank", routed, "--json",
    )  # fmt: skip
    first, second, third = done.json["answers"]
    for one in (first, second):
        decision = one["decision"]
        assert decision["mix"] == one["mix"]
        assert set(decision["evidence"]["probabilities"]) == {"arithmetic", "reading", "other"}
        assert decision["tokens"] > 0 < decision["seconds"]
        assert any(decision["reason"] in line for line in done.err)
    assert (third["mix"], third["decision"]) == ("reading", None)
    same = run(
        "generate",
        "hello",
        "--mix",
        second["mix"],
        "--base",
        home.base,
        "--bank",
        routed,
        "--max-new-tokens",
        2,
        "--json",
    )
    assert same.json["answers"][0]["ids"] == second["ids"]


def test_without_statistics_auto_uses_the_prompt(run, home, bank):
    done = run(
        "generate", "hello", "--mix", "auto", "--explain", "--base", home.base, "--bank", bank, "--max-new-tokens", 2
    )
    assert done.code == 0
    assert "the base calls it" in "".join(done.err)


def test_chat_chooses_for_every_turn(run, home, routed):
    done = run(
        "chat", "--mix", "auto", "--base", home.base, "--bank", routed, "--max-new-tokens", 2,
        stdin="hello\n/base\nhello\n/auto\nhello\n/quit\n",
    )  # fmt: skip
    assert done.out.count("(choosing for every turn, strategy D (router))") == 2
    assert done.out.count("similar to the requests of") == 2


def test_a_request_over_the_context_keeps_no_other_from_its_answer(run, home, routed):
    done = run(
        "generate", "hello", "x" * 300, "--mix", "auto", "--base", home.base, "--bank", routed, "--max-new-tokens", 2
    )
    assert done.code == 2
    assert len(done.err) == 1
    assert "prompt 1" in done.err[0]
    assert "> hello" in done.out


def test_a_classification_expert_is_trained_and_used(run, home, tmp_path):
    base, bank = tmp_path / "roomy", Bank(tmp_path / "bank", create=True)  # the templates need more than 256 letters
    root.build_tiny(max_position_embeddings=1024).save_pretrained(base)
    root.build_tokenizer().save_pretrained(base)
    add_expert(bank, base, "adder", task="addition?digits=1", domain="arithmetic", description="Adds.")
    where = ("--base", base, "--bank", bank.folder)
    done = run(
        "train", "--task", "dispatch", "--out", bank.folder / "judge", "--run", tmp_path / "run", *where,
        "--max-steps", 1, "--generation-batch-size", 4, "--num-generations", 2, "--eval-steps", 1,
        "--max-eval-samples", 4, "--test-n", 4, "--max-new-tokens", 2,
    )  # fmt: skip
    assert done.code == 0, done.err
    meta = Bank(bank.folder)["judge"].meta
    assert (meta["domain"], meta["task"], meta["training"]["labels"]) == (
        "dispatch",
        "dispatch",
        ("arithmetic", "other"),
    )
    done = run("generate", "hello", "--mix", "auto", *where, "--explain", "--max-new-tokens", 2, "--json")
    assert "the classification expert judge" in done.json["answers"][0]["decision"]["reason"]


def test_bad_strategies(refused, home, bank):
    where = ("--base", home.base, "--bank", bank)
    assert "'E'" in refused("generate", "x", "--mix", "auto", "--strategy", "E", *where)
    assert "sigmix experts statistics" in refused("generate", "x", "--mix", "auto", "--strategy", "D", *where)
    assert "sigmix train --task dispatch" in refused("generate", "x", "--mix", "auto", "--strategy", "B", *where)
    assert "'auto'" in refused("generate", "x", "--mix", "auto:0.5", *where)


def test_adapt_gives_a_mix_that_other_commands_take(run, home, bank, tmp_path):
    file = tmp_path / "shots.jsonl"
    file.write_text('{"prompt": "What is 1?", "answer": 1}\n{"prompt": "and 2?", "answer": "2"}\n')
    where = ("--base", home.base, "--bank", bank)
    done = run(
        "adapt",
        "--data",
        file,
        "--out",
        tmp_path / "mine.json",
        "--population",
        4,
        "--iterations",
        2,
        *where,
        "--json",
    )
    assert done.code == 0, done.err
    kept = json.loads((tmp_path / "mine.json").read_text())
    assert kept["weights"] == done.json["weights"]
    assert kept["search"]["examples"] == 2
    assert (kept["name"], len(kept["trace"])) == ("mine", 2)
    answered = run("generate", "hi", "--mix", tmp_path / "mine.json", *where, "--max-new-tokens", 2, "--json")
    assert answered.json["answers"][0]["mix"] == kept["mix"]


def test_adapt_on_a_tasks_training_items(run, home, bank, tmp_path):
    done = run(
        "adapt", "--task", "addition?digits=1", "--shots", 3, "--out", tmp_path / "m.json", "--settings", "light",
        "--iterations", 1, "--method", "swarm", "--granularity", "layer", "--base", home.base, "--bank", bank, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert len(done.json["examples"]) == 3
    assert all("Answer with the number only." in prompt for prompt in done.json["examples"])


def test_bad_adapt_input(refused, home, bank, tmp_path):
    where = ("--base", home.base, "--bank", bank)
    out = ("--out", tmp_path / "m.json")
    file = tmp_path / "shots.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n')
    assert "shots.jsonl:2" in refused("adapt", "--data", file, *out, *where)
    assert "nowhere.jsonl" in refused("adapt", "--data", tmp_path / "nowhere.jsonl", *out, *where)
    file.write_text("\n")
    assert "shots.jsonl" in refused("adapt", "--data", file, *out, *where)
    assert "seed" in refused("adapt", "--task", "addition", "--seed", -1, *out, *where)
    for score, gold in (("number", '"$18"'), ("number", "NaN"), ("json", '"{"'), ("exact", '" "'), ("final", "true")):
        file.write_text(f'{{"prompt": "a", "answer": "1"}}\n\n{{"prompt": "b", "answer": {gold}}}\n')
        assert "shots.jsonl:3" in refused("adapt", "--data", file, "--grader", score, *out, *where)
    file.write_bytes('{"prompt": "a", "answer": "b"}\n'.encode("utf-16"))
    assert "UTF-16" in refused("adapt", "--data", file, *out, *where)
    assert "--data" in refused("adapt", *out, *where)
    assert ".json" in refused("adapt", "--task", "addition", *where)
    assert "cem" in refused("adapt", "--task", "addition", "--method", "cme", *out, *where)
    file.write_text('{"prompt": "a", "answer": "b"}\n')
    assert "exact" in refused("adapt", "--data", file, "--grader", "same", *out, *where)
    (tmp_path / "m.json").write_text("mine")
    assert "m.json" in refused("adapt", "--data", file, *out, *where)
    assert (tmp_path / "m.json").read_text() == "mine"


SYSTEM = """
from sigmix.tasks.base import Sample, Score, Task

class Brief(Task):
    def samples(self, split, n=None, seed=0):
        return [Sample.make(f"{split} {i}", "a", system="be brief") for i in range(n or 4)]

    def score(self, sample, reply):
        return Score.of(reply == "a", reply)
"""


def test_system_messages_of_a_task_reach_the_chat_template(run, refused, home, bank, tmp_path):
    """A template that refuses them is an error of every command, rather than a prompt without them."""
    (tmp_path / "mine.py").write_text(SYSTEM)
    task = ("--task", f"{tmp_path / 'mine.py'}:Brief")
    strict = ("--base", home.strict, "--bank", bank)
    assert "System role" in refused("adapt", *task, "--out", tmp_path / "m.json", *strict)
    assert "System role" in refused("eval", *task, "--n", 2, *strict)
    assert "System role" in refused("eval", *task, "--strategy", "C", "--n", 2, *strict)
    done = run("train", *task, "--base", home.strict, "--out", tmp_path / "new", "--run", tmp_path / "run")
    assert done.code == 2
    assert "System role" in done.err[-1]
    assert not (tmp_path / "new").exists()
    assert run("eval", *task, "--n", 2, "--base", home.base, "--bank", bank).code == 0


def test_eval_of_strategies_pairs_each_with_the_base(run, home, routed, tmp_path):
    letters = [word for letter in ("base", "A", "C", "D", "oracle") for word in ("--strategy", letter)]
    done = run(
        "eval", "--task", "addition?digits=1", "--n", 6, *letters,
        "--shots", 2, "--base", home.base, "--bank", routed, "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    by = {one["strategy"]: one for one in done.json["results"]}
    assert list(by) == ["base", "A", "C", "D", "arithmetic", "reading", "oracle"]
    assert by["base"]["paired"] is None
    for name, one in by.items():
        assert one["n"] == 6
        assert name == "base" or one["paired"]["n"] == 6
        assert name == "oracle" or sum(one["chosen"].values()) == 6
    assert by["oracle"]["accuracy"] >= max(by[name]["accuracy"] for name in ("base", "arithmetic", "reading"))
    assert done.json["few_shot"]["examples"] == 2
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    for one in summary["results"]:
        items = [json.loads(line) for line in (tmp_path / "out" / one["file"]).open()]
        assert sum(item["score"] == 1 for item in items) / len(items) == one["accuracy"]
        assert len(items) == 6


def test_dispatch_gives_matrices(run, home, routed, tmp_path):
    done = run(
        "eval", "--dispatch", "--n", 5, "--base", home.base, "--bank", routed, "--out", tmp_path / "out", "--json"
    )
    assert done.code == 0, done.err
    assert [one["strategy"] for one in done.json["strategies"]] == ["A (prompt)", "D (router)"]
    for one, letter in zip(done.json["strategies"], "AD", strict=True):
        assert one["labels"] == ["arithmetic", "reading", "other"]
        assert [row["label"] for row in one["rows"]] == [
            "arithmetic",
            "reading",
            "other",
            "other:syllogism",
            "other:boolean",
            "other:code",
        ]
        assert all(sum(row["counts"]) == row["n"] == 5 for row in one["rows"])
        items = [json.loads(line) for line in (tmp_path / f"out/dispatch-{letter}.jsonl").open()]
        assert len(items) == one["n"] == 30
        for row in one["rows"]:
            truth = row["label"].partition(":")[0]
            right = sum(item["label"] == truth for item in items if item["truth"] == row["label"])
            assert row["right"] == right == row["counts"][one["labels"].index(truth)]
        assert (tmp_path / f"out/dispatch-{letter}.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "out/dispatch.json").read_text())["strategies"] == done.json["strategies"]


def test_dispatch_without_the_data_of_a_label(run, refused, home, bank):
    words = ("eval", "--dispatch", "--strategy", "A", "--n", 3, "--base", home.base)
    add_expert(Bank(bank), home.base, "commands", 5, task="commands", domain="commands")
    done = run(*words, "--bank", bank, "--json")
    assert done.code == 0, done.err
    (note,) = (line for line in done.err if "--data-dir" in line)
    assert "commands" in note
    assert "arithmetic" not in note
    assert done.json["left_out"] == ["commands"]
    (one,) = done.json["strategies"]
    assert one["labels"] == ["arithmetic", "commands", "reading", "other"]  # it can still be chosen
    assert [row["label"] for row in one["rows"]][:3] == ["arithmetic", "reading", "other"]
    assert "snips" in refused(*words, "--bank", bank, "--data-dir", bank)  # a folder that lacks it is an error
    for name in ("arithmetic", "reading"):
        shutil.rmtree(bank / name)
    assert "--data-dir" in refused(*words, "--bank", bank)


def test_a_classification_expert_needs_the_data_of_every_label(run, home, bank, tmp_path):
    add_expert(Bank(bank), home.base, "commands", 5, task="commands", domain="commands")
    done = run(
        "train", "--task", "dispatch", "--base", home.base, "--bank", bank, "--out", tmp_path / "judge",
        "--run", tmp_path / "run", "--max-steps", 1,
    )  # fmt: skip
    assert done.code == 2
    assert "commands" in done.err[-1]
    assert "--data-dir" in done.err[-1]
    assert not (tmp_path / "judge").exists()


def test_dispatch_of_own_requests(run, refused, home, routed, tmp_path):
    file = tmp_path / "requests.json"
    file.write_text('{"arithmetic": ["What is 1 + 2? Answer with the number only."], "other": ["Hello.", "x"]}')
    where = ("--dispatch", "--requests", file, "--strategy", "D", "--base", home.base, "--bank", routed)
    (one,) = run("eval", *where, "--json").json["strategies"]
    assert [(row["label"], row["n"]) for row in one["rows"]] == [("arithmetic", 1), ("other", 2)]
    assert one["rows"][0]["right"] == 1
    file.write_text('{"poems": ["a poem"]}')
    assert "'poems'" in refused("eval", *where)
    assert "--dispatch" in refused("eval", "--task", "addition", "--requests", file)


def test_statistics_of_experts(run, refused, home, routed, tmp_path):
    where = ("--base", home.base, "--bank", routed)
    listed = run("experts", "list", "--bank", routed, "--json").json["experts"]
    assert all(one["requests"]["train_n"] for one in listed)
    before = Bank(routed)["reading"]
    (routed / "reading" / "requests.safetensors").unlink()
    done = run("experts", "list", "--bank", routed)
    assert "sigmix experts statistics" in done.out
    assert "reading" in done.out
    assert "sigmix experts statistics reading" in run("experts", "show", "reading", "--bank", routed).out
    assert [one["name"] for one in run("experts", "statistics", *where, "--json").json["experts"]] == ["reading"]
    assert Bank(routed)["reading"] == before
    again = run("experts", "statistics", "reading", *where, "--json").json["experts"]
    assert [one["name"] for one in again] == ["reading"]
    assert "no expert lacks" in run("experts", "statistics", *where).out
    assert "'nobody'" in refused("experts", "statistics", "nobody", *where)
    refused("experts", "statistics", "reading", "--base", home.other, "--bank", routed)
    file = routed / "reading" / "requests.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    assert "requests.safetensors" in refused("generate", "x", "--mix", "auto", *where)


def test_eval_options_that_exclude_each_other(refused, home, bank):
    where = ("--base", home.base, "--bank", bank)
    assert "--data" in refused("eval", *where)
    assert "--dispatch" in refused("eval", "--dispatch", "--task", "addition", *where)
    assert "--strategy" in refused("eval", "--task", "addition", "--strategy", "A", "--mix", "reading", *where)
    assert "'Z'" in refused("eval", "--task", "addition", "--strategy", "Z", *where)


def test_a_swarm_that_moves_z_saves_an_expert_that_every_command_takes(run, home, bank, tmp_path):
    examples = tmp_path / "examples.jsonl"
    examples.write_text(json.dumps({"prompt": "What is 1 + 1?", "answer": "two"}) + "\n")
    common = ("--base", home.base, "--bank", bank)
    options = ("--data", examples, "--granularity", "z", "--population", 6, "--iterations", 6)
    done = run("adapt", *options, "--method", "swarm", "--out", bank / "found", *common, "--json")
    assert done.code == 0, done.err
    assert run("experts", "verify", bank / "found", "--base", home.base).code == 0
    used = run("generate", "hello", "--mix", "found", "--max-new-tokens", 2, *common, "--json")
    assert used.json["answers"][0]["mix"] == "found"
    assert run("adapt", *options, "--method", "swarm", "--out", bank / "found", *common).code == 2  # it is there
    refused = run("adapt", *options, "--method", "cem", "--out", bank / "other", *common)
    assert refused.code == 2
    assert "swarm" in "".join(refused.err)
    assert run("adapt", *options, "--method", "swarm", "--out", "x.json", *common).code == 2


def test_a_form_can_be_requested(run, home, bank):
    where = ("--base", home.base, "--bank", bank)
    command = ("generate", "hello", "x", "--mix", "arithmetic", "--mix", "reading", "--max-new-tokens", 2, *where)
    assert run(*command, "--form", "gain").code == 0
    assert run(*command, "--form", "merged").code == 2  # two mixes
    assert run(*command, "--form", "shortened").code == 2


@pytest.mark.slow
def test_a_mixture_is_compared_with_an_expert_trained_on_the_same_rows(run, refused, home, bank, tmp_path):
    file, skills = tmp_path / "rows.jsonl", tmp_path / "skills"
    lines = [json.dumps({"prompt": f"letter {number}", "answer": "ab"[number % 2]}) + "\n" for number in range(16)]
    file.write_text("".join(lines))
    common = ("adapt", "--compare", "train", "--base", home.base, "--bank", bank)
    options = ("--shots", 6, "--population", 4, "--iterations", 2, "--data", file)
    done = run(*common, *options, "--out", skills / "few.json", "--json")
    assert done.code == 0, done.err
    compared = done.json["compared"]
    assert [one["mix"] for one in compared["results"]] == ["base", done.json["mix"], "few"]
    assert {one["n"] for one in compared["results"]} == {10}
    assert "10 held-out rows" in compared["verdict"]
    assert len(done.json["examples"]) == 6
    assert json.loads((skills / "few.json").read_text())["compared"] == compared
    expert = Bank(skills)["few"]
    assert expert.meta["metrics"][0]["n"] == 10
    assert expert.meta["training"]["max_train_samples"] == 6
    used = run("generate", "letter 3", "--mix", "few", "--base", home.base, "--bank", skills, "--max-new-tokens", 2)
    assert used.code == 0, used.err
    assert "few" in refused(*common, *options, "--out", skills / "few.json")
    (skills / "few.json").unlink()
    assert "few" in refused(*common, *options, "--out", skills / "few.json")  # the expert is there
    assert "arithmetic" in refused(*common, *options, "--out", tmp_path / "arithmetic.json")
    other = ("--out", tmp_path / "other.json")
    assert "--shots" in refused(*common, "--shots", 16, "--data", file, *other)
    assert "--data" in refused(*common, "--task", "addition", *other)
    assert "train" in refused(*common, *options, "--compare", "lora", *other)
    assert not (tmp_path / "other.json").exists()
