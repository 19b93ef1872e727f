"""Every way in which an expert's directory can be wrong has its own message."""

from __future__ import annotations

import json

import pytest
import torch
from helpers_experts import adapted, at, random_expert
from helpers_tiny import build_tiny
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from sigmix.errors import ExpertError, FingerprintError
from sigmix.experts.expert import Expert, seal
from sigmix.experts.serialization import dump

pytestmark = pytest.mark.usefixtures("cache")
PATH = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{PATH}.svf_z.weight"


@pytest.fixture
def folder(tiny_llama, tmp_path):
    return random_expert(tiny_llama).save_pretrained(tmp_path / "bank" / "arithmetic")


@pytest.fixture
def plain(tmp_path):
    """As PEFT saves it, without a checksum."""
    adapted(build_tiny()).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def edit_z(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_json(file, **changes):
    value = json.loads(file.read_text())
    for key, change in changes.items():
        value.pop(key) if change is None else value.update({key: change})
    file.write_text(json.dumps(value))


def refused(folder, match, base=None):
    with pytest.raises(ExpertError, match=match) as caught:
        Expert.from_pretrained(folder, base=base)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value) or base is not None


def test_no_such_folder(folder):
    missing = folder.with_name("aritmetic")
    refused(missing, "aritmetic; nearest: .*arithmetic")
    refused(missing / "a", "the folder .*aritmetic does not exist")


def test_a_file_is_no_folder(folder):
    refused(folder / "README.md", "file")


def test_missing_files(folder):
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, r"adapter_model\.safetensors; it holds README\.md, adapter_config\.json, sigmix\.json")
    (folder / "adapter_config.json").unlink()
    refused(folder, r"adapter_config\.json; it holds README\.md, sigmix\.json")


def test_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"adapter_config\.json; it is empty")


@pytest.mark.parametrize("keep", [0, 4, 100, -1000])
def test_truncated_weights(folder, keep):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, "truncated or damaged")


def test_edited_weights(folder):
    def change(tensors):
        tensors[KEY][3] += 1e-3

    edit_z(folder, change)
    refused(folder, r"adapter_model\.safetensors.*checksum.*sigmix\.json")


def test_one_flipped_bit(folder):
    file = folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-50] ^= 1
    file.write_bytes(data)
    refused(folder, "checksum")


def test_pickles_are_refused_and_not_opened(plain):
    (plain / "adapter_model.safetensors").unlink()
    (plain / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    refused(plain, r"adapter_model\.bin but no adapter_model\.safetensors.* -> .*safe_serialization=True")


def test_a_pickle_beside_safetensors_is_ignored(plain):
    (plain / "training_args.bin").write_bytes(b"junk")
    assert Expert.from_pretrained(plain).z


@pytest.mark.parametrize(
    "value,says",
    [
        (float("nan"), "1 NaN or infinite"),
        (float("-inf"), "1 NaN or infinite"),
        (-0.5, r"negative in 1 .*lowest -0\.5"),
    ],
)
def test_values_that_no_expert_can_have(plain, value, says):
    def change(tensors):
        tensors[KEY][3] = value

    edit_z(plain, change)
    refused(plain, f"adapter_model.safetensors: z of {PATH} .*{says}")


def test_integers_are_refused_and_half_precision_is_converted(plain):
    edit_z(plain, lambda tensors: tensors.update({KEY: tensors[KEY].half()}))
    assert Expert.from_pretrained(plain).z[PATH].dtype == torch.float32
    edit_z(plain, lambda tensors: tensors.update({KEY: tensors[KEY].to(torch.int32)}))
    refused(plain, f"{PATH}.*int32")


def test_a_wrong_length(folder, plain):
    edit_z(folder, lambda tensors: tensors.update({KEY: torch.ones(63)}))
    refused(folder, f"{PATH}.*63.*64×64")
    edit_z(plain, lambda tensors: tensors.update({KEY: torch.ones(63)}))
    refused(plain, f"{PATH}.*63.*64×64", base=build_tiny())


def test_a_matrix_that_the_base_lacks(plain):
    edit_z(plain, lambda tensors: tensors.update({KEY.replace("q_proj", "qq_proj"): tensors.pop(KEY)}))
    refused(plain, r"unknown matrix 'model\.layers\.0\.self_attn\.qq_proj'; nearest: .*q_proj", base=build_tiny())


def test_a_matrix_that_sigmix_json_lacks(folder):
    edit_z(folder, lambda tensors: tensors.pop(KEY))
    refused(folder, f"'matrices'.*{PATH}")


def test_other_tensors_than_z(plain):
    edit_z(plain, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(2, 2)}))
    refused(plain, r"base_model\.model\.lm_head\.weight")


