"""Which modules `SVFConfig` adapts on each architecture, what stays untouched, and the errors for what cannot work."""

from __future__ import annotations

import pytest
import torch
from helpers_svf import IDS, logits, randomise, set_form, weights
from peft import get_peft_model

from sigmix.errors import ConfigError, UnknownNameError
from sigmix.svf.config import SVFConfig
from sigmix.svf.layer import SVFLinear
from sigmix.svf.tuner import SVFModel, base_path, svf_layers, target_layers

LLAMA_ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LLAMA_MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
# architecture -> (path of the list of layers, attention, mlp), as the model classes define them
MODULES = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma3"), ("model.layers", LLAMA_ATTENTION, LLAMA_MLP))
MODULES["phi3"] = ("model.layers", ["self_attn.qkv_proj", "self_attn.o_proj"], ["mlp.gate_up_proj", "mlp.down_proj"])
MODULES["gpt2"] = ("transformer.h", ["attn.c_attn", "attn.c_proj"], ["mlp.c_fc", "mlp.c_proj"])
MODULES["mixtral"] = ("model.layers", LLAMA_ATTENTION, [])
architectures = pytest.mark.parametrize("arch", MODULES)


def expected(arch: str, *parts: str, layers=(0, 1)) -> set[str]:
    root, attention, mlp = MODULES[arch]
    names = {"attention": attention, "mlp": mlp}
    return {f"{root}.{i}.{name}" for i in layers for part in parts for name in names.get(part, [part])}


def adapt(model, **config):
    return get_peft_model(model, SVFConfig(**config))


def adapted(model, **config) -> set[str]:
    return set(svf_layers(adapt(model, **config)))


@architectures
def test_all_linear_is_attention_and_mlp(arch, tiny):
    assert adapted(tiny(arch)) == expected(arch, "attention", "mlp")
    assert adapted(tiny(arch), target_modules=None) == expected(arch, "attention", "mlp")


@architectures
def test_attention_and_mlp(arch, tiny):
    assert adapted(tiny(arch), target_modules="attention") == expected(arch, "attention")
    if MODULES[arch][2]:
        assert adapted(tiny(arch), target_modules="mlp") == expected(arch, "mlp")


@architectures
@pytest.mark.parametrize("untied", [False, True])
def test_embeddings_and_the_head_are_untouched(arch, untied, tiny):
    model = tiny(arch, tie_word_embeddings=not untied)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    before = {"head": head.weight.detach().clone(), "embedding": embedding.weight.detach().clone()}
    wrapped = adapt(model)
    randomise(wrapped)
    wrapped.merge_adapter()
    assert model.get_output_embeddings() is head
    assert model.get_input_embeddings() is embedding
    assert (head.weight is embedding.weight) is not untied
    assert torch.equal(head.weight, before["head"])
    assert torch.equal(embedding.weight, before["embedding"])


@architectures
def test_the_untrained_adapter_is_the_base_bit_for_bit(arch, tiny):
    base = logits(tiny(arch), IDS)
    model = adapt(tiny(arch)).eval()
    set_form(model, "gain")
    assert torch.equal(logits(model, IDS), base)
    set_form(model, "factored")
    assert torch.allclose(logits(model, IDS), base, atol=1e-4, rtol=1e-4)  # float32 through two layers of sums
    model.merge_adapter()
    assert torch.equal(logits(model, IDS), base)


