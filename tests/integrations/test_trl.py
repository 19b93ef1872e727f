"""`SVFConfig` in TRL's trainers, on a tiny model: what is trained, what the KL is of, and that it makes an expert."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import trl
from helpers_engine import alone, answer_scores, dense
from helpers_tiny import build_tiny, build_tokenizer
from peft import PeftModel, get_peft_model

from sigmix import Engine, Expert, Mix, SVFConfig, load_base
from sigmix.engine.tokenization import encode
from sigmix.errors import ConfigError, DataError, OutputError
from sigmix.experts.expert import seal
from sigmix.experts.metadata import COMPUTED, thaw
from sigmix.integrations.trl import CHAT, KeepZ, finish, gold_dataset, prompt_dataset, reward_function
from sigmix.svf.tuner import svf_layers
from sigmix.tasks.base import Sample, Score
from sigmix.tasks.registry import get_task

pytest_plugins = ["helpers_cli"]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:'pin_memory':UserWarning")
STEPS, GROUP, BATCH = 3, 4, 8
COMMON = {
    "max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": 0.05, "bf16": False, "use_cpu": True,
    "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(home, monkeypatch):
    monkeypatch.setenv("SIGMIX_CACHE", str(home.cache))


class Watched:
    """A reward that keeps, for every step, the replies' ids and z as it was when they were sampled."""

    __name__ = "lower"

    def __init__(self, tokenizer):
        self.tokenizer, self.steps, self.model = tokenizer, [], None

    def __call__(self, prompts, completions, completion_ids, **_):
        z = {path: layer.svf_z["default"].weight.detach().clone() for path, layer in svf_layers(self.model).items()}
        ids = [self.tokenizer.apply_chat_template(one, add_generation_prompt=True)["input_ids"] for one in prompts]
        self.steps.append((z, ids, completion_ids))
        return [sum(map(str.islower, one[-1]["content"])) / 8 for one in completions]


def k3(policy, reference):
    """GRPO's estimate of the KL (Schulman's k3), per token."""
    return (reference - policy).exp() - (reference - policy) - 1


def k1(policy, reference):
    """RLOO's."""
    return policy - reference


KINDS = {"grpo": ("GRPO", k3), "rloo": ("RLOO", k1)}


def train(kind, model, folder, positions="all", **options):
    """A finished trainer and what its reward function saw; ``model`` a base or a PEFT model."""
    name, tokenizer = KINDS[kind][0], build_tokenizer()
    watch = Watched(tokenizer)
    trainer = getattr(trl, f"{name}Trainer")(
        model,
        reward_funcs=watch,
        args=getattr(trl, f"{name}Config")(
            str(folder), num_generations=GROUP, max_completion_length=6, chat_template_kwargs=CHAT,
            **{**COMMON, "beta": 0.1, **options},
        ),
        train_dataset=prompt_dataset(get_task("addition?digits=1").samples("train", 16), tokenizer),
        processing_class=tokenizer,
        peft_config=None if isinstance(model, PeftModel) else SVFConfig(positions=positions),
        callbacks=[KeepZ()],
    )  # fmt: skip
    watch.model = trainer.model
    trainer.train()
    return trainer, watch


def logprobs(model, prompt, reply):
    scores = alone(model, [*prompt, *reply])[len(prompt) - 1 : -1].log_softmax(-1)
    return scores.gather(1, torch.tensor(reply)[:, None])[:, 0]


@torch.no_grad()
def true_kl(kind, step, reference):
    """Mean over all reply tokens of a step, from dense weights: no PEFT, no TRL, no batch."""
    z, prompts, replies = step
    policy = dense(build_tiny(), z)
    pairs = list(zip(prompts, replies, strict=True))
    return float(torch.cat([KINDS[kind][1](logprobs(policy, *p), logprobs(reference, *p)) for p in pairs]).mean())