def test_another_kind_of_adapter(tmp_path):
    get_peft_model(build_tiny(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    refused(tmp_path / "lora", "LORA")


@pytest.mark.parametrize("file", ["adapter_config.json", "sigmix.json"])
def test_invalid_json_names_file_and_place(folder, file):
    (folder / file).write_text('{\n  "peft_type": "SVF",\n  "name" 3\n}')
    refused(folder, rf"{file} cannot be read as JSON: .* line 3 column 10")
    (folder / file).write_text("[]")
    refused(folder, f"{file} cannot be read as JSON: it holds a list")
    (folder / file).write_bytes(b"\xff\xfe{}")
    refused(folder, f"{file} cannot be read")


def test_schema_versions(folder):
    file = folder / "sigmix.json"
    edit_json(file, schema=2)
    refused(folder, "schema 2.* -> .*upgrade")
    for bad in (None, "1", 0, True):
        edit_json(file, schema=bad)
        refused(folder, "'schema'")


@pytest.mark.parametrize("key", ["name", "z_sha256"])
def test_keys_that_must_be_there(folder, key):
    edit_json(folder / "sigmix.json", **{key: None})
    refused(folder, f"no '{key}'")


@pytest.mark.parametrize("odd", ["promt", "ALL", "", 1, True, ["prompt"], {"prompt": True}])
@pytest.mark.parametrize("file", ["adapter_config.json", "sigmix.json"])
def test_odd_positions_name_file_and_value(folder, plain, file, odd):
    edit_json(folder / file, positions=odd)
    refused(folder, "'positions' must be 'all' or 'prompt', not ")
    if file == "adapter_config.json":
        edit_json(plain / file, positions=odd)
        refused(plain, "'positions' must be 'all' or 'prompt', not ")


def test_files_that_disagree_on_the_positions(tiny_llama, tmp_path, folder):
    edit_json(folder / "adapter_config.json", positions="prompt")
    refused(folder, r"'prompt' in adapter_config\.json, but 'all' in sigmix\.json")
    sealed = at("prompt", random_expert(tiny_llama)).save_pretrained(tmp_path / "prompts")
    edit_json(sealed / "adapter_config.json", positions=None)
    refused(sealed, r"'all' in adapter_config\.json, but 'prompt' in sigmix\.json")
    edit_json(sealed / "sigmix.json", positions=None)  # both changed: the checksum holds the positions too
    refused(sealed, "checksum")


def test_positions_survive_and_are_part_of_the_digest(tiny_llama, tmp_path, folder, plain):
    everywhere = Expert.from_pretrained(folder)
    edit_json(folder / "adapter_config.json", positions=None)  # as folders were written before there were positions
    edit_json(folder / "sigmix.json", positions=None)
    assert Expert.from_pretrained(folder).digest == everywhere.digest
    assert Expert.from_pretrained(folder).positions == "all"
    prompts = at("prompt", everywhere)
    assert prompts.digest != everywhere.digest
    assert Expert.from_pretrained(prompts.save_pretrained(tmp_path / "prompts")) == prompts
    edit_json(plain / "adapter_config.json", positions="prompt")
    assert Expert.from_pretrained(plain).positions == "prompt"
    assert seal(plain, build_tiny()).positions == "prompt"
    assert Expert.from_pretrained(plain, base=build_tiny()).positions == "prompt"


def test_a_name_that_leads_elsewhere(folder):
    edit_json(folder / "sigmix.json", name="../../etc")
    with pytest.raises(ExpertError, match="etc"):
        Expert.from_pretrained(folder)


def test_a_damaged_sketch(folder):
    value = json.loads((folder / "sigmix.json").read_text())
    value["sketches"][PATH]["values"] = [1.0]
    edit_json(folder / "sigmix.json", sketches=value["sketches"])
    refused(folder, PATH)


def test_a_false_sketch_is_found_on_the_base(folder):
    value = json.loads((folder / "sigmix.json").read_text())
    value["sketches"][PATH]["values"][0] += value["sketches"][PATH]["norm"]
    edit_json(folder / "sigmix.json", sketches=value["sketches"])
    with pytest.raises(ExpertError, match=PATH):
        Expert.from_pretrained(folder, base=build_tiny())


def test_another_base(folder):
    with pytest.raises(FingerprintError, match="'arithmetic'"):
        Expert.from_pretrained(folder, base=build_tiny(seed=1))


def test_unknown_keys_of_the_same_schema_are_kept(folder, tmp_path):
    edit_json(folder / "sigmix.json", colour="blue")
    expert = Expert.from_pretrained(folder)
    assert expert.meta["colour"] == "blue"
    assert Expert.from_pretrained(expert.save_pretrained(tmp_path / "again")) == expert


def test_dumped_numbers_stand_on_one_line_and_text_stays_as_it_is():
    value = {"a": [1, -2.5e-07], "b": "[\n 1,\n 2\n]", "c": [[1, 2], [3]], "d": ["x"], "e": []}
    text = dump(value)
    assert json.loads(text) == value
    assert '"a": [1, -2.5e-07]' in text
