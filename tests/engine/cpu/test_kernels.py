"""CPU kernels and layout workarounds: the same values up to rounding, packed once, and no trace in the model."""

from __future__ import annotations

import pytest
import torch
from helpers_engine import alone, expert, rows
from peft import get_peft_model

from sigmix.engine import Engine
from sigmix.engine.cpu import kernels, native
from sigmix.engine.cpu.kernels import SCORES_BYTES, Shared, contiguous_head, find_groups, short_attention
from sigmix.engine.execution import adapted_layers
from sigmix.experts.mix import Mix
from sigmix.svf.config import SVFConfig

pytestmark = pytest.mark.usefixtures("cache")
packs = pytest.mark.skipif(not kernels.available(), reason="this torch cannot pack bfloat16 weights on this CPU")


@torch.no_grad()
def test_the_head_gets_contiguous_rows_and_answers_the_same(tiny_llama):
    row = rows([14])[0]
    before = alone(tiny_llama, row)
    contiguous_head(tiny_llama)
    contiguous_head(tiny_llama)  # twice is once
    assert len(tiny_llama.lm_head._forward_pre_hooks) == 1
    seen = []
    tiny_llama.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
    assert torch.equal(alone(tiny_llama, row), before)
    tiny_llama(input_ids=torch.tensor(rows([9, 9])), logits_to_keep=1)
    assert seen == [True, True]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2", "mixtral"])
@torch.no_grad()
def test_short_attention_computes_the_same(tiny, arch, wrapped):
    model = tiny(arch).bfloat16()
    if wrapped:
        model = get_peft_model(model, SVFConfig()).eval()
    ids, mask = torch.tensor(rows([20, 20])), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    fused = model(input_ids=ids, attention_mask=mask).logits
    with short_attention(model, 2 * 4 * 20 * 20):
        assert model.config._attn_implementation == "eager"
        plain = model(input_ids=ids, attention_mask=mask).logits
    assert model.config._attn_implementation == "sdpa"
    # two bfloat16 roundings of attention, carried through the layers; the logits' spread is about 10
    real = mask.bool()
    assert float((plain - fused)[real].abs().mean()) < 0.02 * float(fused[real].std())