def logged(trainer, key="kl"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def others(model):
    return {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if ".svf_z." not in n}


@pytest.mark.parametrize("kind", KINDS)
def test_only_z_is_trained_and_the_kl_is_to_the_base(kind, tmp_path, home):
    trainer, watch = train(kind, load_base(home.base, "float32", "cpu")[0], tmp_path / "run")
    moved = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert moved == {n for n, _ in trainer.model.named_parameters() if n.endswith(".svf_z.default.weight")}
    base = build_tiny()
    state, found = others(base), others(trainer.model)
    assert all(torch.equal(found[f"base_model.model.{name}"], value) for name, value in state.items())
    assert all(not torch.equal(z, torch.ones_like(z)) for z in watch.steps[-1][0].values())

    kls = logged(trainer)
    assert len(kls) == len(watch.steps) == STEPS
    assert abs(kls[0]) < 1e-5  # float32: z = 1 and the base differ by rounding only
    for told, step in zip(kls[1:], watch.steps[1:], strict=True):
        assert abs(true_kl(kind, step, base)) > 1e-3
        assert told == pytest.approx(true_kl(kind, step, base), rel=1e-3, abs=1e-5)

    # what is saved is an expert: it loads, is sealed, and computes in the engine what the model computes in TRL
    trainer.save_model(tmp_path / f"by-{kind}")
    assert not Expert.from_pretrained(tmp_path / f"by-{kind}").verified
    model, tokenizer = load_base(home.base, "float32", "cpu")
    expert = seal(tmp_path / f"by-{kind}", model)
    assert Expert.from_pretrained(tmp_path / f"by-{kind}", base=model).verified
    ids = torch.tensor([[1, 40, 41, 42, 50, 60], [1, 70, 71, 72, 80, 90]])
    engine = Engine(model, tokenizer, bank={expert.name: expert})
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids, use_cache=False).logits
    for form in ("factored", "merged"):
        torch.testing.assert_close(
            engine.logits(ids, mix=Mix.one(expert.name), form=form), expected, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_from_an_adapter_takes_it_as_the_reference(kind, tmp_path):
    start = get_peft_model(build_tiny(), SVFConfig())
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in svf_layers(start).values():
            layer.svf_z["default"].weight += 0.6 * (torch.rand(layer.r, generator=draw) - 0.5)
    start.save_pretrained(tmp_path / "start")
    first = Expert.from_pretrained(tmp_path / "start").z
    model = PeftModel.from_pretrained(build_tiny(), tmp_path / "start", is_trainable=True)
    trainer, watch = train(kind, model, tmp_path / "run")
    layers = svf_layers(trainer.model)
    assert all(torch.equal(layers[path].svf_z["ref"].weight, z) for path, z in first.items())
    assert all(not torch.equal(layers[path].svf_z["default"].weight, z) for path, z in first.items())
    kls = logged(trainer)
    assert abs(kls[0]) < 1e-5
    reference = dense(build_tiny(), first)
    assert kls[-1] == pytest.approx(true_kl(kind, watch.steps[-1], reference), rel=1e-3, abs=1e-5)
    assert abs(true_kl(kind, watch.steps[-1], build_tiny()) - kls[-1]) > 1e-2, "the base would be another reference"
    trainer.save_model(tmp_path / "on")
    saved = Expert.from_pretrained(tmp_path / "on").z
    assert all(torch.equal(z, layers[path].svf_z["default"].weight) for path, z in saved.items())


def sft(model, tokenizer, samples, folder, positions="all", **options):
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(str(folder), **{**COMMON, **options}),
        train_dataset=gold_dataset(samples, model, tokenizer),
        processing_class=tokenizer,
        peft_config=None if isinstance(model, PeftModel) else SVFConfig(positions=positions),
        callbacks=[KeepZ()],
    )
    trainer.train()
    return trainer


def zs(trainer):
    return {path: layer.svf_z["default"].weight.detach() for path, layer in svf_layers(trainer.model).items()}


def test_sft_begins_at_the_bases_loss_with_and_without_checkpointing(tmp_path, tiny_tokenizer):
    samples = get_task("addition?digits=1").samples("train", BATCH)
    trained = {}
    for on in (True, False):
        trainer = sft(build_tiny(), tiny_tokenizer, samples, tmp_path, gradient_checkpointing=on)
        found = others(trainer.model)
        assert all(torch.equal(found[f"base_model.model.{n}"], value) for n, value in others(build_tiny()).items())
        trained[on] = zs(trainer)
    assert all(torch.equal(z, trained[False][path]) for path, z in trained[True].items())
    assert all(not torch.equal(z, torch.ones_like(z)) for z in trained[True].values())

    base = build_tiny()
    with torch.no_grad():
        end = tiny_tokenizer.eos_token_id
        each = [
            logprobs(base, encode(tiny_tokenizer, one.prompt), [*tiny_tokenizer.encode(one.gold), end])
            for one in samples
        ]
    losses = logged(trainer, "loss")
    assert float(losses[0]) == pytest.approx(-float(torch.cat(each).mean()), rel=1e-4)
    assert float(losses[-1]) < float(losses[0])


