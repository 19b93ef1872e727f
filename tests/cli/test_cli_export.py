"""`sigmix export merged | lora | gguf`."""

from __future__ import annotations

import json

import pytest
from helpers_gguf import write_gguf
from helpers_tiny import build_tiny

from sigmix.export import llamacpp

pytest_plugins = ["helpers_cli"]

MIX = "arithmetic:0.7+reading:0.3"


@pytest.fixture
def export(run, home):
    return lambda kind, *arguments: run("export", kind, "--base", home.base, "--bank", home.bank, *arguments)


def test_merged(export, tmp_path):
    done = export("merged", "--mix", MIX, "--out", tmp_path / "out", "--shard-size", "100kB", "--json").json
    assert done["mix"] == MIX
    assert len(done["files"]) > 1
    assert done["verified"]["tool"] == "transformers"
    assert done["verified"]["max"] == 0
    assert done["verified"]["effect_kl"] > 0
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    text = export("merged", "--mix", "reading", "--out", tmp_path / "two", "--no-verify").out
    assert "not verified" in text
    assert "14 of" in text


def test_lora(export, tmp_path):
    done = export("lora", "--mix", MIX, "--out", tmp_path / "exact", "--json")
    assert done.json["verified"]["kl"] < 1e-6
    assert done.json["error"] == 0
    assert "exact" in done.err[-1]
    done = export("lora", "--mix", MIX, "--out", tmp_path / "eight", "--rank", "8", "--vllm")
    # the error is told before the work, the measured difference after
    assert "% of the change is lost" in done.err[-1]
    assert "verified with peft: logits differ by" in done.out
    record = json.loads((tmp_path / "eight" / "sigmix_export.json").read_text())
    assert record["rank"] == 8
    assert f"{record['error']:.2%}" in done.err[-1]
    half = ("--precision", "float16", "--no-verify")
    done = export("lora", "--mix", MIX, "--out", tmp_path / "error", "--error", "0.2", *half, "--json")
    assert done.json["error"] <= 0.2


def test_gguf(export, run, home, tmp_path, monkeypatch):
    done = export("gguf", "--mix", MIX, "--out", tmp_path / "each", "--each", "--json").json
    assert [(one["scale"], one["mix"]) for one in done["files"]] == [(0.7, "arithmetic"), (0.3, "reading")]
    assert "no GGUF file" in done["not_verified"] or not llamacpp.installed()
    shown = export("gguf", "--mix", MIX, "--out", tmp_path / "mix.gguf", "--no-verify").out
    assert '"lora": [{"id": 0, "scale": 1}]' in shown
    # the tiny base of the other tests has another vocabulary than the file that is written here, so no figures are
    # compared: that is done in tests/export
    base = write_gguf(tmp_path / "base.gguf", build_tiny(vocab_size=260))
    monkeypatch.setattr(llamacpp, "installed", lambda: False)
    done = export("gguf", "--mix", MIX, "--out", tmp_path / "b.gguf", "--gguf", base, "--json").json
    assert done["not_verified"] == "llama-cpp-python is not installed"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["merged", "--mix", "base"], "base itself"),
        (["merged", "--mix", "arithmetc"], "nearest: arithmetic"),
        (["merged", "--mix", "reading", "--shard-size", "5"], "no size"),
        (["merged", "--mix", "reading", "--dtype", "int9"], "unknown dtype"),
        (["lora", "--mix", "reading", "--rank", "0"], "--rank must be"),
        (["lora", "--mix", "reading", "--rank", "8", "--error", "0.1"], "cannot both"),
        (["lora", "--mix", "reading", "--rank", "600", "--vllm"], "up to 512"),
        (["lora", "--mix", "reading", "--precision", "int8"], "unknown precision"),
        (["gguf", "--mix", "reading"], "must name a .gguf file"),
        (["gguf", "--mix", "reading", "--each", "--type", "q8"], "unknown number type"),
        (["gguf", "--mix", "reading", "--each", "--gguf", "nowhere.gguf"], "no file nowhere.gguf"),
    ],
)
def test_bad_input(refused, home, tmp_path, arguments, message):
    out = tmp_path / "out"
    line = refused("export", *arguments, "--out", out, "--base", home.base, "--bank", home.bank)
    assert message in line
    assert not out.exists()


def test_another_base_and_a_place_that_is_taken(refused, home, tmp_path):
    out = tmp_path / "out"
    line = refused("export", "merged", "--mix", "reading", "--out", out, "--base", home.other, "--bank", home.bank)
    assert "was made on" in line
    assert not out.exists()
    out.mkdir()
    (out / "mine").write_text("keep")
    for kind in ("merged", "lora"):
        line = refused("export", kind, "--mix", "reading", "--out", out, "--base", home.base, "--bank", home.bank)
        assert "exists already" in line
    assert (out / "mine").read_text() == "keep"


def test_weights_per_layer_need_one_file(refused, home, tmp_path):
    mix = tmp_path / "mix.json"
    mix.write_text(json.dumps({"weights": {"reading": [0.5, 0.2]}}))
    out = tmp_path / "out"
    line = refused(
        "export", "gguf", "--mix", mix, "--each", "--out", out, "--base", home.base, "--bank", home.bank
    )
    assert "one scale" in line
