"""Training configuration and learning rate schedule."""

from __future__ import annotations

import dataclasses
import json

import pytest

from sigmix.errors import ConfigError, UnknownNameError
from sigmix.train.config import PRESETS, TrainConfig, make_config
from sigmix.train.objectives import learning_rate

BAD = [
    ("objective", "ppo"), ("policy", "full"), ("baseline", "median"), ("kl_estimator", "k1"),
    ("parametrization", "log"), ("lr_scheduler_type", "linear"), ("max_steps", 0), ("generation_batch_size", 0),
    ("num_generations", 0), ("eval_steps", 0), ("max_eval_samples", 0), ("per_device_train_batch_size", 0),
    ("learning_rate", 0.0), ("learning_rate", float("nan")), ("max_grad_norm", 0.0), ("max_grad_norm", -1.0),
    ("kl_limit", 0.0), ("beta", -0.1), ("beta", float("nan")), ("temperature", -1.0), ("temperature", float("nan")),
    ("early_stopping_patience", -1), ("format_reward", -0.1), ("format_reward", 1.0), ("num_generations", 7),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_values_are_named(name, value):
    with pytest.raises(ConfigError, match=name):
        TrainConfig("letter", **{name: value})


def test_leave_one_out_needs_another():
    with pytest.raises(ConfigError, match="generation_batch_size"):
        TrainConfig("letter", generation_batch_size=1, num_generations=1)
    assert TrainConfig("letter", generation_batch_size=1, num_generations=1, baseline="none").generation_batch_size == 1


def test_every_field_has_a_help_text():
    from sigmix import TrainConfig as public

    assert public is TrainConfig
    assert all(field.metadata["help"] for field in dataclasses.fields(TrainConfig))


def test_frozen():
    with pytest.raises(AttributeError):
        TrainConfig("letter").max_steps = 3


def test_unknown_options_and_presets():
    with pytest.raises(UnknownNameError, match="'lr'"):
        make_config(task="letter", lr=1)
    with pytest.raises(UnknownNameError, match="'papers'.*paper"):
        make_config("papers", task="letter")


def test_none_is_not_given():
    assert make_config(task="letter", learning_rate=None, max_steps=None) == TrainConfig("letter")
    assert make_config("paper", task="letter", max_grad_norm=None, max_steps=3).max_grad_norm == 1e-3
    assert make_config("paper", task="letter", max_grad_norm=None, max_steps=3).max_steps == 3
    assert make_config("paper", task="letter", early_stopping_patience=0).early_stopping_patience == 0


def test_the_papers_values():
    # arXiv 2501.06252, Table 6 (hyper-parameters) and section 3.2
    config = make_config("paper", task="letter")
    assert (config.learning_rate, config.generation_batch_size, config.max_grad_norm) == (2e-3, 256, 1e-3)
    assert config.beta in (0.0, 0.1, 0.2, 0.3)
    assert (config.lr_scheduler_type, config.objective, config.policy) == ("cosine", "reinforce", "svf")
    assert (config.baseline, config.num_generations, config.format_reward) == ("none", 1, 0.0)  # Eq. 1 has r alone, ±1
    assert config.kl_estimator == "exact"
    assert config.early_stopping_patience > 0  # early stopping
    assert config.preset == "paper"
    assert set(PRESETS) == {"laptop", "paper"}


def test_difference_names_fields_across_json():
    mine = make_config(task="letter", layers_to_transform=[0, 1])
    stored = json.loads(json.dumps(mine.to_dict()))
    assert mine.difference(stored) == []
    assert mine.difference({**stored, "learning_rate": 1.0, "seed": 5}) == ["learning_rate", "seed"]
    del stored["kl_limit"]  # a run of before there was such an option
    assert mine.difference({**stored, "gone": 1}) == ["gone", "kl_limit"]


def test_cosine_goes_from_lr_to_zero():
    config = make_config(task="letter", max_steps=10, learning_rate=0.2)
    rates = [learning_rate(config, step) for step in range(11)]
    assert rates[0] == 0.2
    assert rates[5] == pytest.approx(0.1)
    assert rates[10] == pytest.approx(0.0, abs=1e-12)
    assert rates == sorted(set(rates), reverse=True)
    constant = make_config(task="letter", max_steps=10, learning_rate=0.2, lr_scheduler_type="constant")
    assert {learning_rate(constant, step) for step in range(10)} == {0.2}
