"""`sigmix decompose`, `sigmix doctor --plan`, and --quantization and --basis where a base is loaded."""

from __future__ import annotations

import json

import pytest
import torch

from sigmix.svf import decomposition as module

pytest_plugins = ["helpers_cli"]


def test_decompose_fills_the_cache_once(run, home, tmp_path, monkeypatch):
    monkeypatch.setenv("SIGMIX_CACHE", str(tmp_path / "cache"))
    first = run("decompose", "--base", home.base, "--targets", "attention", "--json").json
    assert (first["matrices"], first["computed"], first["cached"]) == (8, 8, 0)
    assert first["bytes_written"] == sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*.safetensors"))
    rest = run("decompose", "--base", home.base, "--json").json
    assert (rest["matrices"], rest["computed"], rest["cached"]) == (14, 6, 8)
    monkeypatch.setattr(module, "decompose", None)
    again = run("decompose", "--base", home.base)
    assert "0 of 14 matrices decomposed, 14 were there" in again.out
    assert run("generate", "hi", "--mix", "arithmetic", "--bank", home.bank, "--base", home.base).code == 0
    assert run("cache", "clear", "--kind", "svd", "--yes").code == 0
    assert not list((tmp_path / "cache").rglob("ledgers/*"))


def test_decompose_refuses(run, refused, home, tmp_path):
    assert "config.json is missing" in refused("decompose", "--base", tmp_path)
    assert "--layers must be half or numbers" in refused("decompose", "--base", home.base, "--layers", "first")
    assert "no linear layer" in refused("decompose", "--base", home.base, "--targets", "a,b", "--layers", "0")
    assert "there is no device 'toaster'" in refused("decompose", "--base", home.base, "--device", "toaster")
    assert "can be decomposed on --device meta" in refused("decompose", "--base", home.base, "--device", "meta")
    assert "on --device mps" in refused("decompose", "--base", home.base, "--device", "mps")
    if torch.cuda.is_available():
        assert "on --device cuda:99" in refused("decompose", "--base", home.base, "--device", "cuda:99")
    else:
        assert "no GPU for --device cuda" in refused("decompose", "--base", home.base, "--device", "cuda")


# ---------------------------------------------------------------------- quantised


def test_a_quantised_base_with_experts_of_the_plain_one(run, refused, home):
    pytest.importorskip("torchao")
    asked = ["generate", "hello", "--bank", home.bank, "--base", home.base, "--max-new-tokens", "4"]
    line = refused(*asked, "--mix", "arithmetic", "--quantization", "int8")
    assert "in int8" in line
    assert "--basis original" in line
    done = run(*asked, "--mix", "arithmetic", "--quantization", "int8", "--basis", "original", "--json")
    assert done.json
    assert run(*asked, "--quantization", "int8", "--json").json
    assert "--basis original is for a quantised base" in refused(*asked, "--basis", "original")
    assert "--basis is own or original" in refused(*asked, "--basis", "mine", "--quantization", "int8")
    assert "unknown quantization 'int9'; nearest: int" in refused(*asked, "--quantization", "int9")


def test_eval_on_a_quantised_base(run, refused, home):
    pytest.importorskip("torchao")
    asked = ["eval", "--task", "addition?digits=1", "--base", home.base, "--bank", home.bank, "--n", "4"]
    asked += ["--quantization", "int8"]
    figures = run(*asked, "--expert", "arithmetic", "--basis", "original", "--max-new-tokens", "3", "--json").json
    assert figures
    assert "--quantization goes with" in refused(*asked, "--strategy", "A")


def test_training_on_a_quantised_base_makes_an_expert_of_it(run, refused, home, tmp_path):
    pytest.importorskip("torchao")
    out = tmp_path / "bank" / "small"
    asked = [
        "train",
        "--task",
        "addition?digits=1",
        "--base",
        home.base,
        "--max-steps",
        "2",
        "--generation-batch-size",
        "4",
    ]
    asked += ["--max-eval-samples", "4", "--max-new-tokens", "2", "--test-n", "4", "--run", tmp_path / "run"]
    asked += ["--quantization", "int8"]
    assert run(*asked, "--out", out, "--json").code == 0
    meta = json.loads((out / "sigmix.json").read_text())
    assert meta["base"]["dtype"].endswith(" in int8")
    use = ["generate", "1+1", "--mix", "small", "--bank", out.parent, "--base", home.base, "--max-new-tokens", "2"]
    assert run(*use, "--quantization", "int8").code == 0
    assert "was made on" in refused(*use)
    assert "svf policy" in refused(*asked, "--out", tmp_path / "other", "--policy", "lora")


# ---------------------------------------------------------------------- device maps


@pytest.fixture
def places(tmp_path):
    """Files of device maps: one device, the second layer on the disk, and such that cannot be."""
    disk = {f"model.{part}": "cpu" for part in ("embed_tokens", "layers.0", "norm", "rotary_emb")}
    made = {
        "cpu": {"": "cpu"}, "disk": {**disk, "lm_head": "cpu", "model.layers.1": "disk"}, "list": ["cpu"], "none": {},
        "true": {"": True}, "toaster": {"": "toaster"},
    }  # fmt: skip
    for name, places in made.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(places))
    (tmp_path / "broken.json").write_text("{")
    return tmp_path


