"""The choice of prompts on a tiny base: forms change the prompt and the reading of the answer, cells are made once."""

from __future__ import annotations

import json

import pytest
from helpers_adapt import big
from helpers_tiny import build_tiny, build_tokenizer

from reproduction import prompts as study
from reproduction.prompts import Form
from sigmix.engine import Engine
from sigmix.tasks.base import Sample

CHOICES = {"A": "air", "B": "a long answer", "C": "sea"}
SAMPLE = Sample.make(
    "What is wet?\nA. air\nB. a long answer\nC. sea\nAnswer with the letter only.", "C", choices=CHOICES
)


@pytest.fixture
def data(tmp_path):
    """Three validation items of ARC-Easy in the publishers' layout."""
    rows = [
        {
            "id": str(number),
            "question": {"stem": f"Is {number} wet?", "choices": [{"label": k, "text": t} for k, t in CHOICES.items()]},
            "answerKey": "C",
        }
        for number in range(9)
    ]
    folder = tmp_path / "data" / "arc"
    folder.mkdir(parents=True)
    for split, part in (("Train", rows[:3]), ("Dev", rows[3:6]), ("Test", rows[6:])):
        (folder / f"ARC-Easy-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder.parent


@pytest.fixture(scope="module")
def engine():
    return Engine(big(build_tiny), build_tokenizer(), {})


@pytest.mark.parametrize(
    ("form", "start", "end"),
    [
        (Form(), "What is wet?", "Answer with the letter only."),
        (Form("Think."), "What is wet?", "C. sea\nThink."),
        (Form(""), "What is wet?", "C. sea"),
        (Form(before="Solve:"), "Solve:\nWhat is wet?", "Answer with the letter only."),
        (Form(plain=True), "Question: What is wet?", "What is wet?\nAnswer:"),
    ],
)
def test_a_form_changes_the_prompt(form, start, end):
    prompt = form.prompt(SAMPLE)
    assert prompt.startswith(start)
    assert prompt.endswith(end)


def test_the_final_letter_is_read_out_of_a_reasoned_reply(engine, monkeypatch):
    replies = ["First, the answer is B. No: the answer is **C**, sea.", "I do not know."]

    def generate(rows, max_new_tokens):
        assert max_new_tokens == 5
        return [type("Reply", (), {"text": text, "ids": [1]}) for text in replies]

    monkeypatch.setattr(engine, "generate", generate)
    task = study.get_task("arc-easy", data_dir=None)
    found = study.measure(engine, task, Form(final=True, tokens=5), [SAMPLE, SAMPLE])
    assert [score.value for _, score, _ in found] == [1.0, 0.0]
    assert [reply for reply, _, _ in found] == replies


@pytest.mark.parametrize("scored", ["letter", "text"])
def test_the_likeliest_choice_has_the_largest_mean_log_probability(engine, scored):
    form = Form(scored=scored)
    task = study.get_task("arc-easy", data_dir=None)
    ((reply, _, _),) = study.measure(engine, task, form, [SAMPLE])
    row = engine.encode(form.prompt(SAMPLE))
    means = {}
    for label, text in CHOICES.items():
        ids = engine.tokenizer(text if scored == "text" else label, add_special_tokens=False)["input_ids"]
        (scores,) = engine.score([row], [ids])
        means[label] = sum(scores) / len(scores)
    assert reply == max(means, key=means.__getitem__)


def test_cells_are_made_once_and_no_test_item_is_read(engine, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "FORMS", {"arc-easy": {"task's": Form(tokens=3), "likeliest": Form(scored="letter")}})
    out = tmp_path / "out"
    study.run(engine, data, out, 10, False, [])
    cells = sorted(out.glob("*.jsonl"))
    assert [len(cell.read_text().splitlines()) for cell in cells] == [3, 3]
    task = study.get_task("arc-easy", data_dir=data)
    seen = {json.loads(line)["id"] for cell in cells for line in cell.read_text().splitlines()}
    assert seen == {sample.id for sample in task.samples("validation")}
    assert "| arc-easy | likeliest | 3 |" in (out / "prompts.md").read_text()
    capsys.readouterr()
    study.run(engine, data, out, 10, False, [])
    assert capsys.readouterr().out == ""
