"""Tasks about images: VQA accuracy, strict replies, splits by image, rows of files and of the hub."""

from __future__ import annotations

import hashlib
import io
import json

import datasets
import pytest
from helpers_vision import shape

from sigmix.errors import DataError
from sigmix.tasks.base import Sample, content_id
from sigmix.tasks.registry import get_task
from sigmix.tasks.vqa import most_agreed, normalise_vqa, vqa_accuracy
from sigmix.utils.images import picture


@pytest.mark.parametrize(
    "answer, expected",
    [
        # what the evaluation's rules say: https://visualqa.org/evaluation.html
        ("The  Dog", "dog"), ("a an the", ""), ("two", "2"), ("None", "0"), ("ten", "10"), ("twenty", "twenty"),
        ("dont", "don't"), ("Don't", "don't"), ("Don’t", "don't"), ("wouldve", "would've"), ("oclock", "o'clock"),
        ("well", "well"), ("ill", "ill"), ("its", "its"), ("shell", "shell"), ("shed", "shed"),
        ("yes.", "yes"), ("3.5", "3.5"), ("3.", "3"), ("2,000-3,000", "20003000"), (".5", ".5"), ("U.S.A.", "usa"),
        ("2,000", "2000"), ("red, white", "red white"),
        ("black-and-white", "black and white"), ("(red )", "red"), ("what?!", "what"), ("  ", ""), ("?!", ""),
    ],
)  # fmt: skip
def test_answers_are_normalised_as_the_evaluation_does(answer, expected):
    assert normalise_vqa(answer) == expected
    assert normalise_vqa(expected) == expected


def test_accuracy_is_the_mean_over_the_sets_that_leave_one_person_out():
    answers = ["red"] * 10
    for count in range(11):
        answers = ["red"] * count + ["blue"] * (10 - count)
        sets = [answers[:one] + answers[one + 1 :] for one in range(10)]
        expected = sum(min(part.count("red") / 3, 1) for part in sets) / 10
        assert vqa_accuracy("Red.", answers) == pytest.approx(expected, abs=1e-12)
    assert vqa_accuracy("", ["", "a"] * 5) == 0
    assert vqa_accuracy("the red one", ["red"] * 10) == 0
    assert vqa_accuracy("red", ["a red"]) == 1


def test_the_answer_of_most():
    assert most_agreed(["blue", "Red", "red", "?"]) == "Red"
    assert most_agreed(["blue", "red"]) == "blue"
    assert most_agreed(["?", "the"]) == ""


def agreement_rows(folder, name, count):
    (folder / name / "images").mkdir(parents=True)
    for split in ("train", "validation"):
        rows = []
        for number in range(count):
            colour, other = (("red", "blue"), ("blue", "red"))[number % 2]
            file = f"images/{split}{number // 2}.png"
            shape(colour, seed=number // 2 + 100 * (split == "train")).save(folder / name / file)
            answers = [colour] * 7 + [other] * 3 if number % 3 else [colour, "the one", "that", "hue", "it"] * 2
            rows.append({"question": f"Which colour, {number % 2}?", "answers": answers, "image": file})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name / f"{split}.jsonl").write_text(lines)


def test_textvqa_from_files(tmp_path):
    agreement_rows(tmp_path, "textvqa", 40)
    task = get_task("textvqa", data_dir=tmp_path)
    report = task.validate(n=40)
    assert report.ok, report.problems
    shown = {split: {s.images[0].digest for s in task.samples(split)} for split in task.splits()}
    assert all(shown.values())
    assert not shown["train"] & shown["validation"]  # an image's questions stay together
    sample = next(s for s in task.samples("test") if task.gold_value(s) == 1)
    other = "red" if sample.gold == "blue" else "blue"
    assert task.score(sample, f"The {sample.gold.upper()}.").value == 1
    assert task.score(sample, other).value == pytest.approx(0.9)
    assert task.score(sample, f"It is {sample.gold}").value == 0
    split = next(s for s in task.samples("test") if task.gold_value(s) < 1)
    assert task.score(split, split.gold).value == task.gold_value(split) == pytest.approx(0.6)
    long = task.score(sample, f"I think that it is {sample.gold} or so")
    assert (long.value, long.answer) == (0, None)  # not of the asked form, unlike a wrong word
    assert task.score(sample, "purple").answer == "purple"
    assert "the question using a single word" in sample.prompt


