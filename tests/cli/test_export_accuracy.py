"""Accuracy of truncated exports: that of the file in another program, notes where there is none, and the refusal."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from helpers_cli import add_expert
from helpers_export import copies_bank
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sigmix import Engine, load_base
from sigmix.evals import truncation
from sigmix.evals.accuracy import compare, evaluate
from sigmix.export import low_rank
from sigmix.tasks.registry import get_task

pytest_plugins = ["helpers_cli"]

N = 40
MIX = "one:0.7+two:0.3"


@pytest.fixture(scope="module")
def place(home, tmp_path_factory):
    """`copies_bank` on the home's base, with experts that cannot be measured, or that gain nothing."""
    folder = tmp_path_factory.mktemp("copies")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGMIX_CACHE", str(home.cache))
        bank, file = copies_bank(folder, home.base, MIX, N)
        tasks = {"untold": None, "lost": "gone.py:task", "code": f"{file}:Code", "far": "gsm8k", "same": f"{file}:Same"}
        for name, task in tasks.items():
            add_expert(bank, home.base, name, 2, task=task)
    return SimpleNamespace(bank=bank.folder, task=f"{file}:Copies", home=home)


@pytest.fixture
def export(run, place):
    return lambda kind, *arguments: run(
        "export", kind, "--base", place.home.base, "--bank", place.bank, "--no-verify", *arguments
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_figures_are_those_of_the_written_file_in_peft(export, place, tmp_path, precision):
    out = tmp_path / "out"
    options = ("--rank", "24", "--precision", precision, "--n", N, "--min-gain", "0", "--json")
    (row,) = export("lora", "--mix", MIX, "--out", out, *options).json["accuracy"]
    task = get_task(place.task)
    tokenizer = AutoTokenizer.from_pretrained(place.home.base)
    plain = AutoModelForCausalLM.from_pretrained(place.home.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, str(out)).eval()
    encode = Engine(*load_base(place.home.base, "float32")).encode

    def answer(samples):
        for sample in samples:
            ids = torch.tensor([encode(sample.prompt)])
            mask = torch.ones_like(ids)
            reply = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)[0]
            yield tokenizer.decode(reply[ids.shape[1] :], skip_special_tokens=True)

    samples = task.samples("test", N)
    theirs = evaluate(task, samples, list(answer(samples)))
    with model.disable_adapter():
        base = evaluate(task, samples, list(answer(samples)))
    assert 0 < base.accuracy < theirs.accuracy < 1
    assert row["truncated"] == theirs.summary()
    assert row["base"] == base.summary()
    assert row["exact"]["accuracy"] == 1
    gold = evaluate(task, samples, [sample.gold for sample in samples])
    assert row["paired"] == compare(theirs, gold)
    assert row["kept"] == pytest.approx((theirs.accuracy - base.accuracy) / (1 - base.accuracy))
    card = (out / "README.md").read_text()
    for one in (row["base"], row["exact"], row["truncated"]):
        assert f"{one['accuracy']:.3f} [{one['interval'][0]:.3f}, {one['interval'][1]:.3f}]" in card
    assert json.loads((out / "sigmix_export.json").read_text())["accuracy"] == [row]


def test_one_line_a_task_with_intervals_and_the_paired_difference(export, place, tmp_path):
    options = ("--rank", "24", "--n", N, "--min-gain", "0")
    done = export("lora", "--mix", f"{MIX}+same:1e-9", "--out", tmp_path / "out", *options)
    lines = [line for line in done.err if line.startswith("accuracy on")]
    assert [place.task in line for line in lines] == [True, False]
    assert all(f"{N} items" in line and line.count("[") == 4 for line in lines)
    assert "gains nothing" in lines[1]  # the base is right on all items, so there is no share


@pytest.mark.parametrize(
    "options, remedy",
    [
        (["--rank", "4"], "--rank 8"),
        (["--rank", "40"], "--rank exact"),
        (["--rank", "8", "--vllm"], "--rank 16"),
        (["--error", "0.9"], "--error 0.45"),
    ],
)
def test_an_adapter_that_keeps_too_little_is_refused(export, place, tmp_path, options, remedy):
    out = tmp_path / "out"
    done = export("lora", "--mix", MIX, "--out", out, "--n", N, *options)
    assert done.code == 2
    assert not done.out
    line = done.err[-1]
    for text in (place.task, "1.000", "0.9", remedy, "--min-gain 0"):
        assert text in line
    assert list(tmp_path.iterdir()) == []
    done = export("lora", "--mix", MIX, "--out", out, "--n", N, *options, "--min-gain", "0", "--json").json
    assert f"{done['accuracy'][0]['truncated']['accuracy']:.3f}" in line
    assert f"{done['accuracy'][0]['kept']:.4g}" in line
    assert (out / "adapter_model.safetensors").is_file()


