"""Configuration of a training run, with the names of TRL's `GRPOConfig` and transformers' `TrainingArguments`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from sigmix.errors import ConfigError, UnknownNameError
from sigmix.svf.config import POSITIONS


def _option(default: Any, help: str, **limits: Any) -> Any:
    """Return a dataclass field with a help text and limits (`choices`, `ge`, `gt`, `lt`) in its metadata."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class TrainConfig:
    """Configuration of a training run.

    Two runs with equal configurations give the same expert, bit for bit on a CPU. Each field's ``metadata`` holds its
    help text and its limits; the options of ``sigmix train`` are generated from them.

    The objective (Eq. 1 of arXiv 2501.06252, reward r in [-1, 1], baseline b):

        J = mean over completions of [ (r - b) Σₜ log π(yₜ) - beta Σₜ KLₜ(π_W' ‖ π_W) ]

    Raises:
        ConfigError: a value is out of its limits, or two options cannot be combined.
    """

    task: str = field(metadata={"help": "Task to learn: a name that `sigmix tasks` lists, rg:NAME, or file.py:NAME."})
    base: str = _option("smollm2-135m", "Base model: smollm2-135m, a hub name, a folder or a .gguf file.")
    dtype: str | None = _option(None, "dtype of the base's weights, such as float32. Default: the faster one here.")
    quantization: str | None = _option(None, "Quantization of the base's linear layers: int8, int4 or nf4.")
    preset: str = _option("laptop", "Preset of defaults: laptop (two CPU cores) or paper (Table 6).")
    seed: int = _option(0, "Random seed.")
    objective: str = _option(
        "reinforce", "Training objective: reinforce (Eq. 1) or sft (next token on gold replies).",
        choices=("reinforce", "sft"),
    )  # fmt: skip
    policy: str = _option(
        "svf", "Adapter to train: svf, or PEFT's lora or ia3 for comparison.", choices=("svf", "lora", "ia3")
    )
    positions: str = _option(
        "all", "Tokens on which the adapter acts: all, or prompt (answers are decoded by the base).", choices=POSITIONS
    )
    max_steps: int = _option(40, "Optimizer steps.", ge=1)
    generation_batch_size: int = _option(
        64, "Completions per optimizer step, over all processes; a multiple of num_generations.", ge=1
    )
    num_generations: int = _option(4, "Completions per prompt.", ge=1)
    per_device_train_batch_size: int = _option(
        64, "Rows per forward and backward pass in each process. Bounds memory; gradients are accumulated.", ge=1
    )
    learning_rate: float = _option(2e-3, "Peak learning rate of AdamW (without weight decay).", gt=0)
    lr_scheduler_type: str = _option(
        "cosine", "Learning rate schedule: cosine (to zero over max_steps) or constant.", choices=("cosine", "constant")
    )
    max_grad_norm: float = _option(1.0, "Maximum gradient norm.", gt=0)
    beta: float = _option(0.05, "KL coefficient; 0 skips the reference model.", ge=0)
    kl_estimator: str = _option(
        "exact", "KL estimator: exact (sum over the vocabulary) or k3 (of the sampled tokens).", choices=("exact", "k3")
    )
    baseline: str = _option(
        "leave-one-out",
        "Reward baseline: none, mean (of the batch), or leave-one-out (of the prompt's other completions, or of the "
        "batch's if num_generations is 1).",
        choices=("none", "mean", "leave-one-out"),
    )
    temperature: float = _option(1.0, "Sampling temperature of the rollouts; 0 is greedy.", ge=0)
    max_new_tokens: int | None = _option(None, "Maximum tokens of a completion. Default: the task's.", ge=1)
    eval_steps: int = _option(10, "Optimizer steps between validations.", ge=1)
    max_eval_samples: int = _option(128, "Validation items.", ge=1)
    early_stopping_patience: int = _option(
        0, "Validations without improvement before training stops; 0 disables early stopping.", ge=0
    )
    max_train_samples: int | None = _option(None, "Distinct training prompts. Default: as many as the steps use.", ge=1)
    target_modules: str | list[str] = field(
        default="all-linear",
        metadata={
            "help": "Modules to adapt: all-linear, attention, mlp, or comma-separated module names.",
            "option": "--targets",
        },
    )
    layers_to_transform: str | list[int] | None = field(
        default=None,
        metadata={
            "help": "Layers to adapt: half, or comma-separated layer numbers. Default: all.",
            "option": "--layers",
        },
    )
    # rewards well-formed but wrong replies, since a small model's first replies are often all malformed
    format_reward: float = _option(
        0.5, "Bonus on the reward -1 of a wrong reply from which the grader could read an answer.", ge=0, lt=1
    )
    parametrization: str = _option(
        "direct", "Parametrization of z: direct (z = 1 + p) or reference (sigmoid, as in the public implementation).",
        choices=("direct", "reference"),
    )  # fmt: skip
    kl_limit: float = _option(10.0, "Mean KL in nats per token above which the run is stopped as collapsed.", gt=0)
    init_from: str | None = _option(None, "Folder of a saved expert or adapter with the initial parameters.")
    lora_r: int = _option(16, "Rank of LoRA.", ge=1)
    lora_alpha: int = _option(32, "Scale of LoRA.")
    lora_dropout: float = _option(0.0, "Dropout of LoRA.", ge=0, lt=1)

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            _check(option.name, getattr(self, option.name), option.metadata)
        if self.generation_batch_size % self.num_generations:
            raise ConfigError(
                f"generation_batch_size {self.generation_batch_size} is not a multiple of num_generations "
                f"{self.num_generations}"
            )
        if self.baseline == "leave-one-out" and self.generation_batch_size == 1:
            raise ConfigError("a leave-one-out baseline needs a generation_batch_size of at least 2")
        if self.init_from is not None and self.parametrization != "direct":
            raise ConfigError("init_from requires the direct parametrization")
        if self.policy == "svf":
            return
        if self.layers_to_transform is not None or self.parametrization != "direct":
            raise ConfigError(f"layers_to_transform and parametrization are options of policy svf, not {self.policy}")
        if self.quantization is not None:
            raise ConfigError(f"a quantized base requires policy svf, not {self.policy}")
        if self.policy == "ia3" and self.target_modules != "all-linear":
            raise ConfigError("target_modules cannot be set with policy ia3, which adapts the modules of PEFT's table")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)

    def difference(self, other: dict[str, Any]) -> list[str]:
        """Return the names of the fields that differ from a stored configuration."""
        mine = self.to_dict()
        return sorted(key for key in mine.keys() | other.keys() if mine.get(key) != other.get(key))