def test_long_sequences_and_float32_stay_fused(tiny):
    model = tiny("llama")
    with short_attention(model, 10):
        assert model.config._attn_implementation == "sdpa"  # float32 has a fast backward pass
    half = model.bfloat16()
    with short_attention(half, SCORES_BYTES // 4 + 1):
        assert half.config._attn_implementation == "sdpa"
    with pytest.raises(KeyError), short_attention(half, 10):
        raise KeyError
    assert half.config._attn_implementation == "sdpa"
    half.set_attn_implementation("eager")
    with short_attention(half, 10):
        pass
    assert half.config._attn_implementation == "eager"  # what the user chose


# ------------------------------------------------------------------ groups


def names(model):
    return [[path.split(".")[-1] for path in group.paths] for group in find_groups(model, adapted_layers(model))]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3", "mistral"])
def test_queries_keys_and_values_share_their_input_and_so_do_gate_and_up(tiny, arch):
    found = names(tiny(arch))
    assert found[:4] == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert len(found) == 4 * tiny(arch).config.num_hidden_layers


def test_layers_that_are_no_linear_layers_are_left_out(tiny):
    assert find_groups(tiny("gpt2"), adapted_layers(tiny("gpt2"))) == []  # Conv1D throughout


def test_every_linear_layer_is_in_one_group_in_the_order_of_the_layers(tiny):
    model = tiny("llama")
    layers = adapted_layers(model)
    assert [path for group in find_groups(model, layers) for path in group.paths] == list(layers)


def test_only_the_same_tensor_counts_as_the_same_input():
    computed = []

    def both(x):
        computed.append(x)
        return [x + 1, x + 2]

    shared = Shared(both)
    x = torch.zeros(2)
    assert shared.take(0, x)[0] == 1
    assert shared.take(1, x)[0] == 2
    assert len(computed) == 1
    y = torch.zeros(2)  # equal, but another
    assert shared.take(1, y)[0] == 2
    assert shared.take(1, y)[0] == 2  # asked for twice: computed again rather than guessed
    assert shared.take(0, x)[0] == 1
    assert len(computed) == 4


def test_watching_leaves_the_model_as_it_was(tiny, tiny_tokenizer):
    model = tiny("llama")
    bank = {"a": expert(tiny("llama"), "a", 1)}
    before = Engine(tiny("llama"), tiny_tokenizer, bank).generate([[5, 6, 7]], "a", max_new_tokens=4)
    engine = Engine(model, tiny_tokenizer, bank)
    find_groups(model, engine.layers)
    assert engine.generate([[5, 6, 7]], "a", max_new_tokens=4) == before
    assert not any(layer._forward_pre_hooks for layer in engine.layers.values())


# ------------------------------------------------------------------ packed weights


PROMPTS = rows([9, 12, 10])
MIXES = [None, "a", ["a", "base", "b:0.5"]]


def engine_of(tiny, tokenizer, arch="llama", dtype=torch.bfloat16, **options):
    bank = {name: expert(tiny(arch).to(dtype), name, seed) for seed, name in enumerate("ab")}
    return Engine(tiny(arch).to(dtype), tokenizer, bank, **options)


@packs
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("form", [None, "gain"])
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_packed_and_plain_give_the_same_tokens_and_logits(tiny, tiny_tokenizer, arch, mix, form):
    if form and not isinstance(mix, list):
        mix = [mix] * 3
    fast, plain = engine_of(tiny, tiny_tokenizer, arch), engine_of(tiny, tiny_tokenizer, arch, keep_packed=0)
    assert fast.execution.packing.on
    assert not plain.execution.packing.on
    for _ in range(2):
        ours = fast.generate(PROMPTS, mix, max_new_tokens=5, form=form)
        assert ours == plain.generate(PROMPTS, mix, max_new_tokens=5, form=form)
    ids = torch.tensor([row[:9] for row in PROMPTS])
    assert (fast.logits(ids, mix=mix, form=form) == plain.logits(ids, mix=mix, form=form)).all()


@packs
@pytest.mark.skipif(not native.has_bfloat16(), reason="this machine has no AVX-512 BF16")
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_an_engine_that_compiles_computes_the_same_up_to_rounding(tiny, tiny_tokenizer, arch, mix, monkeypatch):
    calls, call = [], native.NativeLinear.__call__
    monkeypatch.setattr(native.NativeLinear, "__call__", lambda layer, x: calls.append(layer) or call(layer, x))
    fast, plain = engine_of(tiny, tiny_tokenizer, arch, compile=True), engine_of(tiny, tiny_tokenizer, arch)
    ids = torch.tensor([row[:9] for row in PROMPTS])
    for form in (None, "merged") if mix == "a" else (None,):
        expected = plain.logits(ids, mix=mix, form=form).float()
        assert not calls
        found = fast.logits(ids, mix=mix, form=form).float()
        assert calls
        calls.clear()
        assert float((found - expected).abs().mean()) < 0.02 * float(expected.std())


@packs
def test_packs_are_made_once_and_anew_when_a_weight_changes(tiny, tiny_tokenizer, monkeypatch):
    count = [0]
    plain = kernels.pack

    def counting(*sources):
        count[0] += 1
        return plain(*sources)

    monkeypatch.setattr(kernels, "pack", counting)
    engine = engine_of(tiny, tiny_tokenizer)
    for mix, form in ((None, None), ("a", "merged"), (["a", "b", None], None)) * 2:
        engine.generate(PROMPTS, mix, max_new_tokens=2, form=form)
    packs = engine.execution.packing
    inputs = len(packs.groups)  # base, merged, and the first factors: one for all layers with one input
    assert inputs < len(engine.layers)
    packed = len(packs.others) + 3 * inputs + len(engine.layers)
    assert count[0] == packed
    layer = next(iter(engine.layers.values())).get_base_layer()
    with torch.no_grad():
        layer.weight.mul_(2)
    engine.generate(PROMPTS, max_new_tokens=2)
    assert count[0] == packed + 1


@packs
def test_hidden_states_pack_the_layers_that_run_alone(tiny, tiny_tokenizer, monkeypatch):
    packed, plain = [], kernels.pack
    monkeypatch.setattr(kernels, "pack", lambda weight, bias=None: packed.append(weight) or plain(weight, bias))
    engine = engine_of(tiny, tiny_tokenizer)
    groups = engine.execution.packing.groups
    engine.hidden_states(PROMPTS, [1])
    assert len(packed) == sum(".layers.0." in group.paths[0] for group in groups) == len(groups) / 2
    engine.generate(PROMPTS, max_new_tokens=1)
    assert len(packed) == len(groups) + 1  # the head


@packs
def test_nothing_is_left_in_the_model(tiny, tiny_tokenizer):
    engine = engine_of(tiny, tiny_tokenizer)
    before = {name: p.clone() for name, p in engine.model.named_parameters()}
    for mix in MIXES:
        engine.generate(PROMPTS, mix, max_new_tokens=2)
    with pytest.raises(RuntimeError, match="inside"), engine.under([Mix.one("a")]):
        raise RuntimeError("inside")
    for module in engine.model.modules():
        assert "forward" not in vars(module)
        assert "_factored" not in vars(module)
    assert all((p == before[name]).all() for name, p in engine.model.named_parameters())


@packs
def test_gradients_flow_past_the_packs(tiny, tiny_tokenizer):
    engine = engine_of(tiny, tiny_tokenizer)
    embeddings = engine.model.get_input_embeddings()(torch.tensor([[5, 6, 7]])).detach().requires_grad_()
    with engine.under([Mix.base()]):
        engine.model(inputs_embeds=embeddings).logits.float().sum().backward()
    assert embeddings.grad.abs().sum() > 0


@packs
def test_no_packs_in_float32_or_over_the_budget(tiny, tiny_tokenizer):
    assert not engine_of(tiny, tiny_tokenizer, dtype=torch.float32).execution.packing.on
    assert not engine_of(tiny, tiny_tokenizer, keep_packed=1000).execution.packing.on
