"""Benchmarks from small local files and from a stand-in for the hub: layouts, splits, errors."""

import json
import sys
from types import SimpleNamespace

import pytest

from sigmix.errors import ConfigError, DataError
from sigmix.tasks import Score, content_id, get_task
from sigmix.train.rollout import Actor


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def arc_row(number, labels="ABCD", key=None, stem=None):
    choices = [{"text": f"text {number} {label}", "label": label} for label in labels]
    return {"id": str(number), "question": {"stem": stem or f"Question {number}?", "choices": choices},
            "answerKey": key or labels[number % len(labels)]}  # fmt: skip


def mbpp_row(number):
    code = f"def f{number}(x):\r\n    return x + {number}"
    tests = [f"assert f{number}(1) == {number + 1}", f"assert f{number}(2) == {number + 2}"]
    return {"text": f"Write a function to add {number}.", "code": code, "task_id": number, "test_setup_code": "",
            "test_list": tests, "challenge_test_list": []}  # fmt: skip


@pytest.fixture
def data(tmp_path):
    for split, start in (("train", 0), ("test", 500)):
        write(tmp_path / f"gsm8k/{split}.jsonl", [{"question": f"Tom has {i} cups and gets 1000. How many?",
              "answer": f"{i} + 1000\n#### {i + 1000:,}"} for i in range(start, start + 120)])  # fmt: skip
        write(tmp_path / f"math/{split}.jsonl", [{"problem": f"What is {i}/7?",
        "solution": rf"It is $\boxed{{\frac{{{i}}}{{7}}}}$."}
              for i in range(start + 1, start + 60)])  # fmt: skip
    write(tmp_path / "svamp/SVAMP.jsonl", [{"ID": f"chal-{i}", "Body": f"Ann had {i} pens", "Question": "How many?",
          "Equation": "", "Answer": float(i), "Type": ""} for i in range(80)])  # fmt: skip
    write(tmp_path / "boolq/val.jsonl", [{"question": f"is {i} even", "passage": f"About {i}.", "idx": i,
          "label": "false" if i % 2 else "true"} for i in range(80)])  # fmt: skip
    for level in ("Easy", "Challenge"):
        write(tmp_path / f"arc/ARC-{level}-Train.jsonl", [arc_row(i) for i in range(30)] + [arc_row(70)])
        write(tmp_path / f"arc/ARC-{level}-Dev.jsonl", [arc_row(i, "ABC") for i in range(40, 50)])
        write(tmp_path / f"arc/ARC-{level}-Test.jsonl", [arc_row(i) for i in range(70, 80)]
              + [arc_row(i, "1234") for i in range(80, 90)] + [arc_row(90, "ABCDE")])  # fmt: skip
    for name, start in (("train", 0), ("dev", 100), ("test", 200)):
        write(tmp_path / f"openbookqa/{name}.jsonl", [arc_row(i) for i in range(start, start + 20)])
    write(tmp_path / "mbpp/mbpp.jsonl", [mbpp_row(i) for i in (1, 10, 11, 12, 510, 511, 600, 601, 974)])
    head = 'def plus(a, b):\n    """Add.\n    >>> plus(1, 2)\n    3\n    """\n'
    write(tmp_path / "humaneval/HumanEval.jsonl", [{"task_id": "HumanEval/0", "prompt": head, "entry_point": "plus",
          "canonical_solution": "    return a + b\n",
          "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n"}])  # fmt: skip
    return tmp_path


NAMES = ["gsm8k", "gsm8k?style=strict", "math", "svamp", "boolq", "arc-easy", "arc-challenge", "openbookqa"]


@pytest.mark.parametrize("name", NAMES)
def test_contract(data, name):
    task = get_task(name, data_dir=data)
    for split in ("train", "validation", "test"):
        report = task.validate(split, 30)
        assert report.ok, report.problems[:3]
    assert task.samples("test", seed=1) == get_task(task.name, data_dir=data).samples("test", seed=1)
    assert task.samples("test", 5) == task.samples("test")[:5]
    assert {s.id for s in task.samples("test", seed=1)} == {s.id for s in task.samples("test", seed=2)}
    assert task.license


@pytest.mark.parametrize("name", ["mbpp", "humaneval"])
def test_programs(data, name):
    task = get_task(name, data_dir=data, allow_code=True)
    report = task.validate(n=2)
    assert report.ok, report.problems[:3]
    with pytest.raises(ConfigError, match="--allow-code"):
        closed = get_task(name, data_dir=data)
        closed.score(closed.samples("test")[0], "x = 1")


def test_mbpp_splits_as_published(data):
    task = get_task("mbpp", data_dir=data)
    numbers = {
        split: sorted(s.meta["number"] for s in task.samples(split)) for split in ("train", "validation", "test")
    }
    assert numbers == {"test": [11, 12, 510], "validation": [511, 600], "train": [601, 974]}
    sample = task.samples("test")[0]
    assert sample.prompt.count("assert") == 1
    assert sample.meta["tests"].count("assert") == 2


