"""Quantized bases through the gain form: exact at z = 1, the dense oracle on W_q elsewhere, gradients, fingerprints."""

from __future__ import annotations

import pytest
import torch
from helpers_svf import IDS, TOLERANCE, dense, error, linear, logits, random_z, randomise, set_form
from helpers_tiny import build_tiny, build_tokenizer
from peft import get_peft_model

from sigmix import Engine, Expert, Mix, load_base
from sigmix.errors import ConfigError, FingerprintError, UnknownNameError
from sigmix.experts.fingerprint import fingerprint
from sigmix.models.quantization import QUANTIZATIONS
from sigmix.svf.config import SVFConfig
from sigmix.svf.layer import SVFLinear
from sigmix.svf.linears import linears, matrix_of
from sigmix.svf.tuner import svf_layers

for package in set(QUANTIZATIONS.values()):
    pytest.importorskip(package)

KINDS = [(name, dtype) for name in QUANTIZATIONS for dtype in ("float32", "bfloat16")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantised") / "base"
    build_tiny("qwen2").save_pretrained(path)  # q, k and v have biases, which the gain form must leave out
    build_tokenizer().save_pretrained(path)
    return path


def adapted(folder, name, dtype="float32", seed=1):
    model = get_peft_model(load_base(folder, dtype, quantization_config=name)[0], SVFConfig())
    randomise(model, seed=seed)
    return model


@torch.no_grad()
def oracle(folder, quantised, z):
    """Logits of a float64 model whose weights are W_q'(z)."""
    model = load_base(folder, "float64")[0]
    held = linears(quantised)
    for path, module in linears(model).items():
        if path in held and path != "lm_head":
            weight = matrix_of(held[path])
            module.weight.data = dense(weight, z[path]) if path in z else weight.double()
    return logits(model, IDS)


@pytest.mark.parametrize("name, dtype", KINDS)
def test_the_gain_form_is_exact_for_the_quantised_base(folder, name, dtype):
    base, tokenizer = load_base(folder, dtype, quantization_config=name)
    plain = logits(base, IDS)
    before = fingerprint(base)
    model = get_peft_model(base, SVFConfig())
    assert torch.equal(logits(model, IDS), plain), "z = 1 must be the quantised base, bit for bit"
    assert fingerprint(model) == before, "a pass or an adapter must not change what the base is"
    assert fingerprint(load_base(folder, dtype, quantization_config=name)[0]) == before
    randomise(model)
    z = {path: layer.effective_z().detach() for path, layer in svf_layers(model).items()}
    expected = oracle(folder, model, z)
    bound = 2 * TOLERANCE[getattr(torch, dtype)]  # over two layers
    assert error(expected, plain) > 10 * bound, "otherwise nothing is tested"
    assert error(logits(model, IDS), expected) < bound

    expert = Expert.from_model(model, name="mine")
    assert expert.meta["base"]["dtype"] == f"{dtype} in {name}"
    other, _ = load_base(folder, dtype, quantization_config=name)
    expert.check(other)
    engine = Engine(other, tokenizer, {"mine": expert})
    mixed = engine.logits(IDS, None, [Mix.one("mine"), Mix.base(), Mix.parse("mine:.5")])
    assert error(mixed[0], expected[0]) < bound
    assert torch.equal(mixed[1], plain[1])
    alone = engine.logits(IDS, None, "mine")
    assert error(alone, expected) < bound
    assert torch.equal(engine.logits(IDS), plain)


def test_generating_picks_the_gain_form_by_itself(folder):
    model, tokenizer = load_base(folder, "float32", quantization_config="int8")
    experts = {name: Expert.from_model(adapted(folder, "int8", seed=n), name=name) for n, name in enumerate("ab", 1)}
    engine = Engine(model, tokenizer, experts)
    mixes = [Mix.one("a"), Mix.base(), Mix.parse("a:.5+b:.5")]
    together = engine.generate(["hello", "you", "there"], mixes, max_new_tokens=6)
    for prompt, mix, found in zip(["hello", "you", "there"], mixes, together, strict=True):
        assert engine.generate([prompt], mix, max_new_tokens=6)[0].ids == found.ids
    assert engine.execution.choose([Mix.one("a")]) == "gain"
    for form in ("merged", "factored"):
        with pytest.raises(ConfigError, match=form):
            engine.logits(IDS, None, "a", form=form)


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_z_learns_in_the_gain_form(folder, name):
    model = adapted(folder, name)
    held = {path: matrix_of(layer).clone() for path, layer in svf_layers(model).items()}
    chosen = ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"]  # the short side out, and in
    assert {svf_layers(model)[path].side for path in chosen} == {"in", "out"}
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    exact = load_base(folder, "float64")[0]
    zs = {path: layer.effective_z().detach().double().requires_grad_() for path, layer in svf_layers(model).items()}
    weights = {f"{path}.weight": dense(held[path], zs[path]) for path in zs}
    rest = {n: p for n, p in exact.named_parameters() if n not in weights}
    expected = torch.func.functional_call(exact, {**rest, **weights}, kwargs={"input_ids": IDS, "labels": IDS}).loss
    expected.backward()
    for path in chosen:
        assert error(svf_layers(model)[path].svf_z["default"].weight.grad, zs[path].grad) < 1e-3, path
    for path, layer in svf_layers(model).items():
        assert torch.equal(matrix_of(layer), held[path])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gain_form_of_a_plain_layer_has_the_factored_forms_gradient(dtype):
    found = {}
    for form in ("factored", "gain"):
        layer = SVFLinear(linear(16, 24, dtype=dtype), "default", cache=False)
        layer.svf_z["default"].weight.data.copy_(random_z(16))
        layer.form = form
        x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
        layer(x).float().square().sum().backward()
        found[form] = layer.svf_z["default"].weight.grad
        assert found[form].dtype == torch.float32
    assert error(found["gain"], found["factored"]) < 10 * TOLERANCE[dtype]


def test_an_expert_of_the_plain_base_is_refused_with_the_remedy(folder):
    plain = get_peft_model(load_base(folder, "float32")[0], SVFConfig())
    randomise(plain)
    expert = Expert.from_model(plain, name="plain")
    quantised = load_base(folder, "float32", quantization_config="int8")[0]
    with pytest.raises(FingerprintError, match=r"float32 in int8.*use_original_basis.*--basis original"):
        expert.check(quantised)


def test_the_base_stays_quantised_and_small(folder):
    model = adapted(folder, "int8")
    plain = get_peft_model(load_base(folder)[0], SVFConfig())
    own, others = ({path: layer.matrix().shape for path, layer in svf_layers(one).items()} for one in (model, plain))
    assert own == others
    for layer in svf_layers(model).values():
        assert layer.gain_only
        assert layer.base_layer.weight.qdata.dtype == torch.int8
        assert layer.svf_long is None
    set_form(model, "factored")
    with pytest.raises(ConfigError, match="factored"):
        model(input_ids=IDS)
    with pytest.raises(ConfigError, match="merged"):
        model.merge_adapter()


def test_refusals(folder):
    with pytest.raises(UnknownNameError, match="int9"):
        load_base(folder, quantization_config="int9")
    with pytest.raises(ConfigError, match="both a device and a device map"):
        load_base(folder, device="cpu", device_map="auto")
