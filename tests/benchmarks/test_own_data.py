"""Files as users have them, written from published data, and the table of their reports."""

from __future__ import annotations

import json

import pytest
from helpers_tiny import build_tiny, build_tokenizer

from benchmarks import own_data
from sigmix.tasks.data import read_rows

INTENTS = {"balance": "banking", "transfer": "banking", "taxi": "travel", "oil_change": "auto_and_commute"}


@pytest.fixture
def data(tmp_path):
    """CLINC, SNIPS, ARC-Easy and GSM8K of a few made-up rows, as published."""
    folder = tmp_path / "data"
    rows = [[f"{intent} request {n}, please", intent] for n in range(12) for intent in INTENTS]
    splits = {"train": rows[:32], "val": rows[32:40], "test": rows[40:]}
    domains = {domain: [i for i, d in INTENTS.items() if d == domain] for domain in INTENTS.values()}
    commands = [{"text": f"Rate {n} of 6", "intent": "RateBook", "slots": {"rating_value": [str(n)]}} for n in range(9)]
    questions = [
        {"question": {"stem": f"What is {n}?", "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]},
         "answerKey": "AB"[n % 2]} for n in range(9)
    ]  # fmt: skip
    problems = [{"question": "1 + 1?", "answer": "2\n#### 2"}]
    files = {
        "clinc150/data_full.json": json.dumps(splits), "clinc150/domains.json": json.dumps(domains),
        **{f"snips/{split}.jsonl": _lines(commands) for split in ("train", "test")},
        **{f"arc/ARC-Easy-{split}.jsonl": _lines(questions) for split in ("Train", "Dev", "Test")},
        **{f"gsm8k/{split}.jsonl": _lines(problems) for split in ("train", "test")},
    }  # fmt: skip
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def _lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", own_data.SETS)
def test_files_are_read_as_they_were_written(name, data, tmp_path):
    splits = own_data.SETS[name](data)
    own_data.write(tmp_path / name, splits)
    for split, rows in splits.items():
        (path,) = (tmp_path / name).glob(f"{split}.*")
        assert sorted(str(row.data) for row in read_rows(path)) == sorted(map(str, rows))


@pytest.mark.slow
def test_a_set_is_trained_on_once_and_shown_in_the_table(data, tmp_path, cache, capfd):
    base, out = tmp_path / "base", tmp_path / "out"
    build_tiny().save_pretrained(base)
    build_tokenizer().save_pretrained(base)
    words = ["--data-dir", str(data), "--out", str(out), "clinc-intents", "--"]
    words += ["--base", str(base), "--max-steps", "1", "--test-n", "8"]
    own_data.main(words)
    (line,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("| clinc-intents-0")]
    assert line.count("|") == 12
    figures = out / "clinc-intents-0" / "figures.json"
    before = figures.read_bytes()
    own_data.main(words)
    assert figures.read_bytes() == before


@pytest.mark.slow
def test_the_sweep_uses_no_test_rows_and_none_of_the_reported_sets(data, tmp_path, cache, capfd, monkeypatch):
    base, out = tmp_path / "base", tmp_path / "out"
    build_tiny().save_pretrained(base)
    build_tokenizer().save_pretrained(base)
    assert not own_data.SWEEP.keys() & own_data.SETS.keys()
    assert not set(own_data.SWEEP_DOMAINS) & set(own_data.DOMAINS)
    run = own_data._sigmix
    monkeypatch.setattr(own_data, "SETTINGS", ((4, 2e-3),))
    monkeypatch.setattr(own_data, "SWEEP_ROWS", 16)
    monkeypatch.setattr(own_data, "SWEEP", {"dates": own_data.SWEEP["dates"]})
    monkeypatch.setattr(own_data, "_sigmix", lambda *words: run(*words, "--base", str(base)))
    own_data.main(["--data-dir", str(data), "--out", str(out), "--sweep", "dates"])
    assert "| 4 | 0.002 | 0.0 (step 0) |" in capfd.readouterr().out
    assert {path.stem for path in (out / "files" / "dates").iterdir()} == {"train", "validation"}