def test_humaneval_has_only_a_test_split_and_takes_a_body(data):
    task = get_task("humaneval", data_dir=data, allow_code=True)
    assert task.splits() == ("test",)
    with pytest.raises(ConfigError, match="train"):
        task.samples("train")
    sample = task.samples("test")[0]
    assert task.score(sample, "    return a + b").value == 1.0
    assert task.score(sample, "```python\ndef plus(a, b):\n    return a - b\n```").value == 0.0


def test_duplicates_leave_train_never_test(data):
    task = get_task("arc-easy", data_dir=data)
    assert len(task.samples("test")) == 21
    assert len(task.samples("train")) == 30
    assert "1 samples dropped from train: also in test" in task.notes


def test_repeats_within_test_are_kept_and_noted(data):
    rows = [arc_row(70), arc_row(70), arc_row(71)]
    write(data / "arc/ARC-Easy-Test.jsonl", rows)
    task = get_task("arc-easy", data_dir=data)
    assert len(task.samples("test")) == 3
    assert any("kept in test" in note for note in task.notes)


def test_digit_labels_are_shown_as_letters(data):
    task = get_task("arc-easy", data_dir=data)
    sample = next(s for s in task.samples("test") if "Question 81?" in s.prompt)
    assert "B. text 81 2" in sample.prompt
    assert sample.gold == "B"
    assert task.score(sample, "2").value == 0.0


def test_splits_made_by_hash_are_said_and_do_not_depend_on_the_style(data):
    places = []
    for name in ("gsm8k", "gsm8k?style=strict"):
        task = get_task(name, data_dir=data)
        places.append({s.prompt.split("\n")[0] for s in task.samples("validation")})
        assert any("by content hash" in note for note in task.notes)
    assert places[0] == places[1]
    boolq = get_task("boolq", data_dir=data)
    assert sum(len(boolq.samples(split)) for split in ("train", "validation", "test")) == 80
    assert any("one split only" in note for note in boolq.notes)


def test_boolq_with_a_train_file_keeps_val_as_test(data):
    write(
        data / "boolq/train.jsonl", [{"question": f"is {i} odd", "passage": "P.", "label": "true"} for i in range(50)]
    )
    assert len(get_task("boolq", data_dir=data).samples("test")) == 80


def test_thousands_commas_in_gold(data):
    task = get_task("gsm8k", data_dir=data)
    sample = task.samples("test")[0]
    assert int(sample.gold) > 1000
    assert task.score(sample, f"It is {int(sample.gold):,}.").value == 1.0
    assert task.score(sample, sample.gold[-3:]).value == 0.0


def test_worked_solutions_are_what_is_trained_on(data, tiny_llama, tiny_tokenizer):
    answer = "48/2 = <<48/2=24>>24.\n24+1000=<<24+1000=1024>>1024\n#### 1,024"
    write(data / "gsm8k/train.jsonl", [{"question": f"Of {n} eggs?", "answer": answer} for n in range(40)])
    task = get_task("gsm8k", data_dir=data)
    sample = task.samples("train", 1)[0]
    assert sample.gold == "1024"
    assert sample.target == "48/2 = 24.\n24+1000=1024\nThe final answer is \\boxed{1024}."
    rollouts = Actor(tiny_llama, tiny_tokenizer, task).gold([sample])
    assert rollouts.texts == [sample.target]
    assert tiny_tokenizer.decode(rollouts.completions[0]).startswith(sample.target[:12])
    assert get_task("gsm8k?style=strict", data_dir=data).samples("train", 1)[0].target == "1024"
    assert get_task("math", data_dir=data).samples("train", 1)[0].target.startswith("It is $")
    assert get_task("svamp", data_dir=data).samples("train", 1)[0].target.isdecimal()


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"question": "q"}', r"train\.jsonl:2: .*'answer'"),
        ("{broken", r"train\.jsonl:2: "),
        ("[1]", r"train\.jsonl:2: .*list"),
        ('{"question": "q", "answer": "no mark"}', r"train\.jsonl:2: .*####"),
        ('{"question": "q", "answer": "#### many"}', r"train\.jsonl:2: .*many"),
        ('{"question": "q", "answer": "#### 1,5"}', r"train\.jsonl:2: .*1,5"),
        ('{"question": "q", "answer": "####"}', r"train\.jsonl:2: .*''"),
        ('{"question": "q", "answer": "#### nan"}', r"train\.jsonl:2: .*nan"),
        ('{"question": "q", "answer": "#### 1", "x": nan}', r"train\.jsonl:2: .*JSON"),
        ('{"question": 3, "answer": "#### 1"}', ":2: field"),
        ('{"question": " ", "answer": "#### 1"}', ":2: field 'question'"),
    ],
)  # fmt: skip
def test_bad_rows_name_file_and_line(data, line, match):
    file = data / "gsm8k/train.jsonl"
    file.write_text(file.read_text().splitlines()[0] + "\n" + line + "\n")
    with pytest.raises(DataError, match=match):
        get_task("gsm8k", data_dir=data).samples("test")


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("#### Step 1\n2 + 3 = 5\n#### $5.50", "5.5"), ("#### 1/3", "1/3"), ("#### 18 dollars", "18"),
        ("####1e17", "1" + 17 * "0"),
    ],
)  # fmt: skip
def test_gold_numbers_in_other_forms(data, answer, gold):
    write(data / "gsm8k/test.jsonl", [{"question": "How many?", "answer": answer}])
    task = get_task("gsm8k", data_dir=data)
    (sample,) = task.samples("test")
    assert sample.gold == gold
    assert task.score(sample, f"#### {gold}").value == 1.0
    assert not task.validate("test").problems


