"""`sigmix experts list | show | verify | diff`."""

from __future__ import annotations

import shutil

import pytest
from helpers_experts import at

from sigmix import Bank

pytest_plugins = ["helpers_cli"]


@pytest.fixture
def experts(run, home):
    return lambda *arguments: run("experts", *arguments, "--bank", home.bank)


def test_list(experts, home):
    figures = experts("list", "--json").json
    assert [row["name"] for row in figures["experts"]] == ["arithmetic", "reading"]
    assert all(row["verified"] and row["problem"] is None for row in figures["experts"])
    text = experts("list").out
    assert "arithmetic" in text
    assert "verified" in text


def test_an_empty_bank_is_no_error(run, tmp_path):
    assert run("experts", "list", "--bank", tmp_path, "--json").json["experts"] == []
    assert "has no experts" in run("experts", "list", "--bank", tmp_path).out


def test_list_shows_a_damaged_expert_beside_the_others(run, home, tmp_path):
    shutil.copytree(home.bank, tmp_path / "bank")
    (tmp_path / "bank" / "reading" / "sigmix.json").write_text("{")
    done = run("experts", "list", "--bank", tmp_path / "bank")
    assert done.code == 0
    assert "DAMAGED" in done.out
    assert "arithmetic" in done.out


def test_show_by_name_and_by_folder(experts, home):
    figures = experts("show", "arithmetic", "--json").json
    assert figures["name"] == "arithmetic"
    assert figures["task"] == "addition?digits=1"
    assert len(figures["top"]) == 5
    assert experts("show", home.bank / "arithmetic", "--json").json == figures
    text = experts("show", "arithmetic", "--top", 2).out
    assert "digest" in text
    assert text.count("model.layers") == 2


def test_positions_are_shown(run, home, tmp_path):
    bank = Bank(shutil.copytree(home.bank, tmp_path / "bank"))
    bank.add(at("prompt", bank["arithmetic"], "prompts"))
    rows = run("experts", "list", "--bank", bank.folder, "--json").json["experts"]
    found = {row["name"]: row["positions"] for row in rows}
    assert found == {"arithmetic": "all", "prompts": "prompt", "reading": "all"}
    assert "positions" in run("experts", "list", "--bank", bank.folder).out
    assert run("experts", "show", "prompts", "--bank", bank.folder, "--json").json["positions"] == "prompt"
    assert "positions: prompt" in run("experts", "show", "prompts", "--bank", bank.folder).out
    assert "tokens of the prompt" in (bank.folder / "prompts" / "README.md").read_text()
    difference = run("experts", "diff", "prompts", "arithmetic", "--bank", bank.folder, "--json").json
    assert difference["positions"] == ["prompt", "all"]
    assert not difference["identical"]
    assert difference["gain"]["distance"] == 0
    assert "positions prompt and all" in run("experts", "diff", "prompts", "arithmetic", "--bank", bank.folder).out


def test_verify(experts, home):
    report = experts("verify", "arithmetic", "--json").json
    assert report["ok"]
    assert report["checked"] == ["files", "values", "checksum"]
    report = experts("verify", home.bank / "arithmetic", "--base", home.base, "--json").json
    assert report["checked"][-2:] == ["fingerprint", "sketches"]
    assert "valid" in experts("verify", "arithmetic").out


def test_verify_reports_what_is_wrong_and_exits_2(run, refused, home, tmp_path):
    shutil.copytree(home.bank / "arithmetic", tmp_path / "broken")
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"nothing")
    assert "adapter_model.safetensors" in refused("experts", "verify", tmp_path / "broken", silent=False)
    assert "INVALID" in run("experts", "verify", tmp_path / "broken").out
    line = refused("experts", "verify", home.bank / "arithmetic", "--base", home.other, silent=False)
    assert "was made on" in line


