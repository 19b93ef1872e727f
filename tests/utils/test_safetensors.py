import json

import pytest
import torch
from safetensors.torch import save_file

from sigmix.errors import BaseModelError, UnknownNameError
from sigmix.utils.safetensors import Shards


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(5, 3, generator=generator).bfloat16() for name in ("a.weight", "b.weight", "c.weight")}


def sharded(folder, tensors):
    placed = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        file = f"model-{number}.safetensors"
        save_file({name: tensor}, folder / file)
        placed[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return placed


def test_one_file_and_many_give_the_same_tensors(tmp_path, tensors):
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir(), many.mkdir()
    save_file(tensors, one / "model.safetensors")
    sharded(many, tensors)
    for shards in (Shards(one), Shards(many)):
        assert sorted(shards) == sorted(tensors)
        assert shards.bytes == 3 * 5 * 3 * 2
        for name, tensor in tensors.items():
            assert torch.equal(shards.tensor(name), tensor)
            assert shards.entry(name).shape == (5, 3)
            assert shards.entry(name).dtype == "BF16"
    assert len(Shards(one).files) == 1
    assert len(Shards(many).files) == 3


def test_a_tensor_outlives_its_file(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    read = Shards(tmp_path).tensor("a.weight")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert torch.equal(read, tensors["a.weight"])


def test_damage_is_named(tmp_path, tensors):
    with pytest.raises(BaseModelError, match=r"model.safetensors.index.json"):
        Shards(tmp_path)
    placed = sharded(tmp_path, tensors)
    with pytest.raises(UnknownNameError, match="c.weigh"):
        Shards(tmp_path).tensor("c.weigh")
    shards = Shards(tmp_path)
    shard = tmp_path / placed["b.weight"]
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(BaseModelError, match="model-1"):
        shards.tensor("b.weight")
    with pytest.raises(BaseModelError, match="model-1"):
        Shards(tmp_path)
    shard.unlink()
    with pytest.raises(BaseModelError, match="model-1"):
        Shards(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../x.safetensors"}}', "{}"])
def test_an_index_without_a_weight_map(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BaseModelError, match=r"index\.json"):
        Shards(tmp_path)


def test_an_index_that_is_wrong(tmp_path, tensors):
    placed = sharded(tmp_path, tensors)
    placed["a.weight"] = placed["b.weight"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(BaseModelError, match=r"a\.weight"):
        Shards(tmp_path)