def test_every_answer_is_matched_by_itself_or_refused(data, monkeypatch):
    """A row with an answer that the task's own grader does not accept is named."""
    cls = type(get_task("svamp", data_dir=data))
    monkeypatch.setattr(cls, "score", lambda self, sample, reply: Score.of(reply != "7" and bool(reply), reply))
    with pytest.raises(DataError, match=r"SVAMP\.jsonl:8: no reply can match"):
        get_task("svamp", data_dir=data).samples("test")
    monkeypatch.setattr(cls, "score", lambda self, sample, reply: Score.of(True, reply))
    with pytest.raises(DataError, match=r"SVAMP\.jsonl:1: .*empty reply"):
        get_task("svamp", data_dir=data).samples("test")


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (arc_row(1, key="E"), "answerKey 'E'"), (arc_row(1, labels="A"), "2 to 8"),
        ({"question": {"stem": "s"}, "answerKey": "A"}, "choices"),
        (arc_row(1, labels="AAB"), "distinct"),
    ],
)  # fmt: skip
def test_bad_choice_rows(data, row, match):
    write(data / "arc/ARC-Easy-Dev.jsonl", [row])
    with pytest.raises(DataError, match=rf"Dev\.jsonl:1: .*{match}"):
        get_task("arc-easy", data_dir=data).samples("test")


def test_bytes_that_are_not_utf8(data):
    (data / "gsm8k/test.jsonl").write_bytes(b'{"question": "\xff"}\n')
    with pytest.raises(DataError, match=r"test\.jsonl:1: "):
        get_task("gsm8k", data_dir=data).samples("test")


def test_a_byte_order_mark_and_windows_line_ends_are_no_content(data):
    file = data / "gsm8k/test.jsonl"
    ids = [sample.id for sample in get_task("gsm8k", data_dir=data).samples("test")]
    file.write_bytes(b"\xef\xbb\xbf\r\n" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert [sample.id for sample in get_task("gsm8k", data_dir=data).samples("test")] == ids


def test_empty_and_missing_files(data):
    (data / "gsm8k/test.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"gsm8k/test\.jsonl"):
        get_task("gsm8k", data_dir=data).samples("test")
    (data / "gsm8k/test.jsonl").unlink()
    with pytest.raises(DataError, match=r"gsm8k/test\.jsonl.*arc.*openai/gsm8k"):
        get_task("gsm8k", data_dir=data).samples("test")
    with pytest.raises(DataError, match="nowhere"):
        get_task("gsm8k", data_dir=data / "nowhere").samples("test")


def hub(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


def test_hub_out_of_reach(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route")

    hub(monkeypatch, load_dataset)
    with pytest.raises(DataError, match=r"openai/gsm8k.*no route.*--data-dir"):
        get_task("gsm8k").samples("test")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install .sigmix\[tasks\]"):
        get_task("gsm8k").samples("test")


def test_hub_layouts(monkeypatch):
    requests = []

    def load_dataset(name, config, split):
        requests.append((name, config, split))
        start = {"train": 0, "validation": 100, "test": 200}[split]
        numbers = range(start, start + 40)
        if name == "allenai/openbookqa":
            return [{"id": str(i), "question_stem": f"Stem {i}", "answerKey": "B",
                     "choices": {"text": [f"{i} x", f"{i} y", "z", "w"],
                     "label": list("ABCD")}} for i in numbers]  # fmt: skip
        if name == "allenai/ai2_arc":
            return [{"id": str(i), "question": f"Stem {i}", "answerKey": "2",
                     "choices": {"text": [f"{i} x", "y", "z"], "label": list("123")}} for i in numbers]  # fmt: skip
        return [{"question": f"is {i} even", "passage": f"P {i}.", "answer": i % 2 == 0} for i in numbers]

    hub(monkeypatch, load_dataset)
    for name in ("openbookqa", "arc-challenge", "boolq"):
        report = get_task(name).validate()
        assert report.ok, report.problems[:3]
    assert ("allenai/openbookqa", "main", "validation") in requests
    assert ("allenai/ai2_arc", "ARC-Challenge", "test") in requests
    assert ("google/boolq", None, "validation") in requests
    boolq = get_task("boolq")
    assert len(boolq.samples("test")) == 40
    assert all("P 1" in s.prompt for s in boolq.samples("test", 3))


def test_ids_are_content(data):
    for sample in get_task("openbookqa", data_dir=data).samples("train", 5):
        assert sample.id == content_id(sample.prompt, sample.system)


def test_bad_style(data):
    with pytest.raises(ConfigError, match="loose"):
        get_task("gsm8k?style=loose", data_dir=data)
