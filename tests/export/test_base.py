"""The base of an export: its weights in the dtypes that loading gives them, and experts that belong to another one."""

from __future__ import annotations

import pytest
import torch
from helpers_engine import expert
from helpers_experts import at
from helpers_export import base_folder, experts, ids
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sigmix.engine import Engine
from sigmix.errors import ConfigError, FingerprintError
from sigmix.experts.expert import Expert
from sigmix.experts.fingerprint import fingerprint
from sigmix.experts.metadata import thaw
from sigmix.experts.mix import Mix
from sigmix.export.base import BaseCheckpoint
from sigmix.export.low_rank import LowRank
from sigmix.export.merged import export_merged
from sigmix.models.loading import load_base
from sigmix.utils.safetensors import Shards

MIX = Mix.parse("math:0.7+word:-0.4")


def stored(folder, dtypes):
    """Rewrite a checkpoint: {part of a name: dtype}, the others as they are."""
    tensors = load_file(folder / "model.safetensors")
    converted = {
        name: value.to(next((dtype for part, dtype in dtypes.items() if part in name), value.dtype))
        for name, value in tensors.items()
    }
    save_file(converted, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def made_on(folder, dtype):
    return {name: expert(load_base(folder, dtype)[0], name, seed) for seed, name in enumerate(("math", "word"))}


def kinds(folder):
    return {Shards(folder).entry(name).dtype for name in Shards(folder)}


@pytest.mark.parametrize(
    "parts, dtype",
    [
        ({"proj": torch.bfloat16}, "bfloat16"),  # embeddings and norms in float32, which loading rounds
        ({"proj": torch.bfloat16}, "float32"),
        ({"": torch.float16}, "bfloat16"),
        ({"": torch.float64}, "float32"),
    ],
)
def test_a_checkpoint_in_other_dtypes_is_read_as_it_is_loaded(tmp_path, cache, parts, dtype):
    folder = stored(base_folder(tmp_path / "base"), parts)
    bank = made_on(folder, dtype)
    source = BaseCheckpoint(folder)
    assert source.adopt_dtype(bank.values()) == dtype
    assert source.fingerprint() == fingerprint(load_base(folder, dtype)[0])
    export_merged(source, MIX, bank, tmp_path / "out")
    assert kinds(tmp_path / "out") == {{"bfloat16": "BF16", "float32": "F32"}[dtype]}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    row = torch.tensor([ids()])
    with torch.no_grad():
        theirs = loaded(input_ids=row, use_cache=False).logits
    engine = Engine(*load_base(folder, dtype), bank, keep_packed=0)
    assert torch.equal(theirs, engine.logits(row, mix=MIX, form="merged"))


def test_what_transformers_keeps_in_float32_stays_so(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"layers.*.input_layernorm"})
    folder = base_folder(tmp_path / "base")
    bank = made_on(folder, "bfloat16")
    source = BaseCheckpoint(folder)
    assert source.adopt_dtype(bank.values()) == "bfloat16"
    model = load_base(folder, "bfloat16")[0]
    assert source.fingerprint() == fingerprint(model)
    export_merged(source, MIX, bank, tmp_path / "out")
    parameters = dict(model.named_parameters())
    written = Shards(tmp_path / "out")
    assert kinds(tmp_path / "out") == {"BF16", "F32"}
    assert all(written.tensor(name).dtype == parameters[name].dtype for name in written)
    # and what is stored so already needs no rounding
    assert BaseCheckpoint(tmp_path / "out").adopt_dtype(made_on(tmp_path / "out", "bfloat16").values()) is None


@pytest.mark.parametrize("sealed", [True, False])
def test_an_expert_of_a_quantised_base_is_refused_as_that(tmp_path, cache, sealed):
    folder = base_folder(tmp_path / "base")
    one = made_on(folder, "float32")["math"]
    meta = thaw(one.meta)
    meta["base"] = {**meta["base"], "dtype": "bfloat16 in int8", "fingerprint": "0" * 64 if sealed else None}
    source = BaseCheckpoint(folder)
    bank = {"math": Expert("math", one.z, meta)}
    assert source.adopt_dtype(bank.values()) is None
    with pytest.raises(FingerprintError, match="--quantization int8") as caught:
        source.z(Mix.one("math"), bank)
    assert "--dtype" not in str(caught.value)


@pytest.mark.parametrize("mix", ["math", "math:0.5+word:0.5"])
def test_experts_that_act_on_prompts_alone_are_refused(tmp_path, cache, mix):
    source = BaseCheckpoint(base_folder(tmp_path / "base"))
    bank = experts()
    bank["math"] = at("prompt", bank["math"])
    for export in (
        lambda: export_merged(source, Mix.parse(mix), bank, tmp_path / "out"),
        lambda: LowRank.from_mix(source, Mix.parse(mix), bank),
    ):
        with pytest.raises(ConfigError, match=r"'prompt' \(math\).*Engine"):
            export()
    assert not (tmp_path / "out").exists()
    assert source.known_fingerprint is None, "no weight was read"
    LowRank.from_mix(source, Mix.one("word"), bank)
