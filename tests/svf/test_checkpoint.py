"""Checkpoints read tensor by tensor, and their decomposition: casting, names, memory, resuming, errors."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from helpers_tiny import ARCHITECTURES, build_tiny, build_tokenizer
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from sigmix.errors import BaseModelError, ConfigError, OutputError, UnknownNameError
from sigmix.experts.fingerprint import combined, fingerprint
from sigmix.models.loading import load_base
from sigmix.models.memory import model_plan
from sigmix.svf import checkpoint as checkpoint_module
from sigmix.svf import decomposition as decomposition_module
from sigmix.svf.checkpoint import Checkpoint, decompose_checkpoint
from sigmix.svf.config import SVFConfig
from sigmix.svf.tuner import svf_layers, target_layers
from sigmix.utils.safetensors import Shards

pytestmark = pytest.mark.usefixtures("cache")


def saved(folder, arch="llama", **changes):
    build_tiny(arch, **changes).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def counted(monkeypatch):
    """How often a matrix was decomposed, in a list of shapes."""
    shapes, real = [], decomposition_module.decompose

    def decompose(weight):
        shapes.append(tuple(weight.shape))
        return real(weight)

    monkeypatch.setattr(decomposition_module, "decompose", decompose)
    return shapes


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_is_left_to_decompose_when_the_base_is_loaded(arch, tmp_path, counted):
    folder = saved(tmp_path / "base", arch)
    checkpoint = Checkpoint(folder, "bfloat16")  # float32 on disk: the rounded weights are decomposed
    done = decompose_checkpoint(checkpoint)
    assert done.computed == len(checkpoint.matrices()) == len(counted) > 0
    counted.clear()
    model = get_peft_model(load_base(folder, "bfloat16")[0], SVFConfig())
    assert counted == []
    assert list(svf_layers(model)) == [matrix.path for matrix in checkpoint.matrices()]
    for path, layer in svf_layers(model).items():
        assert torch.equal(checkpoint.weight(path), layer.matrix())


def test_targets_and_layers_are_those_of_the_config(tmp_path):
    checkpoint = Checkpoint(saved(tmp_path / "base"))
    half = SVFConfig(target_modules="attention", layers_to_transform="half")
    paths = [matrix.path for matrix in checkpoint.matrices(half)]
    assert len(paths) == 4
    assert all(path.startswith("model.layers.0.self_attn.") for path in paths)
    with pytest.raises(UnknownNameError, match="nothing_proj"):
        checkpoint.matrices(SVFConfig(target_modules=["nothing_proj"], layers_to_transform=[0]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("attribute", ["_keep_in_fp32_modules_strict", "_keep_in_fp32_modules"])
def test_weights_that_transformers_keeps_in_float32(tmp_path, monkeypatch, attribute, dtype):
    """transformers searches for its patterns, which need not be whole parts of a name."""
    monkeypatch.setattr(LlamaForCausalLM, attribute, {"layers.*.input_lay", "down_pro", "0.self_attn.q_proj"})
    folder = saved(tmp_path / "base")
    checkpoint = Checkpoint(folder, dtype)
    model = load_base(folder, dtype)[0]
    for name, parameter in model.named_parameters():
        tensor = checkpoint.tensor(checkpoint.key(name))
        assert (tensor.dtype, checkpoint.dtype_of(checkpoint.key(name))) == (parameter.dtype, parameter.dtype), name
        assert torch.equal(tensor, parameter), name
    assert combined(checkpoint.digests()) == fingerprint(model)


def test_one_tensor_is_in_memory_at_a_time_however_many_there_are(tmp_path, monkeypatch):
    checkpoint = Checkpoint(saved(tmp_path / "base", num_hidden_layers=6), "float32")
    alive: list[weakref.ref] = []
    most = 0
    read = Shards.tensor

    def watched(self, name):
        nonlocal most
        found = read(self, name)
        alive.append(weakref.ref(found))
        most = max(most, sum(one() is not None for one in alive))
        return found

    monkeypatch.setattr(Shards, "tensor", watched)
    assert decompose_checkpoint(checkpoint).computed == 6 * 7
    assert len(alive) == 6 * 7
    assert most == 1


def test_a_pass_that_was_stopped_goes_on_and_reads_only_what_is_left(tmp_path, counted, monkeypatch, cache):
    folder = saved(tmp_path / "base")

    class Killed(BaseException):
        pass

    def kill(matrix, _):
        if len(counted) == 5:
            raise Killed

    with pytest.raises(Killed):
        decompose_checkpoint(Checkpoint(folder), progress=kill)
    assert len(counted) == 5
    names, read = [], Shards.tensor
    monkeypatch.setattr(Shards, "tensor", lambda self, name: names.append(name) or read(self, name))
    done = decompose_checkpoint(Checkpoint(folder))
    assert (done.computed, done.cached) == (9, 5)
    assert len(counted) == 14
    assert len(names) == 9
    # a kill in the middle of writing leaves nothing under a final name
    assert not [path for path in cache.rglob("*") if path.suffix == ".tmp"]


def test_a_failure_in_the_middle_of_writing_leaves_no_half_entry(tmp_path, monkeypatch, cache):
    folder = saved(tmp_path / "base")

    def full(_tensors, metadata):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(decomposition_module, "save", full)
        with pytest.raises(OutputError):
            decompose_checkpoint(Checkpoint(folder))
    assert not list(cache.rglob("*.safetensors"))
    assert decompose_checkpoint(Checkpoint(folder)).computed == 14


def test_what_was_removed_from_the_cache_is_made_again(tmp_path, counted, cache):
    folder = saved(tmp_path / "base")
    decompose_checkpoint(Checkpoint(folder))
    next(cache.rglob("*.safetensors")).unlink()
    counted.clear()
    assert decompose_checkpoint(Checkpoint(folder)).computed == len(counted) == 1
    (ledger,) = cache.rglob("ledgers/*.json")
    ledger.write_text("{broken")
    assert decompose_checkpoint(Checkpoint(folder)).computed == 0  # read again, and found


def test_another_checkpoint_in_the_same_folder_is_another_one(tmp_path, counted):
    folder = saved(tmp_path / "base")
    decompose_checkpoint(Checkpoint(folder))
    counted.clear()
    build_tiny(seed=5).save_pretrained(folder)
    assert decompose_checkpoint(Checkpoint(folder)).computed == len(counted) == 14


def test_a_disk_that_is_too_small_is_refused_before_any_work(tmp_path, counted, monkeypatch):
    checkpoint = Checkpoint(saved(tmp_path / "base"))
    monkeypatch.setattr(checkpoint_module, "free_bytes", lambda _: 100_000)
    with pytest.raises(OutputError, match=r"14 of 14.*SIGMIX_CACHE"):
        decompose_checkpoint(checkpoint)
    assert counted == []


def test_a_full_disk_is_enough_where_nothing_is_missing(tmp_path, counted, monkeypatch, cache):
    folder = saved(tmp_path / "base")
    get_peft_model(load_base(folder, "float32")[0], SVFConfig())  # fills the cache, and leaves no ledger
    counted.clear()
    monkeypatch.setattr(checkpoint_module, "free_bytes", lambda _: 0)
    done = decompose_checkpoint(Checkpoint(folder, "float32"))
    assert (done.computed, done.cached, counted) == (0, 14, [])
    for path in sorted(cache.rglob("*.safetensors"))[:2]:
        path.unlink()
    for path in cache.rglob("ledgers/*.json"):
        path.unlink()
    with pytest.raises(OutputError, match="2 of 14"):
        decompose_checkpoint(Checkpoint(folder, "float32"))


def test_a_device_that_is_full_has_a_remedy(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    checkpoint = Checkpoint(saved(tmp_path / "base"))
    monkeypatch.setattr(checkpoint_module, "cached_decompose", full)
    with pytest.raises(ConfigError, match=r"model\.layers\.0.*9 GiB.*--device cpu"):
        decompose_checkpoint(checkpoint)


def test_the_plan_of_the_disk_is_what_is_written(tmp_path, cache):
    folder = saved(tmp_path / "base", hidden_size=128, intermediate_size=256)
    checkpoint = Checkpoint(folder, "float32")
    done = decompose_checkpoint(checkpoint)
    files = sum(path.stat().st_size for path in cache.rglob("*.safetensors"))
    assert done.bytes == files
    model = build_tiny(hidden_size=128, intermediate_size=256)
    planned = model_plan(model, target_layers(model))["disk_bytes"]
    assert abs(planned - files) <= 40 * len(checkpoint.matrices())  # of about 800,000


def renamed(folder, names):
    """Rewrite the checkpoint with other names; None drops a tensor."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({new: t for name, t in tensors.items() if (new := names(name)) is not None}, file, {"format": "pt"})