@architectures
def test_the_forms_agree_on_the_whole_model(arch, tiny):
    model = adapt(tiny(arch)).eval()
    before = weights(model)
    base = logits(model, IDS)
    randomise(model, spread=0.1)
    factored = logits(model, IDS)
    assert (factored - base).abs().max() > 0.05, "the adapter must matter"
    outputs = {}
    set_form(model, "gain")
    outputs["gain"] = logits(model, IDS)
    model.merge_adapter()
    outputs["merged"] = logits(model, IDS)
    model.unmerge_adapter()
    for form, output in outputs.items():
        assert torch.allclose(output, factored, atol=2e-4, rtol=1e-3), form  # float32, errors grow over the layers
    after = weights(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@architectures
def test_only_z_is_trained_and_saved(arch, tiny):
    model = adapt(tiny(arch))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {base_path(name.split(".svf_z.")[0]) for name in trained} == expected(arch, "attention", "mlp")
    assert all(name.endswith(".svf_z.default.weight") for name in trained)
    for path, layer in svf_layers(model).items():
        z = trained[f"base_model.model.{path}.svf_z.default.weight"]
        assert z.shape == (min(layer.matrix().shape),)
        assert z.dtype == torch.float32
        assert torch.equal(z, torch.ones_like(z))
    buffers = {name for name in model.state_dict() if "svf_" in name}
    assert buffers == set(trained)
    assert model.get_nb_trainable_parameters()[0] == sum(z.numel() for z in trained.values())


def test_fused_experts_stay_as_they_are(tiny):
    model = tiny("mixtral")
    adapt(model)
    assert not any(isinstance(m, SVFLinear) for layer in model.model.layers for m in layer.mlp.modules())
    with pytest.raises(ConfigError, match="'mlp'"):
        adapt(tiny("mixtral"), target_modules="mlp")


@architectures
def test_layers(arch, tiny):
    parts = ("attention", "mlp")
    assert adapted(tiny(arch), layers_to_transform=[1]) == expected(arch, *parts, layers=[1])
    assert adapted(tiny(arch), layers_to_transform=0) == expected(arch, *parts, layers=[0])
    four = {"n_layer" if arch == "gpt2" else "num_hidden_layers": 4}
    assert adapted(tiny(arch, **four), layers_to_transform="half") == expected(arch, *parts, layers=[0, 2])
    half = adapted(tiny(arch, **four), target_modules="attention", layers_to_transform="half")
    assert half == expected(arch, "attention", layers=[0, 2])


@pytest.mark.parametrize(
    "targets",
    [["q_proj"], ["self_attn.q_proj"], "q_proj", "self_attn.q_proj", r".*\.q_proj",
     r"model\.layers\.\d+\.self_attn\.q_proj", r"(?i).*Q_PROJ",
     ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]],
    ids=["suffix", "longer suffix", "bare suffix", "bare longer suffix", "regex", "longer regex", "inline flag",
         "full names"],
)  # fmt: skip
def test_lists_and_regular_expressions_with_and_without_layers(targets, tiny):
    assert adapted(tiny(), target_modules=targets) == expected("llama", "self_attn.q_proj")
    for layers in ([1], 1):
        assert adapted(tiny(), target_modules=targets, layers_to_transform=layers) == expected(
            "llama", "self_attn.q_proj", layers=[1]
        )
    assert adapted(tiny(), target_modules=targets, layers_to_transform="half") == expected(
        "llama", "self_attn.q_proj", layers=[0]
    )


