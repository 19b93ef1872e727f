"""A merged checkpoint is what the engine's merged form computes with, and plain transformers loads it."""

from __future__ import annotations

import contextlib
import json
import weakref

import pytest
import torch
from helpers_engine import expert
from helpers_export import base_folder, experts, ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sigmix.engine import Engine
from sigmix.engine.execution import merged_weights
from sigmix.errors import BaseModelError, ExpertError, FingerprintError, OutputError, SigmixError
from sigmix.experts.expert import Expert
from sigmix.experts.fingerprint import fingerprint
from sigmix.experts.metadata import thaw
from sigmix.experts.mix import Mix
from sigmix.export.base import BaseCheckpoint
from sigmix.export.gguf import export_gguf
from sigmix.export.lora import export_lora
from sigmix.export.low_rank import LowRank
from sigmix.export.merged import export_merged
from sigmix.export.verify import Reference, check_figures, verify_merged
from sigmix.models.loading import load_base
from sigmix.utils.safetensors import Shards, TensorSpec, write_file

MIX = Mix.parse("math:0.7+word:-0.4")


def engine_of(folder, bank, dtype="float32"):
    return Engine(*load_base(folder, dtype), bank, keep_packed=0)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "gpt2", "mixtral"])
def test_plain_transformers_gives_the_engines_logits_bit_for_bit(tmp_path, cache, arch):
    folder, bank = base_folder(tmp_path / "base", arch), experts(arch)
    out = tmp_path / "out"
    export_merged(BaseCheckpoint(folder), MIX, bank, out)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    row = torch.tensor([ids()])
    engine = engine_of(folder, bank)
    with torch.no_grad():
        theirs = loaded(input_ids=row, use_cache=False).logits
    assert torch.equal(theirs, engine.logits(row, mix=MIX, form="merged"))
    assert not torch.allclose(theirs, engine.logits(row, mix=Mix.base()), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_the_merged_form_and_the_rest_is_untouched(tmp_path, cache, dtype):
    folder, bank = base_folder(tmp_path / "base", dtype=dtype), experts(dtype=dtype)
    out = tmp_path / "out"
    figures = export_merged(BaseCheckpoint(folder), MIX, bank, out)
    engine = engine_of(folder, bank, str(dtype).removeprefix("torch."))
    composed = merged_weights(engine.layers, engine.z(MIX))
    before, after = Shards(folder), Shards(out)
    assert sorted(before) == sorted(after)
    for name in before:
        path = name.removesuffix(".weight")
        assert torch.equal(after.tensor(name), composed.get(path, before.tensor(name))), name
        assert after.entry(name).dtype == before.entry(name).dtype
        assert (path in composed) == (not torch.equal(after.tensor(name), before.tensor(name)))
    assert figures["changed"] == len(composed) == 14
    assert figures["dtype"] == str(dtype).removeprefix("torch.")


def test_shards_tokenizer_configs_and_card(tmp_path, cache):
    folder, bank = base_folder(tmp_path / "base"), experts()
    (folder / "LICENSE").write_text("free")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    one, many = tmp_path / "one", tmp_path / "many"
    export_merged(BaseCheckpoint(folder), MIX, bank, one)
    figures = export_merged(BaseCheckpoint(folder), MIX, bank, many, shard_bytes=70_000)
    assert len(figures["files"]) > 2
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == figures["files"]
    assert index["metadata"]["total_size"] == figures["bytes"] == Shards(many).bytes
    for file in figures["files"]:
        with safe_open(many / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            held = [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118
        assert sum(tensor.nbytes for tensor in held) <= 70_000 or len(held) == 1
    whole = load_file(one / "model.safetensors")
    assert all(torch.equal(Shards(many).tensor(name), whole[name]) for name in whole)
    assert AutoTokenizer.from_pretrained(many).encode("abc") == AutoTokenizer.from_pretrained(folder).encode("abc")
    for name in ("config.json", "generation_config.json", "LICENSE"):
        assert (many / name).read_bytes() == (folder / name).read_bytes()
    assert not (many / "pytorch_model.bin").exists()
    card = (many / "README.md").read_text()
    for fact in ("`base`", MIX.id, bank["math"].digest[:12], "library_name: transformers"):
        assert fact in card
    assert str(tmp_path) not in card
    record = json.loads((many / "sigmix_export.json").read_text())
    assert record["weights"] == {"math": 0.7, "word": -0.4}
    assert record["base"]["fingerprint"] == bank["math"].meta["base"]["fingerprint"]


def test_another_dtype_is_what_loading_in_it_gives(tmp_path, cache):
    folder = base_folder(tmp_path / "base")
    bank = {name: expert(load_base(folder, "bfloat16")[0], name, seed) for seed, name in enumerate(("math", "word"))}
    with pytest.raises(FingerprintError, match="--dtype bfloat16"):
        export_merged(BaseCheckpoint(folder), MIX, bank, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    out = tmp_path / "out"
    source = BaseCheckpoint(folder)
    assert source.adopt_dtype(bank.values()) == "bfloat16"
    assert source.adopt_dtype(bank.values()) is None
    assert source.fingerprint() == BaseCheckpoint(folder, "bfloat16").fingerprint()
    assert source.fingerprint() != BaseCheckpoint(folder).fingerprint()
    export_merged(source, MIX, bank, out)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    assert loaded.dtype == torch.bfloat16
    row = torch.tensor([ids()])
    with torch.no_grad():
        theirs = loaded(input_ids=row, use_cache=False).logits
    assert torch.equal(theirs, engine_of(folder, bank, "bfloat16").logits(row, mix=MIX, form="merged"))


def test_what_is_stored_in_half_precision_is_read_so(tmp_path, cache):
    folder = base_folder(tmp_path / "base", dtype=torch.bfloat16)
    bank = {"math": expert(load_base(folder, "float32")[0], "math", 1)}  # made on the exact upcast
    source = BaseCheckpoint(folder)
    assert source.adopt_dtype(bank.values()) is None
    export_merged(source, Mix.one("math"), bank, tmp_path / "out")
    assert {Shards(tmp_path / "out").entry(name).dtype for name in Shards(tmp_path / "out")} == {"BF16"}


def test_the_fingerprint_is_the_loaded_models(tmp_path, cache):
    for arch in ("llama", "gpt2", "mixtral"):
        folder = base_folder(tmp_path / arch, arch)
        assert BaseCheckpoint(folder).fingerprint() == fingerprint(load_base(folder, "float32")[0])


def test_a_checkpoint_without_the_models_prefix(tmp_path, cache):
    folder, bank = base_folder(tmp_path / "base", "gpt2"), experts("gpt2")
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    assert bare.keys() != tensors.keys()
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    export_merged(BaseCheckpoint(folder), MIX, bank, out)
    assert sorted(Shards(out)) == sorted(bare)
    ours = Reference(BaseCheckpoint(folder), MIX, bank)
    assert verify_merged(out, ours)["max"] == 0
    assert verify_merged(out, ours)["effect_kl"] > 1e-3


def test_a_matrix_under_an_unknown_name_is_named(tmp_path, cache):
    folder, bank = base_folder(tmp_path / "base"), experts()
    tensors = load_file(folder / "model.safetensors")
    tensors["elsewhere"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    bank = {name: Expert(one.name, one.z, {}) for name, one in bank.items()}  # no fingerprint to stumble over first
    with pytest.raises(BaseModelError, match=r"layers\.1\.mlp\.up_proj"):
        export_merged(BaseCheckpoint(folder), MIX, bank, tmp_path / "out")
    assert list(tmp_path.glob("*out*")) == []


def test_experts_are_held_to_their_base(tmp_path, cache):
    folder, bank = base_folder(tmp_path / "base", seed=1), experts()
    with pytest.raises(FingerprintError, match="math"):
        export_merged(BaseCheckpoint(folder), MIX, bank, tmp_path / "out")
    folder = base_folder(tmp_path / "right")
    meta = thaw(bank["math"].meta)
    first = next(iter(meta["sketches"]))
    meta["sketches"][first]["values"] = [1 + value for value in meta["sketches"][first]["values"]]
    forged = {**bank, "math": Expert("math", bank["math"].z, meta)}
    with pytest.raises(ExpertError, match="math"):
        export_merged(BaseCheckpoint(folder), MIX, forged, tmp_path / "out")
    small = {**bank, "math": Expert("math", {first: torch.ones(3)}, {})}
    with pytest.raises(ExpertError, match="3 components"):
        export_merged(BaseCheckpoint(folder), MIX, small, tmp_path / "out")
    other = {**bank, "math": Expert("math", {"model.layers.9.mlp.up_proj": torch.ones(3)}, {})}
    with pytest.raises(ExpertError, match=r"layers\.9"):
        export_merged(BaseCheckpoint(folder), MIX, other, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_tied_matrix_and_a_quantised_base_are_refused(tmp_path, cache):
    folder = base_folder(tmp_path / "base")
    tied = {"math": Expert("math", {"lm_head": torch.full((64,), 1.5)}, {})}
    with pytest.raises(ExpertError, match="lm_head"):
        export_merged(BaseCheckpoint(folder), Mix.one("math"), tied, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="quantization_config"):
        BaseCheckpoint(folder)


def test_nothing_is_replaced_and_bad_names_are_refused(tmp_path, cache):
    folder, bank = base_folder(tmp_path / "base"), experts()
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    with pytest.raises(OutputError, match="out"):
        export_merged(BaseCheckpoint(folder), MIX, bank, out)
    assert (out / "mine").read_text() == "keep"
    with pytest.raises(BaseModelError, match="float7"):
        BaseCheckpoint(folder, "float7")


@pytest.mark.parametrize("kind", ["merged", "lora", "gguf"])
def test_what_came_to_the_place_meanwhile_is_kept(tmp_path, cache, kind):
    folder, bank = base_folder(tmp_path / "base"), experts(targets=["q_proj"])
    out = tmp_path / ("out.gguf" if kind == "gguf" else "out")
    mine = out if kind == "gguf" else out / "mine"

    def meanwhile():
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("keep")

    with pytest.raises(OutputError):
        if kind == "merged":
            export_merged(BaseCheckpoint(folder), MIX, bank, out, progress=meanwhile)
        elif kind == "lora":
            export_lora(LowRank.from_mix(BaseCheckpoint(folder), MIX, bank), out, progress=meanwhile)
        else:
            export_gguf(LowRank.from_mix(BaseCheckpoint(folder), MIX, bank), out, progress=meanwhile)
    assert mine.read_text() == "keep"
    assert not list(tmp_path.glob(".*"))


def test_the_check_sees_other_weights_and_another_tokenizer(tmp_path, cache):
    folder, bank = base_folder(tmp_path / "base"), experts()
    out = tmp_path / "out"
    source = BaseCheckpoint(folder)
    export_merged(source, MIX, bank, out)
    ours = Reference(source, MIX, bank)
    check_figures(verify_merged(out, ours), exact=True)
    weights = out / "model.safetensors"
    written = weights.read_bytes()
    save_file(load_file(folder / "model.safetensors"), weights, metadata={"format": "pt"})  # nothing merged
    found = verify_merged(out, ours)
    with pytest.raises(SigmixError, match=f"{found['kl']:.2g}") as caught:
        check_figures(found, exact=True)
    assert caught.value.exit_code == 1
    check_figures(found, exact=False)
    weights.write_bytes(written)
    text = json.loads((out / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (out / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(SigmixError, match="tokenizer"):
        verify_merged(out, ours)


@pytest.mark.parametrize(
    "kl, base, fails",
    [(5e-4, None, False), (2e-3, None, True), (9e-3, 5e-3, False), (1.1e-2, 5e-3, True), (2e-3, 1e-5, True)],
)
def test_an_exact_export_may_differ_as_the_other_program_does_itself(kl, base, fails):
    figures = {"tool": "x", "kl": kl, "effect_kl": 0.1, **({} if base is None else {"base": {"kl": base}})}
    with pytest.raises(SigmixError) if fails else contextlib.nullcontext():
        check_figures(figures, exact=True)
    check_figures(figures, exact=False)


def test_no_tensor_outlives_the_writing_of_the_next(tmp_path):
    alive: list[weakref.ref] = []

    def tensor(name):
        assert all(one() is None for one in alive)
        value = torch.full((3, 5), float(name), dtype=torch.bfloat16)
        alive.append(weakref.ref(value))
        return value

    specs = [TensorSpec.of(str(number), (3, 5), torch.bfloat16) for number in range(4)]
    write_file(tmp_path / "x.safetensors", [*specs, TensorSpec.of("9", (3, 5), torch.bfloat16)], tensor)
    read = load_file(tmp_path / "x.safetensors")
    assert [float(read[name][0, 0]) for name in sorted(read)] == [0, 1, 2, 3, 9]


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.int64, torch.bool])
def test_the_writer_and_safetensors_agree(tmp_path, kind):
    tensors = {"a": torch.ones(2, 3).to(kind), "scalar": torch.tensor(1).to(kind), "empty": torch.zeros(0, 4).to(kind)}
    write_file(tmp_path / "x", [TensorSpec.of(k, v.shape, v.dtype) for k, v in tensors.items()], tensors.__getitem__)
    read = load_file(tmp_path / "x")
    assert all(torch.equal(read[name], value) and read[name].dtype == kind for name, value in tensors.items())
