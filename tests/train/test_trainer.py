"""A run: validation chooses the expert, divergence stops it with a diagnosis, and a tiny model learns."""

from __future__ import annotations

import json

import pytest
import torch
from helpers_architectures import build
from helpers_train import Letter, config, trainer

from sigmix.errors import ConfigError, ContextError, DivergedError
from sigmix.experts.expert import Expert
from sigmix.experts.fingerprint import fingerprint
from sigmix.tasks.base import Sample, Score
from sigmix.train.checkpointing import RunDir
from sigmix.train.trainer import plot_curve

pytestmark = pytest.mark.usefixtures("cache")


def entries(run, kind):
    return [entry for entry in run.run.history() if entry["kind"] == kind]


class Scripted(Letter):
    """Validation accuracies follow a script, whatever is replied; training is as ever."""

    def __init__(self, script):
        super().__init__()
        self.script, self.calls = script, 0

    def score(self, sample, reply):
        if not sample.prompt.startswith("validation"):
            return super().score(sample, reply)
        place, item = divmod(self.calls, 10)
        self.calls += 1
        return Score.of(item < self.script[place], reply)


# ------------------------------------------------------------------ the course of a run


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["reinforce", "sft"])
@pytest.mark.parametrize("name", ["lfm2", "qwen3_5_text", "deepseek_v3", "phi3, longrope"])
def test_a_run_of_other_architectures(tiny_tokenizer, tmp_path, name, objective):
    own = {"num_generations": 1, "generation_batch_size": 8} if objective == "sft" else {}
    run = trainer(build(name), tiny_tokenizer, tmp_path / "run", task=Letter(), objective=objective, **own)
    run.fit()
    steps = entries(run, "step")
    assert len(steps) == 6
    assert all(entry["grad_norm"] > 0 for entry in steps if objective == "sft" or 0 < entry["reward"] < 1)


def test_a_run_from_beginning_to_end(tiny, tiny_tokenizer, tmp_path):
    logged = []
    run = trainer(tiny(), tiny_tokenizer, tmp_path / "run", logged.append)
    expert = run.fit()
    assert expert.requests.base == fingerprint(run.policy.model)
    prompts = {sample.prompt for sample in run.stream.samples}
    assert expert.requests.facts["train_n"] == len(prompts)
    history = run.run.history()
    shown = [entry["samples"] for entry in history if entry["kind"] == "validation"]
    assert all(0 < len(samples) <= 3 for samples in shown)
    assert {*shown[0][0]} == {"prompt", "gold", "reply", "score"}
    assert history == logged
    assert [(e["kind"], e["step"]) for e in history] == [
        ("validation", 0), ("step", 0), ("step", 1), ("validation", 2), ("step", 2), ("step", 3), ("validation", 4),
        ("step", 4), ("step", 5), ("validation", 6),
    ]  # fmt: skip
    assert json.loads((tmp_path / "run/config.json").read_text()) == config(dtype="float32").to_dict()
    assert (tmp_path / "run/curve.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "best", "checkpoint", "config.json", "curve.png", "lock", "metrics.jsonl",
    ]  # fmt: skip
    seconds = [entry["seconds"] for entry in history]
    assert seconds == sorted(seconds)
    meta = expert.meta
    assert (expert.name, meta["task"], meta["domain"], meta["seed"]) == ("letter", "letter", "format", 0)
    assert meta["training"]["step"] == run.best["step"]
    assert meta["metrics"][0]["value"] == run.best["accuracy"]
    assert meta["metrics"][0]["n"] == 16
    expert.check(tiny())
    assert fingerprint(run.policy.model, fresh=True) == fingerprint(tiny())


def test_the_best_by_validation_is_returned_not_the_last(tiny, tiny_tokenizer, tmp_path):
    kept = {}
    run = trainer(tiny(), tiny_tokenizer, tmp_path, task=Scripted([3, 5, 8, 8]), max_eval_samples=10)
    run.on_log = lambda entry: kept.update({run.step: run.policy.z()} if entry["kind"] == "validation" else {})
    expert = run.fit()
    assert run.best == {"accuracy": 0.8, "step": 4}  # of equal ones the earlier
    assert [entry["best"] for entry in entries(run, "validation")] == [True, True, True, False]
    assert all(torch.equal(expert.z[path], z) for path, z in kept[4].items())
    assert any(not torch.equal(expert.z[path], z) for path, z in kept[6].items())
    assert expert.meta["metrics"][0]["value"] == 0.8


class Graded(Scripted):
    """As `Scripted`, with pairs: how many of ten replies get full marks, and how many half of them."""

    def score(self, sample, reply):
        if not sample.prompt.startswith("validation"):
            return super().score(sample, reply)
        place, item = divmod(self.calls, 10)
        self.calls += 1
        full, half = self.script[place]
        return Score(1.0 if item < full else 0.5 if item < full + half else 0.0, reply)


def test_where_replies_are_right_in_part_the_mean_score_chooses(tiny, tiny_tokenizer, tmp_path):
    task = Graded([(3, 0), (2, 6), (3, 4), (4, 1)])
    run = trainer(tiny(), tiny_tokenizer, tmp_path, task=task, max_eval_samples=10)
    expert = run.fit()
    # more score with fewer full marks; then as much score with more full marks; then full marks alone
    assert [entry["best"] for entry in entries(run, "validation")] == [True, True, True, False]
    assert run.best == {"accuracy": 0.3, "mean_score": 0.5, "step": 4}
    assert (expert.meta["metrics"][0]["value"], expert.meta["metrics"][0]["mean_score"]) == (0.3, 0.5)