def test_the_pattern_of_the_layers(tiny):
    found = adapted(tiny(), target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")
    assert found == expected("llama", "self_attn.q_proj", layers=[1])
    with pytest.raises(ConfigError, match="layers"):
        adapted(tiny(), target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="blocks")


@pytest.mark.parametrize("name", ["exclude", "exclude_modules"])
@pytest.mark.parametrize("value", [["o_proj", "mlp.down_proj"], r".*(o_proj|down_proj)"], ids=["list", "regex"])
@pytest.mark.parametrize("targets", ["all-linear", [*"qkvo"]])
def test_exclude(name, value, targets, tiny):
    targets = [f"{letter}_proj" for letter in targets] if isinstance(targets, list) else targets
    found = adapted(tiny(), target_modules=targets, **{name: value})
    everything = expected("llama", "attention", *(["mlp"] if targets == "all-linear" else []))
    assert found == {path for path in everything if not path.endswith(("o_proj", "down_proj"))}
    if targets == "all-linear":
        first = adapted(tiny(), target_modules=targets, layers_to_transform=[0], **{name: value})
        assert first == {path for path in found if ".0." in path}


def test_a_misspelt_name_to_exclude(tiny):
    with pytest.raises(UnknownNameError, match=r"'q_porj'.*q_proj"):
        adapt(tiny(), exclude_modules=["q_porj", "mlp.up_proj"])


def test_a_shorthand_stands_alone(tiny):
    with pytest.raises(ConfigError, match="attention"):
        adapt(tiny(), target_modules=["attention", "up_proj"])


def test_exclude_given_twice():
    assert SVFConfig(exclude=["a"], exclude_modules=["a"]).exclude_modules == ["a"]
    with pytest.raises(ConfigError, match="exclude_modules"):
        SVFConfig(exclude=["a"], exclude_modules=["b"])


@pytest.mark.parametrize("targets", [r".*\.nonsense", [], "(", "mlp.*proj"])
def test_no_module_matches(targets, tiny):
    with pytest.raises(ConfigError):
        adapt(tiny(), target_modules=targets)


@pytest.mark.parametrize(
    "targets, wrong, near",
    [
        (["q_proj", "v_porj"], "v_porj", "v_proj"),
        ("v_porj", "v_porj", "v_proj"),
        ("atention", "atention", "attention"),
        (["q_proj", ""], "", "q_proj"),
        (["self_attn.q_proj", "self_atn.k_proj"], "self_atn.k_proj", "self_attn.k_proj"),
        (["q_proj", "model.layers.7.mlp.up_proj"], "model.layers.7.mlp.up_proj", "model.layers.1.mlp.up_proj"),
    ],
)
@pytest.mark.parametrize("layers", [None, [1]])
def test_a_misspelt_name(targets, wrong, near, layers, tiny):
    with pytest.raises(UnknownNameError) as caught:
        adapt(tiny(), target_modules=targets, layers_to_transform=layers)
    assert repr(wrong) in str(caught.value)
    assert near in str(caught.value)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("options", [{}, {"target_modules": "attention"}, {"layers_to_transform": [1]},
                                     {"target_modules": ".*o_proj|.*c_proj", "exclude": ".*0.*"}])  # fmt: skip
def test_target_layers_are_the_layers_that_are_adapted(arch, options, tiny):
    with torch.device("meta"):
        empty = tiny(arch)
    model = tiny(arch)
    before = {path: layer.weight for path, layer in target_layers(model, SVFConfig(**options)).items()}
    wrapped = adapt(model, **options)
    assert list(target_layers(empty, SVFConfig(**options))) == list(before) == list(svf_layers(wrapped))
    after = target_layers(wrapped, SVFConfig(**options))  # base layers of the adapted ones
    assert {path: layer.weight for path, layer in after.items()}.keys() == before.keys()
    assert all(after[path].weight is weight for path, weight in before.items())


@pytest.mark.parametrize(
    "layers, words",
    [
        ([2], r"\[2\].*\[0, 1\]"),
        ([0, 99], r"\[99\].*\[0, 1\]"),
        (-1, r"\[-1\]"),
        ([], "no layers"),
        ("quarter", "'quarter'"),
        (["0"], r"\['0'\]"),
    ],
)
@pytest.mark.parametrize("targets", ["all-linear", "mlp", ["q_proj"], r".*q_proj"])
def test_layers_that_do_not_exist(layers, words, targets, tiny):
    with pytest.raises(ConfigError, match=words):
        adapt(tiny(), target_modules=targets, layers_to_transform=layers)


def test_layers_that_exist_but_hold_nothing_targeted(tiny):
    with pytest.raises(ConfigError, match=r"layers \[1\]"):
        adapt(tiny(), target_modules=["model.layers.0.mlp.up_proj"], layers_to_transform=[1])


def test_an_embedding_cannot_be_adapted(tiny):
    with pytest.raises(ConfigError, match="Embedding"):
        adapt(tiny(), target_modules=["embed_tokens"])


def test_a_tied_head_cannot_be_adapted_and_an_untied_one_can(tiny):
    with pytest.raises(ConfigError, match="lm_head") as caught:
        adapt(tiny(), target_modules=["lm_head"])
    assert "untie" in str(caught.value.remedy)
    model = adapt(tiny(tie_word_embeddings=False), target_modules=["lm_head"]).eval()
    randomise(model)
    unmerged = logits(model, IDS)
    model.merge_adapter()
    assert torch.allclose(logits(model, IDS), unmerged, atol=1e-4, rtol=1e-4)  # float32 sums in another order


@pytest.mark.parametrize("name", ["half", "type", "a.b"])
def test_names_that_torch_cannot_use(name, tiny):
    with pytest.raises(ConfigError, match=f"cannot be named '{name}'"):
        get_peft_model(tiny(), SVFConfig(), adapter_name=name)


def test_registration_is_idempotent_and_like_the_string():
    from peft import mapping

    from sigmix.svf import tuner

    sizes = [len(table) for table in (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, mapping.PEFT_TYPE_TO_TUNER_MAPPING)]
    tuner.register()
    assert sizes == [len(t) for t in (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, mapping.PEFT_TYPE_TO_TUNER_MAPPING)]
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["SVF"] is SVFConfig
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING["SVF"] is SVFModel
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING["SVF"] == "svf_"
