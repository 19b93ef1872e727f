"""Cards of exports: headers that the hub takes, the base's licence or none, and lines of code that load."""

from __future__ import annotations

import json
import re

import pytest
from helpers_export import base_folder, experts
from huggingface_hub import ModelCard

from sigmix.experts.expert import Expert
from sigmix.experts.metadata import thaw
from sigmix.experts.mix import Mix
from sigmix.experts.model_card import DEFAULT_ON_HUB
from sigmix.export.base import BaseCheckpoint
from sigmix.export.lora import export_lora
from sigmix.export.low_rank import LowRank
from sigmix.export.merged import export_merged
from sigmix.export.model_card import adapter_card, merged_card

MIX = Mix.parse("math:0.7+word:0.5")


def licensed(bank, licenses):
    return {
        name: Expert(name, one.z, {**thaw(one.meta), **({"license": license_} if license_ else {})})
        for (name, one), license_ in zip(bank.items(), licenses, strict=True)
    }


def about(base, form="lora", licenses=(None, None), **changes):
    one = {"digest": "0" * 64}
    return {
        "base": {"name": base, "dtype": "float32", "fingerprint": None, **changes}, "mix": MIX.id, "form": form,
        "experts": {name: {**one, "license": license_} for name, license_ in zip("ab", licenses, strict=True)},
        "dropped": 0, "sigmix": "1", "dtype": "float32",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name, on_hub, loads",
    [
        ("org/model", "org/model", '"org/model"'),
        ("smollm2-135m", DEFAULT_ON_HUB, "\"the base's folder\""),  # the hub's weights are others
        ("my-model", None, "\"the base's folder\""),
        ("model.gguf", None, "\"the base's folder\""),
    ],
)
def test_the_base_is_named_by_its_hub_id(name, on_hub, loads):
    text = adapter_card(about(name))
    data = ModelCard(text).data.to_dict()
    assert data.get("base_model") == on_hub
    assert data.get("base_model_relation") == ("adapter" if on_hub else None)
    assert data["library_name"] == "peft"
    assert f"AutoModelForCausalLM.from_pretrained({loads}" in text
    assert ("4-bit file" in text) == (name == "smollm2-135m")
    data = ModelCard(merged_card(about(name, "merged"))).data.to_dict()
    assert data.get("base_model") == on_hub
    assert data.get("base_model_relation") == ("finetune" if on_hub else None)
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")


@pytest.mark.parametrize(
    "licenses, found",
    [
        (("MIT", "mit"), {"license": "mit"}),
        (("My own: terms", "my own: terms"), {"license": "other", "license_name": "my-own-terms"}),
        (("mit", "apache-2.0"), {}),
        (("mit", None), {}),
        ((None, None), {}),
    ],
)
def test_an_adapters_licence_is_its_experts(licenses, found):
    data = ModelCard(adapter_card(about("org/model", licenses=licenses))).data.to_dict()
    assert {key: value for key, value in data.items() if key.startswith("license")} == found


@pytest.mark.parametrize(
    "card, found",
    [
        ("---\nlicense: Apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense: other\n---\n", None),
        ("---\nlicense: [\n---\n", None),
        ("no header", None),
        (None, None),
    ],
)
def test_a_merged_checkpoints_licence_is_the_bases(tmp_path, cache, card, found, capsys):
    folder = base_folder(tmp_path / "base")
    if card is not None:
        (folder / "README.md").write_text(card)
    bank = licensed(experts(targets=["q_proj"]), ("mit", "mit"))
    export_merged(BaseCheckpoint(folder), MIX, bank, tmp_path / "out")
    data = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert data.get("license") == found
    assert "base_model" not in data  # a folder's name means nothing on the hub
    record = json.loads((tmp_path / "out" / "sigmix_export.json").read_text())
    assert (record["base"]["name"], record["base"]["license"]) == ("base", found)


def test_what_a_user_wrote_stays_in_its_place(tmp_path, cache):
    folder = base_folder(tmp_path / "base: [x")
    bank = licensed(experts(targets=["q_proj"]), ("a\n---\nb: 1", "a\n---\nb: 1"))
    export_lora(LowRank.from_mix(BaseCheckpoint(folder), MIX, bank), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    data = ModelCard(text).data.to_dict()
    assert data["license_name"] == "a-----b-1"
    assert "b" not in data
    assert re.search(r"^---\n.*?\n---\n\n# LoRA of the mix", text, re.S)
    assert str(tmp_path) not in text