def test_textvqa_and_okvqa_from_the_hub_by_their_ids(monkeypatch):
    requests = []

    def load(hub_id, config, split):
        requests.append((hub_id, split))
        cells = []
        for number in range(40):
            raw = io.BytesIO()
            shape("red", seed=number // 2 + 100 * (split == "train")).save(raw, "PNG", compress_level=number % 2 * 9)
            cells.append({"bytes": raw.getvalue(), "path": None})
        table = {
            "image_id": [f"{split}{number // 2}" for number in range(40)],
            "question": [f"what, {number % 2}?" for number in range(40)],
            "answers": [["red"] * 10] * 40,
            "image": cells,
        }
        kinds = datasets.Features(
            image_id=datasets.Value("string"), question=datasets.Value("string"),
            answers=datasets.Sequence(datasets.Value("string")), image=datasets.Image(),
        )  # fmt: skip
        return datasets.Dataset.from_dict(table, features=kinds)

    monkeypatch.setattr(datasets, "load_dataset", load)
    textvqa = get_task("textvqa")
    assert len(textvqa.samples("train")) + len(textvqa.samples("validation")) == 40
    sample = textvqa.samples("test", 1)[0]
    assert sample.images[0].open().size == (32, 32)
    assert "lmms-lab/textvqa" in sample.images[0].name
    assert textvqa.score(sample, "red").value == 1
    okvqa = get_task("okvqa")
    assert okvqa.splits() == ("test",)
    samples = okvqa.samples("test")
    assert len(samples) == 40
    # two rows show each image, and their files of it differ
    assert len({sample.images[0].digest for sample in samples}) == 20
    assert all(sample.images[0].open().size == (32, 32) for sample in samples)
    both = ("lmms-lab/textvqa", "train"), ("lmms-lab/textvqa", "validation")
    assert set(requests) == {*both, ("lmms-lab/OK-VQA", "val2014")}


def easy_rows(folder, rows):
    (folder / "easy_vqa" / "images").mkdir(parents=True)
    shape("red").save(folder / "easy_vqa/images/0.png")
    shape("blue").save(folder / "easy_vqa/images/1.png")
    more = []  # so that some images fall into validation
    for number in range(2, 42):
        shape("red", seed=number).save(folder / f"easy_vqa/images/{number}.png")
        more.append({"question": "what color is it?", "answer": "red", "image": f"images/{number}.png"})
    for split in ("train", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in rows[split] + more * (split == "train"))
        (folder / "easy_vqa" / f"{split}.jsonl").write_text(lines)
    return get_task("easy_vqa", data_dir=folder)


def test_easy_vqa_is_strict_about_its_thirteen_answers(tmp_path):
    row = {"question": "what color is the shape?", "answer": "red", "image": "images/0.png"}
    task = easy_rows(tmp_path, {"train": [row], "test": [{**row, "image": "images/1.png", "answer": "blue"}]})
    sample = task.samples("test")[0]
    assert task.score(sample, "Blue.").value == 1
    for reply in ("the shape is blue", "blue blue", "not blue", "red, blue", "red", "navy", ""):
        assert task.score(sample, reply).value == 0, reply
    assert task.score(sample, "red").answer == "red"
    assert task.score(sample, "It is not blue").answer is None


def test_the_same_words_about_another_image_are_another_item(tmp_path):
    row = {"question": "what color is the shape?", "answer": "red", "image": "images/0.png"}
    task = easy_rows(tmp_path, {"train": [row, {**row, "image": "images/1.png"}], "test": [row]})
    left = [s for s in task.tables["train"] + task.tables["validation"] if "color is the shape" in s.prompt]
    assert [sample.images[0].name.rpartition("/")[2] for sample in left] == ["1.png"]
    assert any("also in test" in note for note in task.notes)  # and this one, image and all, was dropped


def test_text_items_keep_their_ids():
    identifier = hashlib.sha256(b"\x1fWhat is 1 + 1?").hexdigest()[:16]
    assert content_id("What  is 1 + 1?") == content_id("What is 1 + 1?", None, ()) == identifier
    red, blue = (Sample.make("what?", "red", images=[picture(shape(colour))]) for colour in ("red", "blue"))
    assert red.id != blue.id != Sample.make("what?", "red").id


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": "images/99.png"}, r"train\.jsonl:1: .*99\.png"),
        ({"image": None}, r"train\.jsonl:1: .*'image'"),
        ({"answer": "mauve"}, "mauve"),
    ],
)
def test_rows_that_make_no_sense_are_named(tmp_path, change, message):
    row = {"question": "what?", "answer": "red", "image": "images/0.png"}
    task = easy_rows(tmp_path, {"train": [{**row, **change}], "test": [row]})
    with pytest.raises(DataError, match=message):
        task.samples("train")


def test_easy_vqa_without_files_names_the_missing_ones():
    with pytest.raises(DataError, match=r"easy_vqa/train\.jsonl.*--data-dir"):
        get_task("easy_vqa").samples("test")
