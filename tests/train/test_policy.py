"""The three states of a policy, and what is stored of it."""

from __future__ import annotations

import pytest
import torch
from helpers_train import Letter, config, learner, shake

from sigmix.engine.cpu.kernels import available
from sigmix.errors import ConfigError
from sigmix.experts.expert import Expert
from sigmix.experts.fingerprint import fingerprint
from sigmix.svf.config import SVFConfig
from sigmix.svf.tuner import svf_layers
from sigmix.tasks.base import Score
from sigmix.train.policy import make_policy

pytestmark = pytest.mark.usefixtures("cache")
IDS = torch.arange(4, 40).reshape(2, 18)
KINDS = [{}, {"parametrization": "reference"}, {"policy": "lora"}, {"policy": "ia3"},
         {"kl_estimator": "k3", "layers_to_transform": [1], "target_modules": "mlp"}]  # fmt: skip


class Even(Letter):
    """Right is every reply whose first character has an even code: about half of a random model's replies."""

    def score(self, sample, reply):
        return Score.of(bool(reply) and ord(reply[0]) % 2 == 0, reply[:1] or None)


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.fixture(params=["llama", "gpt2"])
def base(request, tiny):
    return lambda **changes: tiny(request.param, **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_the_base_bit_for_bit(base, kind):
    plain = logits(base())
    policy = make_policy(base(), config(**kind))
    shake(policy)
    for _ in range(2):
        with policy.reference():
            assert torch.equal(logits(policy.model), plain)
        with policy.acting():
            assert not torch.equal(logits(policy.model), plain)
        with policy.learning():
            assert not torch.equal(logits(policy.model), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_acting_equals_learning(base, kind):
    policy = make_policy(base(), config(**kind))
    shake(policy)
    with policy.acting():
        acting = logits(policy.model)
    with policy.learning():
        learning = logits(policy.model)
    # float32: W' x against U((s⊙z) ⊙ Vᵀx), logits of size 10
    torch.testing.assert_close(acting, learning, rtol=1e-4, atol=1e-4)


def test_merging_for_many_tokens_only(tiny):
    policy = make_policy(tiny().bfloat16(), config())
    shake(policy)
    own = {path: layer.get_base_layer().weight.data_ptr() for path, layer in policy.layers.items()}

    def run(state):
        with state:
            merged = [layer.get_base_layer().weight.data_ptr() != own[path] for path, layer in policy.layers.items()]
            return logits(policy.model), merged

    factored, _ = run(policy.learning())
    few, merged = run(policy.acting(tokens=1))
    assert not (any(merged) and available())
    other = {path: z.flip(0) for path, z in policy.z().items()}
    different, _ = run(policy.acting(other, tokens=1))
    many, merged = run(policy.acting(tokens=10**6))
    assert all(merged)
    scale = float(factored.abs().max())
    for result in (few, many):
        torch.testing.assert_close(result, factored, rtol=0, atol=0.05 * scale)  # bfloat16
    assert float((different - factored).abs().max()) > 0.2 * scale
    again, _ = run(policy.acting(tokens=1))
    assert torch.equal(again, few)


def test_dropout_of_the_base_stays_off_while_lora_learns(tiny):
    # GPT-2 has dropout on its residuals: the policy that learns must be the one that acted
    model = tiny("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    policy = make_policy(model, config(policy="lora"))
    with policy.learning():
        assert torch.equal(logits(policy.model), logits(policy.model))
    dropping = make_policy(tiny("gpt2"), config(policy="lora", lora_dropout=0.5))
    shake(dropping)
    with dropping.learning():
        assert not torch.equal(logits(dropping.model), logits(dropping.model))
    with dropping.acting():
        assert torch.equal(logits(dropping.model), logits(dropping.model))
    assert not any(module.training for module in dropping.model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_policys_parameters_learn_and_the_base_stays(base, tiny_tokenizer, kind):
    fresh = base()
    before = fingerprint(fresh, fresh=True)
    model = base()
    ours = learner(model, tiny_tokenizer, Even(), **kind)
    trainable = {id(p) for p in ours.policy.model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in ours.parameters.values()}
    start = ours.policy.z()
    samples = Letter().samples("train", 8)
    rewards = [ours.step(step, samples)["reward"] for step in range(3)]
    assert any(-1 < reward < 1 for reward in rewards)  # else there is nothing to learn from
    assert any(not torch.equal(start[name], value) for name, value in ours.policy.z().items())
    assert fingerprint(ours.policy.model, fresh=True) == before
    with ours.policy.reference():
        assert torch.equal(logits(ours.policy.model), logits(fresh))
    assert all(p.grad is None for p in model.parameters() if id(p) not in trainable)


def test_direct_starts_at_the_base_and_stays_above_zero(tiny):
    policy = make_policy(tiny(), config())
    assert all(torch.equal(z, torch.ones_like(z)) for z in policy.z().values())
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter[:3] = -0.5
    policy.after_step()
    for z in policy.z().values():
        assert z[:3].tolist() == [0, 0, 0]
        assert torch.equal(z[3:], torch.ones_like(z[3:]))


def test_reference_parameterisation(tiny):
    policy = make_policy(tiny(), config(parametrization="reference", seed=4))
    again = make_policy(tiny(), config(parametrization="reference", seed=4))
    other = make_policy(tiny(), config(parametrization="reference", seed=5))
    for path, p in policy.parameters().items():
        assert torch.equal(p, again.parameters()[path])
        assert not torch.equal(p, other.parameters()[path])
        assert 0.05 < float(p.detach().mean()) < 0.15
        assert float(p.detach().std()) < 0.03
    shake(policy, width=4.0)
    for path, layer in policy.layers.items():
        raw, s = torch.sigmoid(policy.parameters()[path].detach()), layer.svf_s
        assert torch.allclose(policy.z()[path], raw * (s.sum() / (s * raw).sum()), rtol=1e-6)
        restored = (s * policy.z()[path]).sum()
        assert float(restored) == pytest.approx(float(s.sum()), rel=1e-5)  # float32 sums of 64 numbers


@pytest.mark.parametrize("kind", [{}, {"parametrization": "reference"}])
def test_the_stored_expert_gives_the_logits_of_training(tiny, tmp_path, kind):
    policy = make_policy(tiny(), config(**kind))
    shake(policy, width=1.0)
    with policy.acting():
        acting = logits(policy.model)
    Expert.from_model(policy.model, name="letter").save_pretrained(tmp_path / "letter")
    from peft import get_peft_model

    other = tiny()
    expert = Expert.from_pretrained(tmp_path / "letter", base=other)
    assert all(torch.equal(expert.z[path], z) for path, z in policy.z().items())
    plain = get_peft_model(other, SVFConfig())
    with torch.no_grad():
        for path, layer in svf_layers(plain).items():
            layer.svf_z["default"].weight.copy_(expert.z[path])
    plain.merge_adapter()
    assert torch.equal(logits(plain), acting)


def test_pefts_own_take_no_options_of_svf():
    for policy in ("lora", "ia3"):
        for options in ({"layers_to_transform": "half"}, {"parametrization": "reference"}):
            with pytest.raises(ConfigError, match=policy):
                config(policy=policy, **options)
    with pytest.raises(ConfigError, match="ia3"):
        config(policy="ia3", target_modules="mlp")
    with pytest.raises(ConfigError, match="init_from"):
        config(parametrization="reference", init_from="somewhere")


@pytest.mark.parametrize("kind", [{}, {"policy": "lora"}, {"policy": "ia3"}])
def test_a_policy_starts_from_a_saved_one(tiny, tmp_path, kind):
    first = make_policy(tiny(), config(**kind))
    shake(first)
    if kind:
        first.save(tmp_path / "saved")
    else:
        Expert.from_model(first.model, name="saved").save_pretrained(tmp_path / "saved")
    second = make_policy(tiny(), config(**kind))
    with first.acting():
        wanted = logits(first.model)
    with second.acting():
        assert not torch.equal(logits(second.model), wanted)
    second.load(tmp_path / "saved")
    assert all(torch.equal(mine, second.z()[name]) for name, mine in first.z().items())
    with second.acting():
        assert torch.equal(logits(second.model), wanted)


def test_biases_come_back_after_ia3_acted(tiny):
    model = tiny("qwen2")  # q, k and v have biases, which IA3 scales when it is merged
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    policy = make_policy(model, config(policy="ia3"))
    shake(policy)
    with policy.acting():
        pass
    state = policy.model.state_dict().items()
    after = {name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor for name, tensor in state}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
