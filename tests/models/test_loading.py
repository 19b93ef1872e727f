"""Bases from folders, .gguf files and the embedded default; what each mistake says."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
from helpers_gguf import write_gguf
from helpers_tiny import build_tiny, build_tokenizer
from transformers import BertConfig, BertForMaskedLM, T5Config

from sigmix.errors import BaseModelError, CacheError, OutputError
from sigmix.models import gguf
from sigmix.models import loading as models
from sigmix.models.loading import default_dtype, load_base


@pytest.fixture
def gguf_file(tmp_path):
    # 260 tokens: three special ones, all bytes, one merge
    return write_gguf(tmp_path / "tiny.gguf", build_tiny(vocab_size=260))


def logits(model):
    with torch.no_grad():
        return model(torch.arange(4, 20)[None]).logits


# --- folders


def test_a_folder_loads_frozen_in_eval_mode_and_records_its_source(model_folder):
    model, tokenizer = load_base(model_folder, dtype="float32")
    assert torch.equal(logits(model), logits(build_tiny()))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.sigmix_base == {"name": str(model_folder), "source": str(model_folder), "kind": "folder"}
    assert tokenizer.padding_side == "left"
    assert tokenizer.decode(tokenizer("2 + 2\nis 4?").input_ids) == "2 + 2\nis 4?"
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_token(model_folder):
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(model_folder)
    _, loaded = load_base(model_folder)
    assert loaded.pad_token == "<eos>"


def test_the_dtype_is_the_given_one_or_the_faster_one_of_the_device(model_folder):
    assert load_base(model_folder, dtype="bf16")[0].dtype == torch.bfloat16
    assert load_base(model_folder, dtype=torch.float32)[0].dtype == torch.float32
    assert load_base(model_folder)[0].dtype == default_dtype(load_base(model_folder)[0].device)
    with pytest.raises(BaseModelError, match="int3"):
        load_base(model_folder, dtype="int3")


@pytest.mark.parametrize(
    ("bf16", "fp32", "expected"),
    [(1.0, 4.0, torch.bfloat16), (2.0, 1.0, torch.float32), (0.9, 1.0, torch.float32)],
)
def test_the_default_dtype_is_the_faster_one_and_stays_what_it_was(monkeypatch, cache, bf16, fp32, expected):
    monkeypatch.setattr(models, "_seconds", {torch.bfloat16: bf16, torch.float32: fp32}.__getitem__)
    assert default_dtype("cpu") == expected
    monkeypatch.setattr(models, "_seconds", {torch.bfloat16: fp32, torch.float32: bf16}.__getitem__)
    assert default_dtype("cpu") == expected  # a busy moment does not change an expert's figures


@pytest.mark.parametrize("content", ["{", "[]", '{"other cpu": "bfloat16"}'])
def test_a_damaged_note_of_the_dtype_is_measured_again(monkeypatch, cache, content):
    monkeypatch.setattr(models, "_seconds", {torch.bfloat16: 1.0, torch.float32: 4.0}.__getitem__)
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "dtype.json").write_text(content)
    assert default_dtype("cpu") == torch.bfloat16


def test_a_folder_without_config_lists_its_files(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(BaseModelError, match=r"config\.json.*notes\.txt"):
        load_base(tmp_path)


def test_a_folder_without_safetensors_has_a_remedy(model_folder):
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match=r"model\.safetensors.*pytorch_model\.bin.*save_pretrained"):
        load_base(model_folder)


def test_a_missing_part_of_the_weights_is_named(model_folder):
    build_tiny().save_pretrained(model_folder, max_shard_size="100KB")
    (model_folder / "model.safetensors").unlink(missing_ok=True)
    parts = sorted(model_folder.glob("model-*.safetensors"))
    assert len(parts) > 1
    parts[1].unlink()
    with pytest.raises(BaseModelError, match=parts[1].name):
        load_base(model_folder)


def test_truncated_weights_are_an_error(model_folder):
    file = model_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match="tiny-llama"):
        load_base(model_folder)


@pytest.mark.parametrize("size", [0, 4, 200])
def test_a_file_of_weights_that_ends_early_is_named(model_folder, size):
    build_tiny().save_pretrained(model_folder, max_shard_size="100KB")
    (model_folder / "model.safetensors").unlink(missing_ok=True)
    file = sorted(model_folder.glob("model-*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(BaseModelError, match=f"{file.name}.* -> download"):
        load_base(model_folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_git_lfs_pointers_in_place_of_files_are_named(model_folder, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
    (model_folder / name).write_text(pointer)
    with pytest.raises(BaseModelError, match=f"git-lfs pointers in place of {name} -> .*lfs pull"):
        load_base(model_folder)


def test_missing_tensors_are_never_filled_with_random_numbers(model_folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(model_folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"model\.layers\.1\.mlp\.up_proj"):
        load_base(model_folder)


def test_a_config_that_is_not_json_is_named(model_folder):
    (model_folder / "config.json").write_text("{")
    with pytest.raises(BaseModelError, match=r"config\.json"):
        load_base(model_folder)


def test_a_missing_tokenizer_names_the_missing_files(model_folder):
    for file in model_folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(BaseModelError, match=r"tokenizer\.json"):
        load_base(model_folder)


@pytest.mark.parametrize("kind", ["bert", "t5", "vit"])
def test_models_of_other_kinds_are_refused_by_name(tmp_path, kind):
    if kind == "bert":
        small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
        BertForMaskedLM(BertConfig(vocab_size=50, **small)).save_pretrained(tmp_path)
    elif kind == "t5":
        T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path)
    else:
        config = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match=kind):
        load_base(tmp_path)


# --- names


def test_a_path_that_is_not_there_names_its_nearest_neighbour(model_folder):
    with pytest.raises(BaseModelError, match="tiny-llama"):
        load_base(model_folder.with_name("tiny-lama"))


def test_a_path_below_no_folder_names_the_folder(tmp_path):
    with pytest.raises(BaseModelError, match="nowhere"):
        load_base(tmp_path / "nowhere" / "model")


def test_a_file_that_is_not_gguf_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(BaseModelError, match=r"model\.bin"):
        load_base(tmp_path / "model.bin")


# --- .gguf files


def test_a_gguf_file_loads_as_its_model_and_only_the_first_time_converts(gguf_file, cache, monkeypatch, tmp_path):
    model, tokenizer = load_base(gguf_file, dtype="float32")
    expected = build_tiny(vocab_size=260)
    for parameter in expected.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters()))
    # the file holds the norms' epsilon in float32, so it comes back as 9.9999e-7
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.decode(tokenizer("Hi, 12 é").input_ids) == "Hi, 12 é"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<eos>", "<pad>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x<eos>"
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
    assert model.sigmix_base["name"] == str(gguf_file)

    monkeypatch.setattr(gguf, "_convert", lambda *_: pytest.fail("converted again"))
    again, _ = load_base(gguf_file, dtype="float32")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "saved")  # transformers refuses this for a model that is still a GGUF
    assert (tmp_path / "saved" / "model.safetensors").is_file()


def test_a_truncated_gguf_is_an_error_and_leaves_nothing(gguf_file, cache):
    gguf_file.write_bytes(gguf_file.read_bytes()[:-5000])
    with pytest.raises(BaseModelError, match=gguf_file.name):
        load_base(gguf_file)
    gguf_file.write_bytes(gguf_file.read_bytes()[:40])
    with pytest.raises(BaseModelError, match=gguf_file.name):
        load_base(gguf_file)
    assert [path for path in (cache / "models").iterdir() if path.suffix != ".lock"] == []


def test_a_file_that_only_calls_itself_gguf_is_an_error(tmp_path, cache):
    (tmp_path / "a.gguf").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(BaseModelError, match="a.gguf is no GGUF file"):
        load_base(tmp_path / "a.gguf")


def test_an_unsupported_gguf_architecture_names_the_nearest(tmp_path, cache):
    file = write_gguf(tmp_path / "odd.gguf", build_tiny(vocab_size=260), architecture="starcoder9")
    with pytest.raises(BaseModelError, match="starcoder9.*starcoder2"):
        load_base(file)


def test_damage_in_the_cache_is_found_and_the_file_named(gguf_file, cache):
    model, _ = load_base(gguf_file)
    before = logits(model)  # now: in bfloat16 the loaded weights are the file's own memory-mapped bytes
    file = cache / "models" / model.sigmix_base["source"].split("/")[-1] / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CacheError, match=r"model\.safetensors.* -> sigmix cache clear --kind models"):
        load_base(gguf_file)
    shutil.rmtree(cache / "models")
    assert torch.equal(logits(load_base(gguf_file)[0]), before)


def test_a_full_disk_while_converting_leaves_no_entry(gguf_file, cache, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "write_manifest", full)
        with pytest.raises(OutputError, match="disk is full"):
            load_base(gguf_file)
    assert [path for path in (cache / "models").iterdir() if path.suffix != ".lock"] == []
    load_base(gguf_file)


# --- the embedded default


@pytest.mark.real
def test_the_default_answers_a_question(smollm):
    model, tokenizer = smollm
    question = [{"role": "user", "content": "What is the capital of France?"}]
    encoded = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**encoded, max_new_tokens=12, do_sample=False)[0, encoded["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer, skip_special_tokens=True)
    assert answer[-1] == tokenizer.eos_token_id


@pytest.mark.real
def test_the_default_is_complete(smollm):
    model, tokenizer = smollm
    assert model.num_parameters() == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192
    assert tokenizer.convert_ids_to_tokens(tokenizer("17 + 25").input_ids) == ["1", "7", "Ġ+", "Ġ", "2", "5"]
    assert model.sigmix_base["name"] == "smollm2-135m"


@pytest.mark.real
def test_once_cached_the_default_loads_offline(smollm, monkeypatch):
    monkeypatch.setenv("SIGMIX_OFFLINE", "1")
    monkeypatch.setattr(models, "fetch_member", lambda *_: pytest.fail("fetched again"))
    model, _ = load_base()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), smollm[0].parameters()))