def test_a_bfloat16_base_keeps_z_in_float32_and_trains_it(tmp_path, tiny_tokenizer):
    samples = get_task("addition?digits=1").samples("train", BATCH)
    # steps of 1e-4 that bfloat16, with no number between 1 and 1.0078, would round away
    trainer = sft(build_tiny().to(torch.bfloat16), tiny_tokenizer, samples, tmp_path, learning_rate=1e-4)
    assert {z.dtype for z in zs(trainer).values()} == {torch.float32}
    assert all(0 < float((z - 1).abs().max()) < 1e-3 for z in zs(trainer).values())
    trainer.save_model(tmp_path / "saved")
    assert all(torch.equal(z, zs(trainer)[path]) for path, z in Expert.from_pretrained(tmp_path / "saved").z.items())


def test_z_stays_what_an_expert_may_hold(tmp_path, tiny_tokenizer):
    """z cast as TRL does on quantised bases; then a rate so high that a step would take factors below 0."""
    samples = get_task("addition?digits=1").samples("train", BATCH)
    model = get_peft_model(build_tiny(), SVFConfig())
    for layer in svf_layers(model).values():
        layer.svf_z["default"].weight.data = layer.svf_z["default"].weight.data.to(torch.bfloat16)
    KeepZ().on_init_end(None, None, None, model=model)
    assert {layer.svf_z["default"].weight.dtype for layer in svf_layers(model).values()} == {torch.float32}
    trainer = sft(build_tiny(), tiny_tokenizer, samples, tmp_path, learning_rate=1.5, max_steps=1)
    trainer.save_model(tmp_path / "saved")
    z = torch.cat(list(Expert.from_pretrained(tmp_path / "saved").z.values()))
    assert float(z.min()) == 0.0
    assert float(z.max()) > 1


def test_an_expert_of_a_quantised_base_is_sealed_to_it(tmp_path, home):
    pytest.importorskip("torchao")
    how = {"dtype": "bfloat16", "quantization_config": "int8"}
    get_peft_model(load_base(home.base, **how)[0], SVFConfig()).save_pretrained(tmp_path / "kept")
    finish(tmp_path / "kept", home.base, get_task("addition?digits=1"), objective="sft", n=2, **how)
    expert = Expert.from_pretrained(tmp_path / "kept", base=load_base(home.base, **how)[0])
    assert expert.meta["base"]["dtype"] == "bfloat16 in int8"


# ---------------------------------------------------------------------- z on prompts alone


def randomised(positions="prompt"):
    model = get_peft_model(build_tiny(), SVFConfig(positions=positions, task_type="CAUSAL_LM"))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in svf_layers(model).values():
            layer.svf_z["default"].weight += 0.6 * (torch.rand(layer.r, generator=draw) - 0.5)
    return model


