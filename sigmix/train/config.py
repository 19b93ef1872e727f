"""One frozen configuration for a training run, its presets, and the checks on it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from sigmix.errors import ConfigError, UnknownNameError

CHOICES = {
    "objective": ("reinforce", "sft"),
    "policy": ("svf", "lora", "ia3"),
    "baseline": ("none", "mean", "leave-one-out"),
    "kl": ("exact", "k3"),
    "parameterisation": ("direct", "reference"),
}


@dataclass(frozen=True)
class TrainConfig:
    """All that decides a run; two runs with equal configurations give the same expert, bit for bit on CPU.

    The objective (Eq. 1 of the paper, reward in [-1, 1]):
        J = mean over answers of [ (r - b) Σₜ log π(yₜ) - kl_weight Σₜ KLₜ(π_W' ‖ π_W) ]

    Attributes:
        task: spec of the task. base: name of the base. seed: of everything random.
        dtype: of the base's weights, such as "float32"; None: as the base is loaded, which the trainer records.
        quantization: of the base, see `load_base`; z then learns in the gain form.
        steps: optimiser steps. batch: answers per step. group: answers per prompt; batch / group prompts a step.
        lr: peak learning rate (AdamW, no weight decay). schedule: cosine to zero over `steps`, or constant.
        clip: largest norm of the gradient. kl_weight: λ. kl: "exact" (sum over the vocabulary) or "k3" (sampled).
        baseline: "none", "mean" of the batch, or "leave-one-out" in the group (in the batch if group is 1).
        temperature: of the rollouts; 0 is greedy. max_new_tokens: None takes the task's.
        eval_every: steps between validations. eval_n: validation items. patience: validations without a new best
            before stopping; 0 never stops. train_n: distinct training prompts; None: as many as the steps use, or all
            of a finite set.
        micro: rows per forward/backward pass; bounds memory, changes no result but rounding.
        targets: target_modules of `SVFConfig`. layers: None, "half" or indices.
        form_reward: added to the reward -1 of a wrong reply from which the verifier could read an answer. A small model
            asked for one word writes sentences, so that at first no reply at all is right; this lets it find the form.
            It never makes a wrong reply as good as a right one, and evaluation does not know it.
        parameterisation: "direct" (z = 1 + p) or "reference" (sigmoid, see `svf.gains.reference_z`).
        kl_limit: mean KL in nats per token beyond which the run counts as collapsed; without effect at kl_weight 0,
            where the base is not run at all.
        start: folder of a saved expert or adapter whose parameters the run starts from, as training one adapter on
            several tasks in turn does; the KL is still to the base.
        lora_rank, lora_alpha, lora_dropout: of the LoRA policy.
    """

    task: str
    base: str = "smollm2-135m"
    dtype: str | None = None
    quantization: str | None = None
    preset: str = "laptop"
    seed: int = 0
    objective: str = "reinforce"
    policy: str = "svf"
    steps: int = 40
    batch: int = 64
    group: int = 4
    lr: float = 2e-3
    schedule: str = "cosine"
    clip: float = 1.0
    kl_weight: float = 0.05
    kl: str = "exact"
    baseline: str = "leave-one-out"
    temperature: float = 1.0
    max_new_tokens: int | None = None
    eval_every: int = 10
    eval_n: int = 128
    patience: int = 0
    train_n: int | None = None
    micro: int = 64
    targets: str | list[str] = "all-linear"
    layers: str | list[int] | None = None
    parameterisation: str = "direct"
    form_reward: float = 0.5
    kl_limit: float = 10.0
    start: str | None = None
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        for name in ("steps", "batch", "group", "eval_every", "eval_n", "micro"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("lr", "clip", "kl_limit"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        if not (self.kl_weight >= 0 and self.temperature >= 0 and self.patience >= 0):
            raise ConfigError("kl_weight, temperature and patience cannot be negative")
        if not 0 <= self.form_reward < 1:
            raise ConfigError(f"form_reward must be in [0, 1), not {self.form_reward}")
        if self.schedule not in ("cosine", "constant"):
            raise ConfigError(f"schedule must be cosine or constant, not {self.schedule!r}")
        if self.batch % self.group:
            raise ConfigError(f"batch {self.batch} is not a multiple of group {self.group}")
        if self.policy != "svf" and (self.layers is not None or self.parameterisation != "direct"):
            raise ConfigError(
                f"layers and parameterisation belong to the svf policy; {self.policy} adapts all of its targets"
            )
        if self.policy != "svf" and self.quantization is not None:
            raise ConfigError(f"a quantised base is for the svf policy, not {self.policy}")
        if self.policy == "ia3" and self.targets != "all-linear":
            raise ConfigError("ia3 adapts the modules that PEFT's own table names; leave targets out")
        if self.start is not None and self.parameterisation != "direct":
            raise ConfigError("start goes with the direct parameterisation only")
        if self.baseline == "leave-one-out" and self.batch == 1:
            raise ConfigError("a leave-one-out baseline needs a batch of at least 2")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def difference(self, other: dict[str, Any]) -> list[str]:
        """Names of the fields in which a stored configuration differs from this one."""
        mine = self.to_dict()
        return sorted(key for key in mine.keys() | other.keys() if mine.get(key) != other.get(key))


PRESETS: dict[str, dict[str, Any]] = {
    # ours, for two CPU cores; chosen on validation accuracy only
    "laptop": {},
    # Table 6 and appendix A.1 of the paper; λ is one of 0, 0.1, 0.2, 0.3 by validation
    "paper": {
        "batch": 256,
        "group": 1,
        "lr": 2e-3,
        "clip": 1e-3,
        "kl_weight": 0.1,
        "baseline": "none",
        "form_reward": 0.0,
        "steps": 200,
        "eval_n": 512,
        "patience": 5,
    },
}


def make_config(preset: str = "laptop", **given: Any) -> TrainConfig:
    """A configuration from a preset and what differs from it; values of None in ``given`` count as not given.

    Raises:
        UnknownNameError: no such preset or option. ConfigError: a value that cannot work.
    """
    if preset not in PRESETS:
        raise UnknownNameError("preset", preset, PRESETS)
    given = {key: value for key, value in given.items() if value is not None}
    fields = {f.name for f in dataclasses.fields(TrainConfig)}
    for name in given.keys() - fields:
        raise UnknownNameError("training option", name, fields)
    return TrainConfig(**{**PRESETS[preset], "preset": preset, **given})
