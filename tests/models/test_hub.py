"""Bases from the hub, which is replaced by a stand-in: what each of its refusals says."""

from __future__ import annotations

import errno
import json
import traceback
from unittest.mock import Mock

import huggingface_hub
import pytest
from helpers_tiny import build_tiny
from huggingface_hub import errors as hub_errors

from sigmix.cli.doctor import read_config
from sigmix.errors import BaseModelError
from sigmix.models import hub
from sigmix.models.loading import load_base

pytest_plugins = ["helpers_hub"]


@pytest.fixture
def fake_hub(request):
    return request.getfixturevalue("hub")  # whose name is the module's here


def hub_answers(monkeypatch, error):
    def answer(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)


def refused(kind, status):
    # a stand-in: the class of real responses depends on the version of huggingface_hub
    return kind("refused", response=Mock(status_code=status, headers={}))


def test_a_gated_model_names_the_page_and_the_login(monkeypatch):
    hub_answers(monkeypatch, refused(hub_errors.GatedRepoError, 403))
    with pytest.raises(BaseModelError, match="-> .*//huggingface.co/org/model, then run: hf auth login"):
        load_base("org/model")


def test_a_model_that_the_hub_does_not_have(monkeypatch, model_folder):
    hub_answers(monkeypatch, refused(hub_errors.RepositoryNotFoundError, 404))
    monkeypatch.chdir(model_folder.parent)
    with pytest.raises(BaseModelError, match="'tiny-lama'.*nearest: tiny-llama"):
        load_base("tiny-lama")
    with pytest.raises(BaseModelError, match="did you mean 'smollm2-135m'"):
        load_base("smollm-135m")


def test_a_revision_that_the_hub_does_not_have(monkeypatch):
    hub_answers(monkeypatch, refused(hub_errors.RevisionNotFoundError, 404))
    with pytest.raises(BaseModelError, match="'org/model'.* -> .*org/model/commits"):
        load_base("org/model", revision="v9")


def test_no_network_is_named(monkeypatch):
    hub_answers(monkeypatch, hub_errors.LocalEntryNotFoundError("no connection"))
    monkeypatch.setattr(hub, "offline", lambda: False)
    with pytest.raises(BaseModelError, match="'org/model'.* -> check the network"):
        load_base("org/model")