def test_a_base_that_nothing_beats_is_the_expert(tiny, tiny_tokenizer, tmp_path):
    expert = trainer(tiny(), tiny_tokenizer, tmp_path, task=Scripted([9, 1, 1, 1]), max_eval_samples=10).fit()
    assert all(torch.equal(z, torch.ones_like(z)) for z in expert.z.values())


def test_patience_stops(tiny, tiny_tokenizer, tmp_path):
    run = trainer(
        tiny(),
        tiny_tokenizer,
        tmp_path,
        task=Scripted([3, 5, 4, 5, 9, 9]),
        max_eval_samples=10,
        early_stopping_patience=2,
        max_steps=10,
    )
    run.fit()
    assert run.step == 6
    assert [entry["accuracy"] for entry in entries(run, "validation")] == [0.3, 0.5, 0.4, 0.5]


def test_test_items_are_not_touched(tiny, tiny_tokenizer, tmp_path):
    class Watched(Letter):
        def samples(self, split, n=None, seed=0):
            assert split != "test"
            return super().samples(split, n, seed)

    trainer(tiny(), tiny_tokenizer, tmp_path, task=Watched(), max_steps=2).fit()


@pytest.mark.parametrize("options", [
    {},
    pytest.param({"policy": "lora", "learning_rate": 0.01}, marks=pytest.mark.slow),
    pytest.param({"objective": "sft", "num_generations": 1, "generation_batch_size": 16}, marks=pytest.mark.slow),
    pytest.param({"parametrization": "reference", "learning_rate": 0.3}, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_tiny_model_learns(tiny, tiny_tokenizer, tmp_path, options):
    options = {"generation_batch_size": 64, **options}
    run = trainer(tiny(), tiny_tokenizer, tmp_path, max_steps=30, eval_steps=10, beta=0.01, kl_limit=20.0, **options)
    run.fit()
    accuracy = [entry["accuracy"] for entry in entries(run, "validation")]
    assert accuracy[0] <= 0.2
    assert run.best["accuracy"] >= 0.8
    if run.config.objective == "reinforce":
        right = [entry["right"] for entry in entries(run, "step")]
        assert sum(right[:3]) / 3 < 0.15
        assert sum(right[-3:]) / 3 > 0.7


# ------------------------------------------------------------------ errors


class Poisoned(Letter):
    """From a given number of training scores on, right and wrong are infinite."""

    def __init__(self, after):
        super().__init__()
        self.left = after

    def score(self, sample, reply):
        if sample.prompt.startswith("train"):
            self.left -= 1
            if self.left < 0:
                return Score(float("inf"), reply)
        return super().score(sample, reply)


def test_nan_stops_the_run_and_the_best_expert_stays(tiny, tiny_tokenizer, tmp_path):
    run = trainer(tiny(), tiny_tokenizer, tmp_path, task=Poisoned(3 * 32), baseline="mean")
    with pytest.raises(DivergedError, match=r"step 3: .*nan.*--learning-rate"):
        run.fit()
    best = Expert.from_pretrained(tmp_path / "best", base=tiny())
    assert best.meta["training"]["step"] in (0, 2)
    assert all(bool(z.isfinite().all()) for z in run.policy.z().values())  # the bad step was not taken
    with RunDir(tmp_path).locked():  # the folder is free again
        pass


def test_kl_limit(tiny, tiny_tokenizer, tmp_path):
    run = trainer(tiny(), tiny_tokenizer, tmp_path, learning_rate=0.5, kl_limit=0.05, format_reward=0.5, max_steps=20)
    with pytest.raises(DivergedError, match=r"0\.05.*--kl-limit"):
        run.fit()
    assert entries(run, "step")[-1]["kl"] > 0.05
    assert all(entry["kl"] <= 0.05 for entry in entries(run, "step")[:-1])
    assert Expert.from_pretrained(run.run.best).name == "letter"


def test_a_constant_answer_is_diagnosed(tiny, tiny_tokenizer, tmp_path):
    # greedy answers to one prompt are all alike, and the letter is one that never comes
    options = {"temperature": 0.0, "max_train_samples": 1, "max_steps": 20, "learning_rate": 1e-4}
    run = trainer(tiny(), tiny_tokenizer, tmp_path, task=Letter("\n"), **options)
    with pytest.raises(DivergedError, match=r"step 4: .*--beta"):
        run.fit()
    assert len(entries(run, "step")) == 5


def test_a_constant_answer_that_is_right_is_fine(tiny, tiny_tokenizer, tmp_path):
    class Anything(Letter):
        def score(self, sample, reply):
            return Score.of(True, reply)

    run = trainer(
        tiny(),
        tiny_tokenizer,
        tmp_path,
        task=Anything(),
        temperature=0.0,
        max_train_samples=1,
        max_steps=8,
        learning_rate=1e-4,
    )
    run.fit()
    assert run.step == 8


def test_a_prompt_over_the_context(tiny, tiny_tokenizer, tmp_path):
    class Long(Letter):
        def samples(self, split, n=None, seed=0):
            return [Sample.make(f"{split} " + "x" * 300, "w")]

    with pytest.raises(ContextError, match="sample .* of letter"):
        trainer(tiny(), tiny_tokenizer, tmp_path, task=Long()).fit()


def test_a_configuration_for_another_dtype_is_refused(tiny, tiny_tokenizer, tmp_path):
    assert trainer(tiny(), tiny_tokenizer, tmp_path).config.dtype == "float32"
    with pytest.raises(ConfigError, match="bfloat16.*float32"):
        trainer(tiny(), tiny_tokenizer, tmp_path, dtype="bfloat16")


def test_a_curve_of_a_run_without_validation(tmp_path):
    step = {"kind": "step", "step": 0, "right": 0.1, "kl": 0.0, "entropy": 1.0}
    plot_curve([step], tmp_path / "curve.png", "a run")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