def test_above_vllms_largest_rank_a_merged_checkpoint_is_the_remedy(export, tmp_path, monkeypatch):
    monkeypatch.setattr(low_rank, "VLLM_RANKS", (1, 8))
    done = export("lora", "--mix", MIX, "--out", tmp_path / "out", "--n", N, "--vllm")
    assert done.code == 2
    assert "sigmix export merged" in done.err[-1]


def test_the_threshold_is_the_share_that_is_kept(export, tmp_path):
    options = ("--mix", MIX, "--rank", "24", "--n", N)
    kept = export("lora", "--out", tmp_path / "a", *options, "--min-gain", "0", "--json").json["accuracy"][0]["kept"]
    assert 0 < kept < 0.9
    assert export("lora", "--out", tmp_path / "b", *options, "--min-gain", kept).code == 0
    assert export("lora", "--out", tmp_path / "c", *options, "--min-gain", kept + 0.001).code == 2
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("each", [True, False])
def test_gguf(export, tmp_path, each):
    out = tmp_path / ("out" if each else "out.gguf")
    options = ("--mix", MIX, "--out", out, "--rank", "24", "--type", "f16", "--n", N, *(["--each"] if each else []))
    done = export("gguf", *options)
    assert done.code == 2
    assert "--rank 48" in done.err[-1]
    assert list(tmp_path.iterdir()) == []
    (row,) = export("gguf", *options, "--min-gain", "0", "--json").json["accuracy"]
    # --each truncates every expert on its own, and the files are added as in a request
    assert row["base"]["accuracy"] < row["truncated"]["accuracy"] < row["exact"]["accuracy"] == 1
    assert not each or f"{row['truncated']['accuracy']:.3f}" in (out / "README.md").read_text()


def not_called(*_, **__):
    raise AssertionError("nothing is to be measured")


def test_nothing_is_measured_of_an_exact_export_and_with_n_0(export, tmp_path, monkeypatch):
    monkeypatch.setattr(truncation, "run", not_called)
    done = export("lora", "--mix", MIX, "--out", tmp_path / "exact", "--json").json
    assert not {"accuracy", "not_measured"} & set(done)
    done = export("lora", "--mix", MIX, "--out", tmp_path / "out", "--rank", "4", "--n", "0", "--json").json
    assert "accuracy" not in done
    assert done["not_measured"] == {MIX: "--n 0"}
    assert "accuracy was not measured" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "name, reason",
    [("untold", "names no training task"), ("lost", "gone.py"), ("code", "--allow-code"), ("far", "gsm8k")],
)
def test_an_expert_that_cannot_be_measured_is_a_note(export, tmp_path, name, reason):
    options = ("--rank", "4", "--n", "5", "--data-dir", tmp_path / "none")  # else the hub is tried
    done = export("lora", "--mix", f"{MIX}+{name}:0.01", "--out", tmp_path / "a", *options)
    assert done.code == 2  # the other experts' task is measured
    done = export("lora", "--mix", name, "--out", tmp_path / "b", *options, "--json")
    assert set(done.json["not_measured"]) == {name}
    assert reason in done.json["not_measured"][name]
    (line,) = [line for line in done.err if "not measured" in line]
    assert name in line
    assert done.json["error"] > 0
    assert "% of the change" in done.err[0]


def test_programs_run_if_they_are_allowed(export, tmp_path):
    options = ("--rank", "4", "--n", "5", "--min-gain", "0", "--allow-code", "--json")
    done = export("lora", "--mix", "code", "--out", tmp_path / "out", *options).json
    assert "not_measured" not in done
    assert done["accuracy"][0]["truncated"]["n"] == 5


def test_without_memory_the_norms_remain(export, tmp_path, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=10**12, available=10**5))
    done = export("lora", "--mix", MIX, "--out", tmp_path / "out", "--rank", "4", "--json").json
    assert "100 kB are available" in next(iter(done["not_measured"].values()))
    assert done["error"] > 0


def test_a_full_disk_is_noticed_before_the_measurement(export, tmp_path, monkeypatch):
    monkeypatch.setattr(truncation, "run", not_called)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    for kind, name in (("lora", "out"), ("gguf", "out.gguf")):
        done = export(kind, "--mix", MIX, "--out", tmp_path / name, "--rank", "4")
        assert done.code == 2
        assert "1.0 kB are free" in done.err[-1]


def test_what_llama_cpp_lacks_is_noticed_before_the_measurement(export, run, place, tmp_path, monkeypatch):
    monkeypatch.setattr(truncation, "run", not_called)
    monkeypatch.setattr("sigmix.export.gguf.ARCHITECTURES", {"qwen2": "QWEN2"})
    done = export("gguf", "--mix", MIX, "--out", tmp_path / "out.gguf", "--rank", "4")
    assert done.code == 2
    assert "'llama'" in done.err[-1]


def test_the_file_is_the_same_with_and_without_a_measurement(export, tmp_path):
    for name, n in (("with", "5"), ("without", "0")):
        export("lora", "--mix", MIX, "--out", tmp_path / name, "--rank", "8", "--n", n, "--min-gain", "0")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("with", "without"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