def test_offline_mode_needs_no_network(monkeypatch, tmp_path):
    arguments = {}

    def answer(*_, **options):
        arguments.update(options)
        raise hub_errors.LocalEntryNotFoundError("not cached")

    monkeypatch.setenv("SIGMIX_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    with pytest.raises(BaseModelError, match="'org/model'.* -> unset SIGMIX_OFFLINE"):
        load_base("org/model")
    assert arguments["local_files_only"] is True


@pytest.mark.parametrize("lost", ["model.safetensors", "config.json", "tokenizer"])
@pytest.mark.parametrize("why", ["offline", "incomplete"])
def test_a_download_that_broke_off_is_named_with_what_it_lacks(monkeypatch, model_folder, tmp_path, lost, why):
    for file in model_folder.glob(f"{lost}*"):
        file.unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(model_folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    if why == "offline":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    else:  # the hub could not be reached, and the cache answered
        monkeypatch.setattr(hub, "offline", lambda: False)
        (tmp_path / "hub" / "models--org--model" / "blobs").mkdir(parents=True)
        (tmp_path / "hub" / "models--org--model" / "blobs" / "deadbeef.incomplete").touch()
    message = rf"org/model is in the hub's cache only in part.*{lost}.* -> run it again online.*hf download org/model"
    with pytest.raises(BaseModelError, match=f"{message} --revision v1"):
        load_base("org/model", revision="v1")


def test_shards_that_a_broken_download_lacks_are_named(monkeypatch, model_folder):
    build_tiny().save_pretrained(model_folder, max_shard_size="100KB")
    (model_folder / "model.safetensors").unlink(missing_ok=True)
    shard = sorted(model_folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    shard.symlink_to("../blobs/gone")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(model_folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BaseModelError, match=f"only in part.* lacks {shard.name} -> run it again online"):
        load_base("org/model")


def test_a_repository_without_safetensors_is_not_taken_for_a_broken_download(monkeypatch, model_folder):
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(model_folder))
    monkeypatch.setattr(hub, "offline", lambda: False)
    with pytest.raises(BaseModelError, match=r"pytorch_model\.bin.* -> convert it"):
        load_base("org/model")


def test_a_full_disk_under_the_hubs_cache_is_named(monkeypatch):
    hub_answers(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(BaseModelError, match="'org/model'.*No space left on device.* -> .*HF_HOME"):
        load_base("org/model")


def test_a_cache_that_cannot_be_written_is_named(monkeypatch):
    hub_answers(monkeypatch, PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(BaseModelError, match="'org/model'.*Permission denied.* -> .*HF_HOME"):
        load_base("org/model")


def test_a_hub_model_loads_from_its_snapshot(monkeypatch, model_folder):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(model_folder))
    model, _ = load_base("org/model")
    assert model.sigmix_base == {"name": "org/model", "source": str(model_folder), "kind": "hub"}


def test_only_what_transformers_loads_is_fetched(fake_hub):
    weights = {f"model-0000{n}-of-00002.safetensors": b"w" for n in (1, 2)}
    wanted = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors.index.json": b"{}", **weights}
    wanted |= {"tokenizer.model": b"t", "preprocessor_config.json": b"{}", "chat_template.jinja": b"c"}
    again = {"consolidated.safetensors": b"w", "consolidated-00001-of-00002.safetensors": b"w", "model.fp16.bin": b"w"}
    folders = {"original/model.safetensors": b"w", "onnx/config.json": b"", "a/model-00001-of-00002.safetensors": b"w"}
    fake_hub.add("org/mistral", {**wanted, **again, **folders})
    fake_hub.add("org/small", {"config.json": b"{}", "model.safetensors": b"w"})
    fake_hub.add("org/other", {"config.json": b"{}", "model.safetensors-00001-of-00002.safetensors": b"w"})
    folder = hub.hub_folder("org/mistral", None)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == set(wanted)
    assert (hub.hub_folder("org/small", None) / "model.safetensors").is_file()
    assert (hub.hub_folder("org/other", None) / "model.safetensors-00001-of-00002.safetensors").is_file()


def test_an_unsupported_architecture_is_refused_before_its_weights_are_fetched(fake_hub):
    config = json.dumps({"model_type": "rwkv", "architectures": ["RwkvForCausalLM"]}).encode()
    fake_hub.add("org/rwkv", {"config.json": config, "model.safetensors": b"w"})
    for _ in range(2):
        with pytest.raises(BaseModelError, match="rwkv"):
            load_base("org/rwkv")
    assert not [path for _, path, _ in fake_hub.requests if "safetensors" in path]


@pytest.mark.parametrize("kind", [RuntimeError, hub_errors.HFValidationError])
def test_an_error_that_has_the_token_in_it_is_shown_without(monkeypatch, kind):
    token = "hf_aTokenThatNobodyMaySee"
    monkeypatch.setenv("HF_TOKEN", token)
    hub_answers(monkeypatch, kind(f"a proxy said: Bearer {token}"))
    with pytest.raises(BaseModelError) as caught:
        load_base("org/model")
    shown = "".join(traceback.format_exception(caught.value))
    assert token not in shown
    assert "Bearer <token>" in shown
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", Mock(side_effect=kind(f"Bearer {token}")))
    with pytest.raises(BaseModelError, match="<token>") as caught:
        read_config("org/model")
    assert token not in "".join(traceback.format_exception(caught.value))


def test_an_error_of_no_ones_making_is_left_as_it_is(monkeypatch):
    hub_answers(monkeypatch, ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        load_base("org/model")
