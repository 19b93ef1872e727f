"""`sigmix export merged | lora | gguf`."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections import namedtuple
from types import SimpleNamespace

import pytest
from helpers_experts import at
from helpers_gguf import write_gguf
from helpers_tiny import build_tiny, build_tokenizer

from sigmix import Bank
from sigmix.export import lora
from sigmix.export import verify as llamacpp
from sigmix.utils.cache import claimed

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
    done = export("lora", "--mix", MIX, "--out", tmp_path / "eight", "--rank", "8", "--vllm", "--n", "3")
    # the error of the truncation is printed before the export, the measured difference after
    assert "verified with peft" in done.out
    record = json.loads((tmp_path / "eight" / "sigmix_export.json").read_text())
    assert record["rank"] == 8
    assert f"{record['error']:.2%}" in done.err[0]
    half = ("--precision", "float16", "--no-verify", "--n", "0")
    done = export("lora", "--mix", MIX, "--out", tmp_path / "error", "--error", "0.2", *half, "--json")
    assert done.json["error"] <= 0.2


def test_gguf(export, run, home, tmp_path, monkeypatch):
    done = export("gguf", "--mix", MIX, "--out", tmp_path / "each", "--each", "--json").json
    assert [(one["scale"], one["mix"]) for one in done["files"]] == [(0.7, "arithmetic"), (0.3, "reading")]
    assert "no GGUF file" in done["not_verified"] or not llamacpp.llama_cpp_installed()
    card = (tmp_path / "each" / "README.md").read_text()
    loras = "--lora-scaled arithmetic.gguf:0 --lora-scaled reading.gguf:0"
    for text in ('"cache_prompt": false', loras, '{"id": 1, "scale": 0.3}'):
        assert text in card
    shown = export("gguf", "--mix", MIX, "--out", tmp_path / "mix.gguf", "--no-verify").out
    assert "mix.gguf:0 --no-cache-prompt" in shown
    assert '"cache_prompt": false' in shown
    assert '"lora": [{"id": 0, "scale": 1.0}]' in shown
    # the tiny base of the other tests has another vocabulary than the file that is written here, so no figures are
    # compared: that is done in tests/export
    base = write_gguf(tmp_path / "base.gguf", build_tiny(vocab_size=260))
    monkeypatch.setattr(llamacpp, "llama_cpp_installed", lambda: False)
    done = export("gguf", "--mix", MIX, "--out", tmp_path / "b.gguf", "--gguf", base, "--json").json
    assert done["not_verified"] == "llama-cpp-python is not installed"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["merged", "--mix", "base"], "--mix dates"),
        (["merged", "--mix", "arithmetc"], "nearest: arithmetic"),
        (["merged", "--mix", "reading", "--shard-size", "5"], "no size"),
        (["merged", "--mix", "reading", "--dtype", "int9"], "'int9'"),
        (["lora", "--mix", "reading", "--rank", "0"], "--rank must be"),
        (["lora", "--mix", "reading", "--rank", "²"], "--rank must be"),
        (["lora", "--mix", "reading", "--rank", "9" * 5000], "--rank must be"),
        # before anything is opened: there is no such base
        (["lora", "--mix", "reading", "--error", "1.5", "--base", "/nowhere"], "share of the change"),
        (["gguf", "--mix", "reading", "--error", "nan", "--base", "/nowhere"], "share of the change"),
        (["lora", "--mix", "reading", "--rank", "8", "--error", "0.1"], "--rank and --error"),
        (["lora", "--mix", "reading", "--rank", "8", "--min-gain", "1.1", "--base", "/nowhere"], "--min-gain must be"),
        (["gguf", "--mix", "reading", "--each", "--min-gain", "nan", "--base", "/nowhere"], "--min-gain must be"),
        (["lora", "--mix", "reading", "--rank", "8", "--n", "-1"], "--n"),
        (["lora", "--mix", "reading", "--rank", "600", "--vllm"], "up to 512"),
        (["lora", "--mix", "reading", "--precision", "int8"], "unknown precision"),
        (["gguf", "--mix", "reading"], "must name a .gguf file"),
        (["gguf", "--mix", "reading", "--each", "--type", "q8"], "unknown number type"),
        (["gguf", "--mix", "reading", "--each", "--gguf", "nowhere.gguf"], "no file nowhere.gguf"),
    ],
)
def test_bad_input(refused, home, tmp_path, arguments, message):
    out = tmp_path / "out"
    named = () if "--base" in arguments else ("--base", home.base)
    line = refused("export", *arguments, "--out", out, *named, "--bank", home.bank)
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
    line = refused("export", "gguf", "--mix", mix, "--each", "--out", out, "--base", home.base, "--bank", home.bank)
    assert "one scale" in line


@pytest.mark.parametrize("kind", ["merged", "lora", "gguf"])
@pytest.mark.parametrize("mix, named", [("prompts", "prompts"), ("prompts:0.5+reading:0.5", "'all' (reading)")])
def test_an_expert_that_acts_on_prompts_is_refused_before_the_base_is_opened(refused, tmp_path, home, kind, mix, named):
    bank = Bank(shutil.copytree(home.bank, tmp_path / "bank"))
    bank.add(at("prompt", bank["arithmetic"], "prompts"))
    out = tmp_path / "out.gguf"
    line = refused("export", kind, "--mix", mix, "--out", out, "--base", "/nowhere", "--bank", bank.folder)
    assert "positions 'prompt' (prompts)" in line
    assert named in line
    assert "sigmix serve" in line
    assert "--positions all" in line
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bank"]


@pytest.mark.parametrize("kind", ["merged", "lora", "gguf"])
def test_two_runs_do_not_write_to_one_place(refused, home, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("SIGMIX_CACHE", str(home.cache))
    out = tmp_path / "out.gguf"
    with claimed(out):
        line = refused("export", kind, "--mix", "reading", "--out", out, "--base", home.base, "--bank", home.bank)
    assert "another run is going to write to" in line
    assert not out.exists()


def test_a_check_that_does_not_fit_into_memory_is_left_out_and_said(export, tmp_path, monkeypatch):
    memory = SimpleNamespace(total=10**12, available=10**5)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    done = export("merged", "--mix", "reading", "--out", tmp_path / "merged", "--json").json
    assert "verified" not in done
    assert re.search(r"needs \d.* of memory, and 100 kB are available", done["not_verified"])
    assert (tmp_path / "merged" / "README.md").is_file()
    assert "not verified: it needs" in export("lora", "--mix", "reading", "--out", tmp_path / "lora").out


@pytest.mark.parametrize("kind", ["merged", "lora"])
def test_a_full_disk_is_noticed_before_the_work(run, home, tmp_path, monkeypatch, kind):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    out = tmp_path / "out"
    done = run("export", kind, "--mix", "reading", "--out", out, "--base", home.base, "--bank", home.bank)
    assert done.code == 2
    assert str(out) in done.err[-1]
    assert "1.0 kB are free" in done.err[-1]
    assert not out.exists()


def test_an_exact_export_that_differs_is_an_error_and_stays(export, tmp_path, monkeypatch):
    factors = lora.LowRank.factors

    def swapped(self, path):  # rows in another order, as a program with another layout would read them
        a, b = factors(self, path)
        return a, b.flip(0).contiguous()

    monkeypatch.setattr(lora.LowRank, "factors", swapped)
    done = export("lora", "--mix", MIX, "--out", tmp_path / "out")
    assert done.code == 1
    assert not done.out
    assert "not verified" in done.err[-1]
    assert "peft" in done.err[-1]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    # what was left out on purpose may differ
    assert export("lora", "--mix", MIX, "--rank", "4", "--n", "0", "--out", tmp_path / "four").code == 0


def test_the_request_that_is_shown_can_be_sent_as_it_is(export, tmp_path):
    shown = export(
        "gguf", "--mix", "arithmetic:0.123456789+reading:1e-7", "--each", "--out", tmp_path / "a b", "--no-verify"
    ).out.splitlines()[-1]
    command, request = shown.split("; in a request: ")
    assert shlex.split(command)[3:6] == ["--lora-scaled", f"{tmp_path / 'a b' / 'arithmetic.gguf'}:0", "--lora-scaled"]
    scales = [one["scale"] for one in json.loads(f"{{{request}}}")["lora"]]
    assert scales == [0.123456789, 1e-7]


def test_a_base_that_must_be_loaded_whole_is_reported(run, tmp_path, monkeypatch, home):
    from helpers_cli import add_expert  # pytest loads it as a plugin first

    base = tmp_path / "mixtral"
    build_tiny("mixtral").save_pretrained(base)
    build_tokenizer().save_pretrained(base)
    monkeypatch.setenv("SIGMIX_CACHE", str(home.cache))
    bank = Bank(tmp_path / "bank", create=True)
    add_expert(bank, base, "one")
    arguments = ("export", "merged", "--mix", "one", "--bank", bank.folder, "--no-verify")
    done = run(*arguments, "--base", base, "--out", tmp_path / "out")
    assert done.code == 0
    assert any("loading it once" in line for line in done.err)
    own = ("--mix", "reading", "--base", home.base, "--bank", home.bank)
    done = run("export", "merged", *own, "--out", tmp_path / "own", "--no-verify")
    assert done.code == 0
    assert not any("loading it once" in line for line in done.err)
