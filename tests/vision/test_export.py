"""What reads a base without loading it: plan, decomposition and export of vision-language models."""

from __future__ import annotations

import pytest
import torch
from helpers_engine import expert
from helpers_vision import saved, vlm
from transformers import AutoConfig, AutoModelForImageTextToText

from sigmix import Bank, Mix, load_base
from sigmix.export.base import BaseCheckpoint
from sigmix.export.merged import export_merged
from sigmix.models.memory import empty_model, model_plan
from sigmix.svf.checkpoint import Checkpoint, decompose_checkpoint
from sigmix.svf.config import SVFConfig
from sigmix.svf.linears import linears, matrix_of
from sigmix.svf.tuner import svf_layers, target_layers

pytest_plugins = ["helpers_cli"]
KINDS = ["llava", "qwen2_vl"]


@pytest.mark.parametrize("kind", KINDS)
def test_plan_and_stream_are_of_what_is_adapted(kind, tmp_path):
    from peft import get_peft_model

    folder = saved(tmp_path, kind)
    adapted = svf_layers(get_peft_model(vlm(kind)[0], SVFConfig()))
    model = empty_model(AutoConfig.from_pretrained(folder))
    plan = model_plan(model, target_layers(model))
    assert plan["matrices"] == len(adapted) == 14
    assert plan["z_parameters"] == sum(layer.r for layer in adapted.values())
    assert plan["parameters"] == vlm(kind)[0].num_parameters()
    assert any("vision tower" in one["why"] for one in plan["not_adapted"])
    checkpoint = Checkpoint(folder, "float32")
    assert [matrix.path for matrix in checkpoint.matrices()] == list(adapted)
    decompose_checkpoint(checkpoint)
    for path, layer in adapted.items():
        assert torch.equal(checkpoint.weight(path), layer.matrix())


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_checkpoint_changes_the_backbone_alone(kind, tmp_path):
    folder, base = saved(tmp_path / "base", kind), vlm(kind)[0]
    one = expert(vlm(kind)[0], "one", 1)
    export_merged(BaseCheckpoint(folder), Mix.parse("one:.7"), {"one": one}, tmp_path / "out")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    layers = linears(loaded)
    for path, z in one.z.items():
        weight = matrix_of(linears(base)[path]).double()
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        wanted = (u * (s * (1 + 0.7 * (z.double() - 1)))) @ vt
        torch.testing.assert_close(matrix_of(layers[path]).double(), wanted, rtol=1e-4, atol=1e-5)
    before = dict(base.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, before[name]) != (name.removesuffix(".weight") in one.z)
    card = (tmp_path / "out/README.md").read_text()
    assert "AutoModelForImageTextToText" in card
    assert "pipeline_tag: image-text-to-text" in card


def test_the_commands(run, tmp_path):
    folder = saved(tmp_path / "base", max_position_embeddings=512)
    bank = Bank(tmp_path / "bank", create=True)
    bank.add(expert(load_base(folder)[0], "one", 1))
    common = ("--base", folder, "--bank", bank.folder, "--mix", "one", "--json")
    for form in ("merged", "lora"):
        done = run("export", form, *common, "--out", tmp_path / form)
        assert done.code == 0, done.err
        assert done.json["verified"]["max"] < 1e-3 < done.json["verified"]["effect_kl"]
    assert run("generate", "what?", "--base", tmp_path / "merged", "--max-new-tokens", 2).code == 0
    done = run("export", "gguf", *common, "--out", tmp_path / "one.gguf")
    assert done.code == 2
    assert "'llava'" in done.err[-1]
    done = run("doctor", "--base", folder, "--plan", "--json")
    assert done.json["base"]["plan"]["matrices"] == 14
    assert run("decompose", "--base", folder, "--json").json["matrices"] == 14
