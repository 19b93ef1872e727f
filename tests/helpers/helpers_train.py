"""A task that a tiny random model can learn, and makers of learners and trainers on it."""

from __future__ import annotations

import torch

from sigmix.tasks.base import Sample, Score, Task
from sigmix.train.config import TrainConfig
from sigmix.train.objectives import Learner
from sigmix.train.policy import make_policy
from sigmix.train.rollout import Actor
from sigmix.train.trainer import Trainer


class Letter(Task):
    """Right is every reply that begins with one letter; the tiny Llama begins with "w" in 2 % of its answers.

    Args:
        unscorable: replies that begin with one of these cannot be judged.
        value: what a right reply scores.
    """

    name, domain, description = "letter", "format", "Begin with one letter."
    max_new_tokens = 2

    def __init__(self, letter: str = "w", unscorable: str = "", value: float = 1.0):
        super().__init__()
        self.letter, self.unscorable, self.value = letter, unscorable, value

    def samples(self, split, n=None, seed=0):
        return [Sample.make(f"{split} {'long ' * (i % 3)}{i}?", self.letter) for i in range(n or 16)]

    def score(self, sample, reply):
        if reply[:1] and reply[0] in self.unscorable:
            return Score(None)
        right = reply.startswith(self.letter)
        return Score(self.value if right else 0.0, reply[:1] or None)


# answers of two tokens to 32 prompts; z of a tiny model must move far to change anything, so the rate is high
DEFAULTS = {"task": "letter", "base": "tiny", "max_steps": 6, "generation_batch_size": 32, "num_generations": 4,
            "learning_rate": 0.05, "max_grad_norm": 1e9, "eval_steps": 2, "max_eval_samples": 16,
            "format_reward": 0.0}  # fmt: skip


def config(**changes) -> TrainConfig:
    return TrainConfig(**{**DEFAULTS, **changes})


def learner(model, tokenizer, task=None, **changes) -> Learner:
    settings = config(**changes)
    task = task or Letter()
    policy = make_policy(model, settings)
    return Learner(policy, Actor(policy.model, tokenizer, task, policy.prompt_only), settings, task.max_new_tokens)


def trainer(model, tokenizer, folder, on_log=None, task=None, **changes) -> Trainer:
    return Trainer(model, tokenizer, task or Letter(), config(**changes), folder, "letter", on_log)


def shake(policy, seed: int = 0, width: float = 0.4) -> None:
    """Random z, so that a policy is not the base."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter += width * (torch.rand(parameter.shape, generator=draw) - 0.5)


def without_seconds(history):
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in history]
