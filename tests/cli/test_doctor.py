"""`sigmix doctor`."""

from __future__ import annotations

import torch
from transformers import RwkvConfig

from sigmix.cli import doctor as diagnose
from sigmix.engine.cpu import native

pytest_plugins = ["helpers_cli"]


def test_doctor(run, home):
    figures = run("doctor", "--base", home.base, "--json").json
    assert figures["problems"] == []
    assert figures["packages"]["core"]["torch"]["version"]
    assert figures["machine"]["cores"] >= 1
    assert figures["machine"]["disk_free_bytes"] > 0
    kernels = figures["machine"]["kernels"]
    assert not (kernels["problem"] and (kernels["bfloat16"] or kernels["int8"]))
    assert figures["dtype"]["chosen"] in ("float32", "bfloat16")
    assert figures["base"]["plan"]["matrices"] == 14
    assert set(figures["base"]["memory_bytes"]) == {"base", "merged", "gain", "factored"}
    text = run("doctor", "--base", home.base, "--plan").out
    assert "4 × [64, 64]" in text
    assert "not adapted" in text


def test_doctor_names_the_reason_for_which_kernels_are_missing(run, home, monkeypatch):
    monkeypatch.setattr(native, "load_kernels", native.load_kernels.__wrapped__)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in run("doctor", "--base", home.base, "--json").json["machine"]["kernels"]["problem"]
    assert "no-such-compiler" in run("doctor", "--base", home.base).out


def test_doctor_plans_the_default_without_its_weights(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SIGMIX_CACHE", str(tmp_path / "empty"))
    figures = run("doctor", "--json").json
    assert figures["base"]["name"] == "smollm2-135m"
    assert figures["base"]["plan"]["parameters"] == 134_515_008
    assert figures["base"]["plan"]["z_parameters"] == 97_920
    assert figures["cache"]["models"] == []


def test_doctor_on_an_unsupported_architecture(refused, tmp_path):
    RwkvConfig(hidden_size=64, attention_hidden_size=64, num_hidden_layers=1).save_pretrained(tmp_path)
    assert "rwkv" in refused("doctor", "--base", tmp_path, silent=False)


def test_doctor_on_a_base_that_is_none(refused, run, tmp_path):
    line = refused("doctor", "--base", tmp_path / "none", silent=False)
    assert str(tmp_path / "none") in line
    assert "machine:" in run("doctor", "--base", tmp_path / "none").out  # the rest is shown all the same
    assert "config.json is missing" in refused("doctor", "--base", tmp_path, silent=False)
    assert "nobody/nothing" in refused("doctor", "--base", "nobody/nothing", silent=False)


def test_doctor_gives_the_command_for_what_is_missing(run, home, monkeypatch):
    requirements = ["torch>=2.8", "numpy>=999", "no-such-package>=1", "sigmix[tasks]; extra == 'train'",
              'no-such-other>=2; extra == "tasks"', "rich>=13; extra == 'serve'"]  # fmt: skip
    real = diagnose.metadata.version
    monkeypatch.setattr(diagnose.metadata, "requires", lambda _: requirements)
    monkeypatch.setattr(diagnose.metadata, "version", lambda name: "1" if name == "sigmix" else real(name))
    done = run("doctor", "--base", home.base)
    assert done.code == 1
    assert len(done.err) == 1
    assert "numpy" in done.err[0]
    assert "is too old -> pip install 'numpy>=999'" in done.out
    assert "no-such-package is not installed -> pip install 'no-such-package>=1'" in done.out
    assert "extra tasks: missing or too old: no-such-other -> pip install 'sigmix[tasks]'" in done.out
    assert "extra serve: installed" in done.out


def test_doctor_warns_of_a_full_disk_and_an_unwritable_cache(home):
    figures = {
        "packages": {"python": "3.11", "core": {}},
        "machine": {"disk_free_bytes": 1000},
        "cache": {"folder": "/x", "writable": False},
        "base": {"name": "b", "fits_disk": False, "disk_bytes": 5000},
    }
    first, second = diagnose.problems(figures)
    assert diagnose.problems(figures, plan=True) == [first]
    assert "set SIGMIX_CACHE" in first
    assert "5.0 kB" in second


def test_the_plan_of_a_base_that_is_not_here(run):
    arguments = "doctor", "--base", "meta-llama/Meta-Llama-3-70B-Instruct", "--plan", "--dtype", "bfloat16"
    figures = run(*arguments, "--gpus", "8", "--gpu-memory", "80", "--json").json["base"]
    assert figures["plan"]["parameters"] == 70_553_706_496
    assert "published" in figures["config"]
    assert figures["per_gpu"]["gpus"] == 8
    assert figures["per_gpu"]["fits"]["train"] is True
    assert figures["per_gpu"]["bytes"]["serve, gain"] == figures["memory_bytes"]["gain"] // 8
    text = run(*arguments, "--gpus", "2", "--gpu-memory", "80")
    assert text.code == 0  # a plan for another machine is no problem of this one
    for word in ("8192", "decompose", "train", "serve", "on each of 2 GPUs of 80 GB", "about", "TOO MUCH"):
        assert word in text.out
    assert "TOO MUCH" not in run(*arguments, "--gpus", "8", "--gpu-memory", "80").out


def test_the_plan_of_a_config_alone(run, refused, home, tmp_path):
    alone = tmp_path / "config.json"
    alone.write_text((home.base / "config.json").read_text())
    whole = run("doctor", "--base", home.base, "--plan", "--json").json["base"]["plan"]
    assert run("doctor", "--base", tmp_path, "--plan", "--json").json["base"]["plan"] == whole
    assert run("doctor", "--base", alone, "--plan", "--json").json["base"]["plan"] == whole
    small = run("doctor", "--base", alone, "--plan", "--quantization", "nf4", "--json").json["base"]
    assert set(small["memory_bytes"]) == {"base", "gain"}
    assert "float8" in refused("doctor", "--base", alone, "--plan", "--dtype", "float8", silent=False)
    assert "int9" in refused("doctor", "--base", alone, "--plan", "--quantization", "int9", silent=False)
    alone.write_text("{}")
    assert str(alone) in refused("doctor", "--base", alone, "--plan", silent=False)
