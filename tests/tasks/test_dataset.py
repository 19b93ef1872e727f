"""A user's data as a task: splits, duplicates, contradictions, leaks, graders, limits."""

import csv
import json
import random

import pytest
from helpers_tiny import build_tokenizer

from sigmix.errors import ConfigError, DataError, TaskError, UnknownNameError
from sigmix.tasks import dataset
from sigmix.tasks.dataset import DataTask
from sigmix.tasks.registry import get_task

LABELS = ["refund", "delivery", "other"]


def rows(count=90, seed=0):
    draw = random.Random(seed)
    return [(f"request {number} about {draw.choice('abcdef')}", LABELS[number % 3]) for number in range(count)]


def table(path, values, head=("text", "label")):
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *values])
    return str(path)


def test_a_file_becomes_a_task(tmp_path):
    task = get_task("data:" + table(tmp_path / "tickets.csv", rows()))
    assert task.validate().problems == []
    split = {name: {one.prompt for one in task.samples(name)} for name in ("train", "validation", "test")}
    assert sum(map(len, split.values())) == 90
    assert not split["train"] & split["test"]
    assert len(split["train"]) > len(split["test"]) > 3
    sample = task.samples("test")[0]
    assert task.score(sample, f" {sample.gold}. ").value == 1
    assert task.score(sample, "nonsense").answer is None
    assert task.reference == "data:tickets.csv"  # no folder on a card
    assert task.facts["data"]["rows"] == 90
    assert len(task.facts["data"]["sha256"]) == 64


def test_splits_do_not_depend_on_order_seed_or_case(tmp_path):
    values = rows()
    task, other = (DataTask(table(tmp_path / name, one)) for name, one in (("a.csv", values), ("b.csv", values[::-1])))
    for split in ("train", "validation", "test"):
        ids = [one.id for one in task.samples(split)]
        assert ids == [one.id for one in other.samples(split)]
        assert set(ids) == {one.id for one in task.samples(split, seed=1)}
        assert task.samples(split, 3, seed=1) == task.samples(split, seed=1)[:3]
    shouted = [(text.upper(), label) for text, label in values]
    both = DataTask(table(tmp_path / "c.csv", [*values, *shouted]))
    for split in ("train", "validation", "test"):
        texts = [one.prompt for one in both.samples(split)]
        assert sorted({text.lower() for text in texts}) == sorted(text for text in texts if text.islower())


def test_a_few_rows_are_adapted_to_and_the_others_held_out(tmp_path):
    task = DataTask(table(tmp_path / "few.csv", rows(14)))  # too few to train on
    few = task.few_shot(10)
    split = {name: {one.prompt for one in few.samples(name)} for name in ("train", "validation", "test")}
    assert (len(split["train"]), len(split["test"])) == (10, 4)
    assert split["train"] == split["validation"]
    assert not split["train"] & split["test"]
    assert {one.prompt for one in task.few_shot(10, seed=1).samples("train")} != split["train"]
    with pytest.raises(DataError, match="14 distinct prompts"):
        task.few_shot(14)
    table(tmp_path / "own" / "train.csv", rows(30))
    table(tmp_path / "own" / "test.csv", rows(40)[30:])
    few = DataTask(str(tmp_path / "own")).few_shot(5)
    assert {one.prompt for one in few.samples("test")} == {text for text, _ in rows(40)[30:]}
    assert {one.prompt for one in few.samples("train")} <= {text for text, _ in rows(30)}


def test_duplicates_contradictions_and_leaks_are_counted(tmp_path):
    values = rows()
    again = [*values, values[0], (values[1][0], "other"), (values[1][0] + " ", "other")]
    task = DataTask(table(tmp_path / "a.csv", again))
    figures = task.summary()
    assert (figures["rows"], figures["prompts"], figures["repeats"], figures["conflicts"]) == (93, 90, 2, 1)
    assert sum(figures["splits"].values()) == 90
    (conflict,) = figures["conflict_examples"]
    assert (set(conflict["answers"]), conflict["where"]) == ({"delivery", "other"}, f"{tmp_path}/a.csv:3")
    sample = next(one for split in task.splits() for one in task.samples(split) if one.prompt == values[1][0])
    assert sample.gold == "other"  # the most frequent one
    assert {task.score(sample, answer).value for answer in ("other", "delivery")} == {1.0}
    assert task.score(sample, "refund").value == 0.0

    folder = tmp_path / "folder"
    table(folder / "train.csv", values)
    table(folder / "test.csv", [*values[:10], ("new", "other")])
    given = DataTask(str(folder))
    assert len(given.samples("test")) == 11
    assert not {one.id for one in given.samples("test")} & {one.id for one in given.samples("train")}
    assert given.summary()["leaks"] == {"test and train": 10}
    assert given.summary()["given_splits"] == ["test", "train"]
    assert len(given.samples("train")) + len(given.samples("validation")) == 80
    assert given.validate().problems == []