def _check(name: str, value: Any, limits: Any) -> None:
    if value is None:
        return
    if isinstance(value, float) and math.isinf(value):
        raise ConfigError(f"{name} must be finite, not {value}")
    if "choices" in limits and value not in limits["choices"]:
        raise ConfigError(f"{name} must be one of {', '.join(limits['choices'])}, not {value!r}")
    # written so that NaN fails every comparison
    if "ge" in limits and not value >= limits["ge"]:
        raise ConfigError(f"{name} must be at least {limits['ge']}, not {value}")
    if "gt" in limits and not value > limits["gt"]:
        raise ConfigError(f"{name} must be above {limits['gt']}, not {value}")
    if "lt" in limits and not value < limits["lt"]:
        raise ConfigError(f"{name} must be below {limits['lt']}, not {value}")


OBJECTIVES: dict[str, dict[str, Any]] = {
    "reinforce": {},
    # rows of a step and rate: chosen by a sweep on validation rows of other data (benchmarks/README.md, Own data)
    "sft": {"num_generations": 1, "beta": 0.0, "learning_rate": 2e-2, "generation_batch_size": 16},
}
"""Defaults of the objectives, where the preset has none."""

PRESETS: dict[str, dict[str, Any]] = {
    "laptop": {},  # for two CPU cores; chosen by validation accuracy
    # Table 6 and appendix A.1 of the paper, where beta is one of 0, 0.1, 0.2, 0.3 by validation
    "paper": {
        "generation_batch_size": 256,
        "num_generations": 1,
        "learning_rate": 2e-3,
        "max_grad_norm": 1e-3,
        "beta": 0.1,
        "baseline": "none",
        "format_reward": 0.0,
        "max_steps": 200,
        "max_eval_samples": 512,
        "early_stopping_patience": 5,
    },
}


def make_config(preset: str = "laptop", **options: Any) -> TrainConfig:
    """Return the configuration of a preset with some options replaced; an option of None keeps the default.

    Defaults are the preset's, then the objective's (`OBJECTIVES`), then those of the fields.

    Raises:
        UnknownNameError: no such preset or option. ConfigError: a value is invalid.
    """
    if preset not in PRESETS:
        raise UnknownNameError("preset", preset, PRESETS)
    options = {name: value for name, value in options.items() if value is not None}
    names = {option.name for option in dataclasses.fields(TrainConfig)}
    for name in options.keys() - names:
        raise UnknownNameError("training option", name, names)
    objective = options.get("objective", "reinforce")
    return TrainConfig(**{**OBJECTIVES.get(objective, {}), **PRESETS[preset], "preset": preset, **options})