def test_seal_binds_a_folder_that_peft_saved(run, refused, home, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(home.bank / "arithmetic", folder)
    (folder / "sigmix.json").unlink()
    assert "unverified" in run("experts", "verify", folder).out
    assert "--base" in refused("experts", "verify", folder, "--seal")
    report = run("experts", "verify", folder, "--base", home.base, "--seal", "--json").json
    assert report["sealed"]
    assert report["verified"]
    assert "sketches" in report["checked"]
    assert not run("experts", "verify", folder, "--base", home.base, "--seal", "--json").json["sealed"]


@pytest.fixture
def made_in(home, tmp_path, monkeypatch):
    """``made_in("float16")`` -> a folder with an expert that was made on the base in that dtype and quantisation."""
    from sigmix import Bank, Expert, load_base
    from sigmix.svf.config import SVFConfig

    def make(dtype, quantization=None, name="odd"):
        from peft import get_peft_model

        model = get_peft_model(load_base(home.base, dtype, quantization_config=quantization)[0], SVFConfig())
        Bank(tmp_path / "odd", create=True).add(Expert.from_model(model, name=name))
        return tmp_path / "odd" / name

    monkeypatch.setenv("SIGMIX_CACHE", str(home.cache))
    return make


@pytest.mark.parametrize("dtype, quantization, other", [
    ("float16", None, ("--dtype", "bfloat16")), ("bfloat16", "int8", ("--quantization", "int4")),
])  # fmt: skip
def test_the_base_is_read_as_the_expert_had_it(made_in, run, refused, home, dtype, quantization, other):
    if quantization:
        pytest.importorskip("torchao")
    folder = made_in(dtype, quantization)
    assert run("experts", "verify", folder, "--base", home.base, "--json").json["checked"][-1] == "sketches"
    assert run("experts", "diff", folder, folder, "--base", home.base, "--json").json["identical"]
    assert "was made on" in refused("experts", "verify", folder, "--base", home.base, *other, silent=False)
    if quantization:
        assert "with dtype='bfloat16', quantization_config='int8'" in run(
            "experts", "verify", folder, "--base", home.base, "--dtype", "float32", "--quantization", "int4"
        ).err[-1]  # fmt: skip
        command = ("--base", home.base, "--bank", folder.parent, "--mix", "odd")
        assert "--quantization int8" in refused("export", "merged", *command, "--out", folder / "out",
                                                          silent=False)  # fmt: skip
    (folder / "sigmix.json").unlink()
    words = ("--dtype", dtype, *(("--quantization", quantization) if quantization else ()))
    assert run("experts", "verify", folder, "--base", home.base, "--seal", *words, "--json").json["sealed"]
    recorded = run("experts", "show", folder, "--json").json["base"]["dtype"]
    assert recorded == dtype + (f" in {quantization}" if quantization else "")


def test_diff(experts, home):
    figures = experts("diff", "arithmetic", "reading", "--json").json
    assert figures["same_base"] is True
    assert not figures["identical"]
    assert figures["weight"]["estimated"]
    exact = experts("diff", "arithmetic", "reading", "--base", home.base, "--json").json
    assert not exact["weight"]["estimated"]
    assert experts("diff", "arithmetic", "arithmetic", "--json").json["identical"]
    text = experts("diff", "arithmetic", "reading", "--top", 3).out
    assert "cosine" in text
    assert text.count("model.layers") == 3


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["show", "arithmetc"], "nearest: arithmetic"),
        (["show", "no/such/folder"], "no expert at no/such/folder"),
        (["verify", "readin"], "nearest: reading"),
        (["diff", "arithmetic", "nope"], "unknown expert 'nope'"),
        (["diff", "arithmetic"], "Missing argument"),
    ],
)
def test_bad_input(refused, home, arguments, expected):
    assert expected in refused("experts", *arguments, "--bank", home.bank)


def test_no_such_bank(refused, tmp_path):
    assert "does not exist" in refused("experts", "list", "--bank", tmp_path / "none")
    assert "no adapter_config.json" in refused("experts", "show", tmp_path)