def prompt_logprobs(z, prompt, reply):
    """Of decoding with the base over a prompt that was read under z, from dense weights."""
    rows = answer_scores(dense(build_tiny(), z), build_tiny(), prompt, reply)
    return rows.gather(1, torch.tensor(reply)[:, None])[:, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_rollouts_and_loss_of_prompt_positions_are_those_of_decoding(kind, tmp_path):
    trainer, watch = train(kind, build_tiny(), tmp_path / "run", "prompt")
    base, kls = build_tiny(), logged(trainer)
    assert abs(kls[0]) < 1e-5
    for kl, (z, prompts, replies) in zip(kls[1:], watch.steps[1:], strict=True):
        pairs = list(zip(prompts, replies, strict=True))
        each = [KINDS[kind][1](prompt_logprobs(z, *pair), logprobs(base, *pair)) for pair in pairs]
        assert kl == pytest.approx(float(torch.cat(each).mean()), rel=1e-3, abs=1e-5)
        assert abs(kl - true_kl(kind, (z, prompts, replies), base)) > 1e-4, "z at all positions has another KL"
    trainer.save_model(tmp_path / "saved")
    assert Expert.from_pretrained(tmp_path / "saved").positions == "prompt"

    _, watch = train(kind, randomised(), tmp_path / "greedy", max_steps=1, generation_kwargs={"do_sample": False})
    z, prompts, replies = watch.steps[0]
    for prompt, reply in zip(prompts, replies, strict=True):
        rows = answer_scores(dense(build_tiny(), z), build_tiny(), prompt, reply)
        assert rows.argmax(1).tolist() == list(reply)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_loss_of_sft_on_prompt_positions_is_that_of_decoding(checkpointing, tmp_path, tiny_tokenizer):
    samples = get_task("addition?digits=1").samples("train", BATCH)
    model = randomised()
    z = {path: layer.svf_z["default"].weight.detach().clone() for path, layer in svf_layers(model).items()}
    trainer = sft(model, tiny_tokenizer, samples, tmp_path, gradient_checkpointing=checkpointing)
    end = tiny_tokenizer.eos_token_id
    each = [
        prompt_logprobs(z, encode(tiny_tokenizer, one.prompt), [*tiny_tokenizer.encode(one.gold), end])
        for one in samples
    ]
    losses = logged(trainer, "loss")
    assert float(losses[0]) == pytest.approx(-float(torch.cat(each).mean()), rel=1e-4)
    assert float(losses[-1]) < float(losses[0])
    assert all(not torch.equal(value, z[path]) for path, value in zs(trainer).items())


def test_the_rewards_of_dpo_on_prompt_positions_are_those_of_decoding(tmp_path, tiny_tokenizer):
    from datasets import Dataset

    rows = [{"prompt": f"{n} + 1 is ", "chosen": str(n + 1), "rejected": "no"} for n in range(4)]
    trainer = trl.DPOTrainer(
        build_tiny(), args=trl.DPOConfig(str(tmp_path), **{**COMMON, "beta": 0.1, "max_steps": 2}),
        train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer,
        peft_config=SVFConfig(positions="prompt"), callbacks=[KeepZ()],
    )  # fmt: skip
    trainer.train()
    z, base = zs(trainer), build_tiny()
    expected = []
    for row in trainer.train_dataset:
        pair = row["prompt_ids"], row["chosen_ids"]
        expected.append(float((prompt_logprobs(z, *pair) - logprobs(base, *pair)).detach().sum()) * 0.1)
    found = trainer.evaluate(trainer.train_dataset)["eval_rewards/chosen"]
    assert found == pytest.approx(sum(expected) / 4, rel=1e-3, abs=1e-5)
    assert abs(found) > 1e-3


def test_a_dataset_without_prompts_is_refused(tmp_path, tiny_tokenizer):
    from datasets import Dataset

    trainer = trl.SFTTrainer(
        build_tiny(), args=trl.SFTConfig(str(tmp_path), **COMMON), processing_class=tiny_tokenizer,
        train_dataset=Dataset.from_list([{"text": "1 + 1 is 2"}] * 8), peft_config=SVFConfig(positions="prompt"),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="-100"):
        trainer.train()


# ---------------------------------------------------------------------- data


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_encoded_as_the_engine_encodes_them(kind, chat, tmp_path, tiny_tokenizer):
    if chat:  # a template that writes another prompt unless it is told not to think
        tiny_tokenizer.chat_template += "{% if enable_thinking is not defined or enable_thinking %}[think]{% endif %}"
    else:
        tiny_tokenizer.chat_template = None
    samples = [
        Sample.make("What is 1 + 1?", "2"), Sample.make("What is 2 + 2?", "4", system="Be brief."), *chats("Be brief.")
    ]  # fmt: skip
    data, name = prompt_dataset(samples, tiny_tokenizer), KINDS[kind][0]
    trainer = getattr(trl, f"{name}Trainer")(
        build_tiny(),
        reward_funcs=reward_function(get_task("addition"), samples),
        args=getattr(trl, f"{name}Config")(str(tmp_path), num_generations=2, chat_template_kwargs=CHAT, **COMMON),
        train_dataset=data,
        processing_class=tiny_tokenizer,
        peft_config=SVFConfig(),
    )
    found = trainer._tokenize_prompts([data[place]["prompt"] for place in range(4)])[0]
    assert [list(ids) for ids in found] == [encode(tiny_tokenizer, one.turns, one.system) for one in samples]
    assert "[think]" not in tiny_tokenizer.decode(found[0])
    texts = [message["content"] for message in chats()[0].turns]
    if chat:
        assert [message["content"] for message in data[2]["prompt"]] == texts
        assert [message["role"] for message in data[3]["prompt"]] == ["system", "user", "assistant", "user"]
    else:
        assert data[2]["prompt"] == "\n".join(texts)


def chats(system=None):
    """Conversations of three turns, without and with a system turn."""
    history = ({"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "It is 2"})
    ids = "no system", "system"
    return [Sample(id, "And 2 + 2?", "4", own, history=history) for id, own in zip(ids, (None, system), strict=True)]


def test_gold_replies_end_and_only_they_are_in_the_loss(tiny_tokenizer):
    samples = [*get_task("addition").samples("train", 5), *chats("Be brief.")]
    for row, one in zip(gold_dataset(samples, build_tiny(), tiny_tokenizer), samples, strict=True):
        prompt = encode(tiny_tokenizer, one.turns, one.system)
        reply = [*tiny_tokenizer.encode(one.gold), tiny_tokenizer.eos_token_id]
        assert row["input_ids"] == prompt + reply
        assert row["labels"] == [-100] * len(prompt) + reply


def test_the_reward_is_the_verifiers(tiny_tokenizer):
    task = get_task("addition")
    samples = task.samples("train", 3)
    reward = reward_function(task, samples)
    ids = [one.id for one in samples]
    assert reward(completions=[one.gold for one in samples], sample=ids) == [1.0] * 3
    assert reward(completions=[[{"role": "assistant", "content": "no"}]] * 3, sample=ids, other=1) == [-1.0] * 3
    task.score = lambda *_: Score(None)
    assert reward(completions=["x"] * 3, sample=ids) == [None] * 3
    with pytest.raises(ConfigError, match="prompt_dataset"):
        reward(completions=["x"], sample=["elsewhere"])
    with pytest.raises(ConfigError, match="'sample'"):
        reward(completions=["x"])
    with pytest.raises(DataError, match="task.samples"):
        prompt_dataset([], tiny_tokenizer)


# ---------------------------------------------------------------------- the examples


@pytest.mark.parametrize("kind", ["sft", "grpo", "rloo"])
def test_an_example_runs_from_end_to_end(kind, home, tmp_path, monkeypatch, capsys, run):
    script = Path(__file__).parents[2] / "examples" / f"trl_{kind}.py"
    out = tmp_path / f"mine-{kind}"
    words = f"--base {home.base} --task addition?digits=1 --out {out} --max-steps 2 --per-device-train-batch-size 8"
    words += " --max-eval-samples 4 --max-train-samples 16"
    monkeypatch.setattr(sys, "argv", [str(script), *words.split()])
    runpy.run_path(str(script), run_name="__main__")
    output = capsys.readouterr().out
    assert "base: " in output
    assert f"mine-{kind}: " in output
    expert = Expert.from_pretrained(out, base=load_base(home.base)[0])
    assert expert.verified
    assert expert.meta["objective"] == kind
    assert expert.meta["metrics"][0]["n"] == 4
    assert json.loads((out / "sigmix.json").read_text())["training"]["max_steps"] == 2
    with pytest.raises(OutputError, match="--out"):  # before it trains anew
        runpy.run_path(str(script), run_name="__main__")
    assert Expert.from_pretrained(out) == expert
    (out / "sigmix.json").unlink()  # as it would be without the helper
    dtype = str(load_base(home.base)[0].dtype).removeprefix("torch.")
    done = run("experts", "verify", out, "--base", home.base, "--dtype", dtype, "--seal", "--json")
    assert done.json["ok"]
    assert done.json["sealed"]
    sealed = {key: thaw(expert.meta)[key] for key in (*COMPUTED, "positions")}
    assert Expert.from_pretrained(out) == Expert(expert.name, expert.z, sealed)
