"""Vision-language bases: loading, and that SVF adapts their language backbone alone."""

from __future__ import annotations

import json

import pytest
import transformers
from helpers_vision import saved, vlm
from peft import get_peft_model
from transformers.utils import is_torchvision_available

from sigmix import SVFConfig, load_base
from sigmix.errors import BaseModelError, ConfigError
from sigmix.models.multimodal import backbone, processor_of
from sigmix.svf.tuner import svf_layers

KINDS = ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl"]
TORCHVISION = pytest.mark.skipif(not is_torchvision_available(), reason="Qwen-VL's processor needs torchvision")
ROOT = "model.language_model."


@pytest.mark.parametrize(
    "kind, targets, each",
    [
        *((kind, "all-linear", 7) for kind in KINDS), ("llava", "attention", 4), ("qwen2_vl", "mlp", 3),
        ("llava_next", ["q_proj", "fc1"], 1), ("qwen2_5_vl", ["q_proj", "qkv"], 1), ("llava", "q_proj", 1),
        ("llava", r".*(q_proj|fc1|linear_1)", 1),
    ],
)  # fmt: skip
def test_shorthands_mean_the_language_backbone(kind, targets, each):
    model, _ = vlm(kind)
    layers = svf_layers(get_peft_model(model, SVFConfig(target_modules=targets)))
    assert len(layers) == 2 * each
    assert all(path.startswith(ROOT + "layers.") for path in layers)


def test_half_the_layers_are_the_backbones():
    model, _ = vlm("llava", num_hidden_layers=4)
    layers = svf_layers(get_peft_model(model, SVFConfig(layers_to_transform="half")))
    assert {path.split(".")[3] for path in layers} == {"0", "2"}


def test_a_full_path_outside_of_it_is_taken_at_its_word():
    model, _ = vlm("llava")
    paths = ["model.multi_modal_projector.linear_1", "v_proj"]
    layers = svf_layers(get_peft_model(model, SVFConfig(target_modules=paths)))
    assert sorted(layers) == [
        f"{ROOT}layers.0.self_attn.v_proj", f"{ROOT}layers.1.self_attn.v_proj", "model.multi_modal_projector.linear_1",
    ]  # fmt: skip


def test_a_target_that_only_the_vision_tower_has_is_an_error():
    with pytest.raises(ConfigError, match=r"\['fc1'\].*language backbone model\.language_model"):
        get_peft_model(vlm("llava")[0], SVFConfig(target_modules=["fc1"]))


def test_an_unidentified_backbone_needs_full_paths(monkeypatch):
    model, _ = vlm("llava")
    monkeypatch.setattr(model, "get_decoder", lambda: model)
    with pytest.raises(BaseModelError, match="cannot be told apart .* -> give target_modules as full module paths"):
        get_peft_model(model, SVFConfig())
    path = f"{ROOT}layers.0.mlp.up_proj"
    wrapped = get_peft_model(model, SVFConfig(target_modules=[path]))
    assert list(svf_layers(wrapped)) == [path]


def test_an_adapter_comes_back_from_its_folder(tmp_path):
    from peft import PeftModel

    get_peft_model(vlm("llava")[0], SVFConfig()).save_pretrained(tmp_path)
    again = svf_layers(PeftModel.from_pretrained(vlm("llava")[0], tmp_path))
    assert sorted(again) == sorted(svf_layers(get_peft_model(vlm("llava")[0], SVFConfig())))


@pytest.mark.parametrize("kind", ["llava", "llava_next", pytest.param("qwen2_vl", marks=TORCHVISION)])
def test_a_folder_loads_as_any_base_does(tmp_path, kind):
    model, tokenizer = load_base(saved(tmp_path / "tiny", kind), "float32")
    assert type(model) is type(vlm(kind)[0])
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.sigmix_base["name"] == str(tmp_path / "tiny")
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token is not None
    assert type(processor_of(tokenizer)) is type(vlm(kind)[1])
    assert backbone(model)[0] == ROOT[:-1]


def test_a_text_model_has_no_processor_and_no_backbone(model_folder):
    model, tokenizer = load_base(model_folder)
    assert processor_of(tokenizer) is None
    assert backbone(model) is None


def test_a_folder_without_its_processor_names_the_missing_file(tmp_path):
    folder = saved(tmp_path / "tiny")
    for file in folder.glob("*processor*"):
        file.unlink()
    with pytest.raises(BaseModelError, match=r"processor.* -> the folder needs preprocessor_config\.json"):
        load_base(folder)


def test_a_processor_that_needs_another_library_has_a_remedy(tmp_path, monkeypatch):
    folder = saved(tmp_path / "tiny")

    def missing(*_, **__):
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", missing)
    with pytest.raises(BaseModelError, match=r"Torchvision library -> pip install 'sigmix\[vision\]'"):
        load_base(folder)


def test_models_that_read_images_but_write_no_text_are_refused(tmp_path):
    config = {"model_type": "clip", "architectures": ["CLIPModel"], "vision_config": {"hidden_size": 8}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="model_type 'clip'"):
        load_base(tmp_path)
