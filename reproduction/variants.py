"""Training variants of a study: z that acts on the first answer tokens too, answers trained both ways, an L1 penalty.

They are a `Kind`'s: `answer_tokens` K is z on the prompt and on K tokens of the answer (which decide the tokens 2 to
K + 1; the first comes from the prompt); `both` lets z act on all tokens of one half of a step's answers, and on the
prompt's alone of the other half; `l1` takes a proximal step of this strength times the learning rate after each step of
the optimizer, which makes gains exactly 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from reproduction.scale import Kind
from sigmix.engine.kv_cache import Prefilled
from sigmix.evals.accuracy import Result
from sigmix.experts.expert import Expert
from sigmix.svf.config import POSITIONS
from sigmix.svf.layer import SVFLinear, prompt_only
from sigmix.tasks.base import Sample
from sigmix.train.config import TrainConfig
from sigmix.train.objectives import Learner
from sigmix.train.policy import Policy, SVFPolicy
from sigmix.train.rollout import Rollouts
from sigmix.train.trainer import Trainer

T = TypeVar("T")


@contextmanager
def first_answer_tokens(model: nn.Module, layers: Mapping[str, SVFLinear], count: int) -> Iterator[None]:
    """Let z act on the first ``count`` tokens of answers that are read inside this context, from their beginning on."""
    read = 0

    def before(_: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        nonlocal read
        rows, width = inputs["input_ids"].shape
        acts = torch.arange(read, read + width, device=inputs["input_ids"].device) < count
        read += width
        mask = bool(acts[0]) if bool(acts[0] == acts[-1]) else acts.expand(rows, width)
        for layer in layers.values():
            layer.prompt_mask = mask

    hook = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with prompt_only(layers, False):
            yield
    finally:
        hook.remove()


class VariantPolicy(SVFPolicy):
    """z that acts on the prompt and, with positions "prompt", on the first tokens of the answer."""

    def __init__(self, base: nn.Module, config: TrainConfig, answer_tokens: int) -> None:
        super().__init__(base, config)
        self.answer_tokens = answer_tokens

    def prompt_only(self, mask: bool | torch.Tensor) -> AbstractContextManager[None]:
        """Read answers, see `SVFPolicy.prompt_only`."""
        if self.answer_tokens and mask is False:
            return first_answer_tokens(self.model, self.layers, self.answer_tokens)
        return super().prompt_only(mask)

    @contextmanager
    def acting_on(self, positions: str) -> Iterator[None]:
        """Let z act at other positions inside this context."""
        before, self.positions = self.positions, positions
        try:
            yield
        finally:
            self.positions = before


class VariantLearner(Learner):
    """Optimizer steps of a variant."""

    policy: VariantPolicy
    kind: Kind

    def step(self, number: int, samples: Sequence[Sample]) -> dict[str, float]:
        """See `Learner.step`."""
        metrics = super().step(number, samples)
        if self.kind.l1:
            shrink(self.parameters.values(), self.kind.l1 * metrics["learning_rate"])
        return metrics

    def rollouts(self, number: int, samples: Sequence[Sample], read: list[Prefilled] | None = None) -> Rollouts:
        """See `Learner.rollouts`."""
        if not self.kind.both:
            return super().rollouts(number, samples, read)
        parts = []
        for place, (positions, half) in enumerate(halves(samples)):
            with self.policy.acting_on(positions):
                parts.append(super().rollouts(len(POSITIONS) * number + place, half))  # other random seeds
        return Rollouts.joined(parts)

    def _backward(self, number: int, rollouts: Rollouts, read: Sequence[Prefilled] = ()) -> dict[str, float]:
        if not self.kind.both:
            return super()._backward(number, rollouts, read)
        sums: Counter[str] = Counter()
        each = len(rollouts.completions) // len(rollouts.prompts)
        ways = halves(range(len(rollouts.prompts)))
        for positions, part in ways:
            rows = slice(part[0] * each, (part[-1] + 1) * each)
            half = Rollouts(
                [rollouts.prompts[place] for place in part], rollouts.completions[rows], rollouts.texts[rows],
                rollouts.rewards[rows], rollouts.parsed[rows],
            )  # fmt: skip
            with self.policy.acting_on(positions):
                sums.update(super()._backward(number, half))
        for parameter in self.parameters.values():  # each half was normalized by its own number of answers
            if parameter.grad is not None:
                parameter.grad /= len(ways)
        return {**sums, "loss": sums["loss"] / len(ways)}


class VariantTrainer(Trainer):
    """Training run of a kind with a variant, in one process."""

    policy: VariantPolicy

    def __init__(self, kind: Kind, *args: Any) -> None:
        self.kind = kind
        super().__init__(*args)

    def make_policy(self, model: PreTrainedModel, shard: bool) -> Policy:
        """Inject the adapter."""
        return VariantPolicy(model, self.config, self.kind.answer_tokens)

    def make_learner(self) -> Learner:
        """Return the learner of the variant."""
        learner = VariantLearner(self.policy, self.actor, self.config, self.max_new_tokens)
        learner.kind = self.kind
        return learner

    def evaluate(self, samples: Sequence[Sample], z: Mapping[str, torch.Tensor] | None = None) -> Result:
        """See `Trainer.evaluate`; with `both`, one half of the samples is answered each way."""
        if not self.kind.both:
            return super().evaluate(samples, z)
        items = []
        for positions, half in halves(samples):
            with self.policy.acting_on(positions):
                items += super().evaluate(half, z).items
        return Result(self.task.name, items)


def halves(rows: Sequence[T]) -> list[tuple[str, Sequence[T]]]:
    """Return (positions, half of the rows) for both ways; of a single row, one way."""
    middle = len(rows) // 2
    return [pair for pair in zip(POSITIONS, (rows[:middle], rows[middle:]), strict=True) if pair[1]]


@torch.no_grad()
def shrink(parameters: Iterable[torch.Tensor], threshold: float) -> None:
    """Move every gain z - 1 towards 0 by ``threshold``, and to 0 if it is smaller (the proximal step of L1)."""
    for z in parameters:
        gain = z - 1
        z.copy_(1 + gain.sign() * (gain.abs() - threshold).clamp_min(0))


def surviving(expert: Expert) -> float:
    """Return the share of an expert's gains that are not 0."""
    return sum(int((z != 1).sum()) for z in expert.z.values()) / sum(map(len, expert.z.values()))