def test_columns_labels_and_system_can_be_given(tmp_path):
    values = [(f"s{n}", f"b{n}", n % 2, n) for n in range(40)]
    path = table(tmp_path / "a.csv", values, ("subject", "body", "kind", "n"))
    options = {"answer_column": "kind", "template": "{subject}: {body}", "label_names": ["no", "yes"]}
    task = get_task(f"data:{path}", system="Be brief.", **options)
    sample = task.samples("train", 1)[0]
    number = int(sample.prompt.split(" b")[1])
    assert (sample.prompt, sample.gold) == (f"s{number}: b{number}", ["no", "yes"][number % 2])
    assert sample.system == "Be brief."
    assert get_task(task.name).samples("test") == task.samples("test")


def test_conversations_are_samples_with_history(tmp_path):
    lines = []
    for n in range(40):
        turns = [("user", f"hi {n}"), ("assistant", "hello"), ("user", f"and {n}?"), ("assistant", f"it is {n % 4}")]
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    task = DataTask(str(tmp_path / "chat.jsonl"))
    sample = task.samples("train", 1)[0]
    assert [turn["content"] for turn in sample.turns] == [*(turn["content"] for turn in sample.history), sample.prompt]
    assert task.validate().problems == []


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (rows(2), "2 distinct prompts.*adapt"),
        ([(text, "same") for text, _ in rows()], "all answers are 'same'"),
        ([*rows(), ("", "other")], r"a\.csv:92: .*'text' is empty.*--skip-invalid"),
        ([*rows(), ("more", " ")], r"a\.csv:92: .*'label' is empty"),
        ([*rows(), ("more", "\u00a0")], r"a\.csv:92: .*'label' is empty"),
    ],
)
def test_data_that_cannot_be_trained_on(tmp_path, values, problem):
    task = DataTask(table(tmp_path / "a.csv", values))
    with pytest.raises(DataError, match=problem):
        task.samples("train")


def test_half_a_character_is_named_before_training(tmp_path):
    lines = [json.dumps({"prompt": text, "completion": label}) for text, label in rows()]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"prompt": "\\ud83d x", "completion": "other"}']))
    with pytest.raises(DataError, match=r"a\.jsonl:91: .*ud83d"):
        DataTask(str(tmp_path / "a.jsonl")).samples("train")


@pytest.mark.parametrize(
    "other", ["REFUND", "refund ", "refund\u00a0", "\ufeffrefund\u200b", "re fund", "re\u200bfund", "refund."]
)
def test_labels_that_differ_by_case_or_blanks_are_named(tmp_path, other):
    values = [(text, other if label == "refund" and number % 2 else label)
              for number, (text, label) in enumerate(rows())]  # fmt: skip
    figures = DataTask(table(tmp_path / "a.csv", values)).summary()
    if other.strip("\ufeff\u200b\u00a0 ") == "refund":  # outer blanks are no text
        assert (len(figures["labels"]), figures["near_duplicate_labels"]) == (3, [])
    else:
        assert figures["near_duplicate_labels"] == [sorted(["refund", other])]


def test_invalid_rows_are_skipped_on_request(tmp_path):
    task = DataTask(table(tmp_path / "a.csv", [*rows(), ("", "other"), ("x", "")]), skip_invalid=True)
    figures = task.summary()
    assert (figures["prompts"], figures["skipped"]) == (90, 2)
    assert "a.csv:92" in figures["first_skipped"]


