"""Options that say how a base model is loaded: --quantization, --basis and --device-map."""

from __future__ import annotations

import json

import pytest

pytest_plugins = ["helpers_cli"]


def test_a_quantised_base_with_experts_of_the_plain_one(run, refused, home):
    pytest.importorskip("torchao")
    command = ["generate", "hello", "--bank", home.bank, "--base", home.base, "--max-new-tokens", "4"]
    line = refused(*command, "--mix", "arithmetic", "--quantization", "int8")
    assert "in int8" in line
    assert "--basis original" in line
    done = run(*command, "--mix", "arithmetic", "--quantization", "int8", "--basis", "original", "--json")
    assert done.json
    assert run(*command, "--quantization", "int8", "--json").json
    assert "--basis" in refused(*command, "--basis", "original")
    assert "mine" in refused(*command, "--basis", "mine", "--quantization", "int8")
    assert "nearest: int" in refused(*command, "--quantization", "int9")


def test_eval_on_a_quantised_base(run, refused, home):
    pytest.importorskip("torchao")
    command = ["eval", "--task", "addition?digits=1", "--base", home.base, "--bank", home.bank, "--n", "4"]
    command += ["--quantization", "int8"]
    figures = run(*command, "--expert", "arithmetic", "--basis", "original", "--max-new-tokens", "3", "--json").json
    assert figures
    assert "--quantization" in refused(*command, "--strategy", "A")


def test_training_on_a_quantised_base_makes_an_expert_of_it(run, refused, home, tmp_path):
    pytest.importorskip("torchao")
    out = tmp_path / "bank" / "small"
    command = [
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
    command += ["--max-eval-samples", "4", "--max-new-tokens", "2", "--test-n", "4", "--run", tmp_path / "run"]
    command += ["--quantization", "int8"]
    assert run(*command, "--out", out, "--json").code == 0
    meta = json.loads((out / "sigmix.json").read_text())
    assert meta["base"]["dtype"].endswith(" in int8")
    use = ["generate", "1+1", "--mix", "small", "--bank", out.parent, "--base", home.base, "--max-new-tokens", "2"]
    assert run(*use, "--quantization", "int8").code == 0
    assert "was made on" in refused(*use)
    assert "lora" in refused(*command, "--out", tmp_path / "other", "--policy", "lora")


@pytest.fixture
def places(tmp_path):
    """Files of device maps: one device, the second layer on the disk, and such that cannot be."""
    disk = {f"model.{part}": "cpu" for part in ("embed_tokens", "layers.0", "norm", "rotary_emb")}
    device_maps = {
        "cpu": {"": "cpu"}, "disk": {**disk, "lm_head": "cpu", "model.layers.1": "disk"}, "list": ["cpu"], "none": {},
        "true": {"": True}, "toaster": {"": "toaster"},
    }  # fmt: skip
    for name, places in device_maps.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(places))
    (tmp_path / "broken.json").write_text("{")
    return tmp_path


def test_a_device_map_from_a_file(run, home, places):
    command = ["generate", "hello", "--mix", "arithmetic", "--bank", home.bank, "--base", home.base]
    command += ["--max-new-tokens", "4", "--form", "gain", "--json"]
    plain = run(*command).json
    for where in ("auto", places / "cpu.json", places / "disk.json"):
        assert run(*command, "--device-map", where).json == plain
    figures = ["eval", "--task", "addition?digits=1", "--base", home.base, "--bank", home.bank, "--n", "3", "--json"]
    figures += ["--max-new-tokens", "2"]
    assert run(*figures, "--device-map", places / "cpu.json").json["n"] == 3
    chat = run("chat", "--base", home.base, "--bank", home.bank, "--device-map", places / "cpu.json", stdin="/quit\n")
    assert chat.code == 0


def test_training_under_a_device_map(run, refused, home, places):
    command = [
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
    command += ["--max-eval-samples", "4", "--max-new-tokens", "2", "--test-n", "0", "--run", places / "run"]
    command += ["--out", places / "bank" / "mapped", "--device-map", places / "cpu.json"]
    assert "--device-map" in refused(*command, "--shard")
    assert run(*command).code == 0
    meta = json.loads((places / "bank" / "mapped" / "sigmix.json").read_text())
    assert meta["base"] == json.loads((home.bank / "reading" / "sigmix.json").read_text())["base"]


def test_device_maps_that_cannot_be(refused, home, places):
    command = ["generate", "hello", "--base", home.base, "--device-map"]
    assert "nowhere.json" in refused(*command, places / "nowhere.json")
    assert "broken.json" in refused(*command, places / "broken.json")
    for name in ("list", "none", "true"):
        assert f"{name}.json" in refused(*command, places / f"{name}.json")
    assert "device map" in refused(*command, places / "toaster.json")
    line = refused("eval", "--task", "addition", "--strategy", "A", "--device-map", "auto")
    assert "--device-map" in line


def test_a_server_takes_a_device_map(refused, home, places):
    command = ["serve", "--base", home.base, "--bank", home.bank, "--device-map"]
    assert "device map" in refused(*command, places / "toaster.json")
    assert "broken.json" in refused(*command, places / "broken.json")