def test_names_that_transformers_renames_on_loading_are_followed(tmp_path, counted):
    folder = saved(tmp_path / "base")
    renamed(folder, lambda name: name.removeprefix("model."))  # as a checkpoint of the model without its head
    decompose_checkpoint(Checkpoint(folder, "float32"))
    counted.clear()
    get_peft_model(load_base(folder, "float32")[0], SVFConfig())
    assert counted == []


def test_checkpoints_that_cannot_be_read(tmp_path):
    folder, name = saved(tmp_path / "base"), "model.layers.1.mlp.up_proj.weight"
    renamed(folder, lambda other: None if other == name else other)
    with pytest.raises(BaseModelError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        Checkpoint(folder).matrices()
    tensors = load_file(folder / "model.safetensors")
    for wrong, reason in ((torch.zeros(96, 64, dtype=torch.int8), "I8"), (torch.zeros(64, 64), r"\[64, 64\]")):
        save_file({**tensors, name: wrong}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(BaseModelError, match=reason):
            Checkpoint(folder).matrices()
    (folder / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(BaseModelError, match="config"):
        Checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(BaseModelError, match=r"config\.json"):
        Checkpoint(folder)


def test_a_weight_with_nan_is_a_clear_error_and_nothing_is_written_for_it(tmp_path, cache):
    folder = saved(tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="NaN"):
        decompose_checkpoint(Checkpoint(folder))
    assert not list(cache.rglob("*.safetensors"))