def test_a_missing_or_odd_source(tmp_path):
    for source, problem in ((tmp_path / "none.csv", "none.csv"), (tmp_path, "no train file")):
        with pytest.raises(DataError, match=problem):
            DataTask(str(source)).samples("train")
    table(tmp_path / "train.csv", rows())
    table(tmp_path / "training.csv", rows())
    with pytest.raises(DataError, match="are both train"):
        DataTask(str(tmp_path)).samples("train")
    with pytest.raises(UnknownNameError, match="nothing"):
        DataTask("a.csv", grader="nothing")
    with pytest.raises((ConfigError, TaskError), match="colour"):
        get_task("data:a.csv?colour=red")


def test_many_rows_are_sampled_by_content(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "MAX_ROWS", 40)
    values = rows(200)
    one, other = (DataTask(table(tmp_path / name, part)) for name, part in (("a.csv", values), ("b.csv", values[::-1])))
    assert {entry.id for entry in one.entries} == {entry.id for entry in other.entries}
    assert (len(one.entries), one.summary()["beyond"]) == (40, 160)


def test_a_grader_of_the_users_own_needs_no_answers(tmp_path):
    lines = [json.dumps({"messages": [{"role": "user", "content": f"{n} + 1"}], "sum": str(n + 1)}) for n in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    grader = {
        "type": "string_check", "name": "sum", "operation": "eq", "input": "{{sample.output_text}}",
        "reference": "{{item.sum}}",
    }  # fmt: skip
    task = DataTask(str(tmp_path / "a.jsonl"), grader=grader)
    sample = task.samples("train", 1)[0]
    right = str(int(sample.prompt.split()[0]) + 1)
    assert [task.score(sample, reply).value for reply in (right, "x")] == [1.0, 0.0]
    with pytest.raises(DataError, match="end with the assistant"):
        DataTask(str(tmp_path / "a.jsonl")).samples("train")


@pytest.mark.parametrize(
    ("answers", "grader"),
    [(["Billing", "billing", "Account"], "label"), ([f"So it is {n}.\n#### {n}" for n in range(30)], "final"),
     ([json.dumps({"a": n}) for n in range(30)], "fields"), ([str(n * 7.5) for n in range(30)], "number"),
     ([f"2021-03-{n + 1:02}" for n in range(30)], "exact"),
     ([f"The parcel number {n} left our warehouse this morning" for n in range(30)], "text")],
)  # fmt: skip
def test_the_grader_follows_from_the_answers_and_is_strict(tmp_path, answers, grader):
    values = [(f"request {number}", answers[number % len(answers)]) for number in range(60)]
    task = DataTask(table(tmp_path / "a.csv", values))
    assert task.inferred.grader == grader
    assert task.validate().problems == []


def test_a_program_grades_a_batch(tmp_path):
    lines = [json.dumps({"prompt": f"{n} + 1"}) for n in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = "def grade(sample, item):\n    return float(sample['output_text'] == str(eval(item['prompt'])))"
    grader = {"type": "python", "name": "sum", "source": source}
    with pytest.raises(ConfigError, match="--allow-code"):
        DataTask(str(tmp_path / "a.jsonl"), grader=grader)
    task = DataTask(str(tmp_path / "a.jsonl"), grader=grader, allow_code=True)
    samples = task.samples("train", 4)
    right = [str(int(one.prompt.split()[0]) + 1) for one in samples]
    assert [score.value for score in task.score_all(samples, [*right[:3], "x"])] == [1.0, 1.0, 1.0, 0.0]


def test_a_budget_follows_from_the_answers(tmp_path):
    tokenizer = build_tokenizer()
    long = "word " * 3000
    task = DataTask(table(tmp_path / "a.csv", [*rows(), (long, "other")]))

    def encode(turns, system):
        return tokenizer(turns)["input_ids"]

    task.prepare(tokenizer, encode, 2048)
    assert task.max_new_tokens == 1 + max(len(tokenizer(label)["input_ids"]) for label in LABELS)
    assert sum(len(task.samples(split)) for split in task.splits()) == 90
    assert "longer than the context" in task.notes[0]
    with pytest.raises(DataError, match=r"a\.csv:\d+: the answer takes .*--max-new-tokens"):
        task.check_budget(tokenizer, 1)