def test_a_device_map_from_a_file(run, home, places):
    asked = ["generate", "hello", "--mix", "arithmetic", "--bank", home.bank, "--base", home.base]
    asked += ["--max-new-tokens", "4", "--form", "gain", "--json"]
    plain = run(*asked).json
    for where in ("auto", places / "cpu.json", places / "disk.json"):
        assert run(*asked, "--device-map", where).json == plain
    figures = ["eval", "--task", "addition?digits=1", "--base", home.base, "--bank", home.bank, "--n", "3", "--json"]
    figures += ["--max-new-tokens", "2"]
    assert run(*figures, "--device-map", places / "cpu.json").json["n"] == 3
    chat = run("chat", "--base", home.base, "--bank", home.bank, "--device-map", places / "cpu.json", stdin="/quit\n")
    assert chat.code == 0


def test_training_under_a_device_map(run, refused, home, places):
    asked = [
        "train",
        "--task",
        "addition?digits=1",
        "--base",
        home.base,
        "--max-steps",
        "1",
        "--generation-batch-size",
        "4",
    ]
    asked += ["--max-eval-samples", "4", "--max-new-tokens", "2", "--test-n", "0", "--run", places / "run"]
    asked += ["--out", places / "bank" / "mapped", "--device-map", places / "cpu.json"]
    assert "for one process" in refused(*asked, "--shard")
    assert run(*asked).code == 0
    meta = json.loads((places / "bank" / "mapped" / "sigmix.json").read_text())
    assert meta["base"] == json.loads((home.bank / "reading" / "sigmix.json").read_text())["base"]


def test_device_maps_that_cannot_be(refused, home, places):
    asked = ["generate", "hello", "--base", home.base, "--device-map"]
    assert "cannot be read: No such file" in refused(*asked, places / "nowhere.json")
    assert "cannot be read" in refused(*asked, places / "broken.json")
    for name in ("list", "none", "true"):
        assert "holds no object of modules and devices" in refused(*asked, places / f"{name}.json")
    assert "check the device map" in refused(*asked, places / "toaster.json")
    line = refused("eval", "--task", "addition", "--strategy", "A", "--device-map", "auto")
    assert "--device-map goes with --mix" in line


def test_a_server_takes_a_device_map(refused, home, places):
    asked = ["serve", "--base", home.base, "--bank", home.bank, "--device-map"]
    assert "check the device map" in refused(*asked, places / "toaster.json")
    assert "cannot be read" in refused(*asked, places / "broken.json")


# ---------------------------------------------------------------------- doctor


@pytest.fixture
def fast(monkeypatch):
    """Rates without measuring: what they are is tested elsewhere."""
    from sigmix.models import memory as budget

    rates = budget.Rates("cpu", "bfloat16", 1e12, 1e11, 1e11, 1e9, {256: 0.01, 1024: 0.4})
    monkeypatch.setattr(budget, "measure_rates", lambda *_: rates)


@pytest.mark.usefixtures("fast")
def test_the_plan_of_a_base_that_is_not_here(run):
    asked = "doctor", "--base", "meta-llama/Meta-Llama-3-70B-Instruct", "--plan", "--dtype", "bfloat16"
    figures = run(*asked, "--gpus", "8", "--gpu-memory", "80", "--json").json["base"]
    assert figures["plan"]["parameters"] == 70_553_706_496
    assert "published" in figures["config"]
    assert figures["budget"]["gpus"] == 8
    assert figures["budget"]["fits_gpus"]["train"] is True
    assert figures["budget"]["decompose"]["peak_bytes"] < 6e9
    text = run(*asked, "--gpus", "2", "--gpu-memory", "80")
    assert text.code == 0, "a plan for another machine is no problem of this one"
    for word in ("decompose, streamed", "largest matrix 8192×28672", "train, 64 answers a step", "serve, 32 requests",
                 "on each of 2 devices of 80 GB", "TOO MUCH", "estimates", "as sigmix has them"):  # fmt: skip
        assert word in text.out
    assert "TOO MUCH" not in run(*asked, "--gpus", "8", "--gpu-memory", "80").out


@pytest.mark.usefixtures("fast")
def test_the_plan_of_a_config_alone(run, refused, home, tmp_path):
    alone = tmp_path / "config.json"
    alone.write_text((home.base / "config.json").read_text())
    whole = run("doctor", "--base", home.base, "--plan", "--json").json["base"]
    assert run("doctor", "--base", tmp_path, "--plan", "--json").json["base"]["budget"] == whole["budget"]
    assert run("doctor", "--base", alone, "--plan", "--json").json["base"]["budget"] == whole["budget"]
    assert "serve" in run("doctor", "--base", alone, "--plan", "--quantization", "nf4").out
    for options in ((), ("--quantization", "int4", "--gpu-memory", "80"), ("--dtype", "float16")):
        found = run("doctor", "--base", alone, "--plan", *options, "--json").json["base"]
        serve = found["budget"]["serve"]
        both = {form: serve["parts"]["weights"] + extra for form, extra in serve["forms"].items() if form != "base"}
        assert found["memory_bytes"] == both, "one output has one figure"
    assert "float8" in refused("doctor", "--base", alone, "--plan", "--dtype", "float8", silent=False)
    assert "int9" in refused("doctor", "--base", alone, "--plan", "--quantization", "int9", silent=False)
    alone.write_text("{}")
    assert "is no config" in refused("doctor", "--base", alone, "--plan", silent=False)
