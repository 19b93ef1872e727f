"""``python -m benchmarks train-step``: time and memory of one REINFORCE step.

A step is rollout, reference, loss, backward and update on two-digit addition: 64 answers, grouped by prompt as in the
``laptop`` preset. Contestants, on the same prompts and seeds, in the dtype that `load_base` picks on this machine:

    ours     `sigmix.train.objectives.Learner` with z on all linear layers
    dense    dense composition as in the public reference, see `benchmarks.dense`
    lora     PEFT's LoRA of rank 16 on the same layers, in the same loop
    …-prompt the same two at the positions "prompt": the base decodes and reads the answers
    floor    the matmul FLOPs of our step (counted by torch on a real one) at the rate of this machine's fastest large
             matmul of the same dtype, measured at that point of the run

Every answer has the same number of new tokens, so that all contestants do equal work. Before the timing, ``ours`` and
``dense`` take a step on the same rollouts from the same z ≠ 1 in float32; the run fails unless their gradients of z
agree. Peak memory is that of a fresh process per contestant: load, one step, high-water mark (VmHWM).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.dense import Dense
from benchmarks.harness import Aim, device, interleaved, ratio, report, say
from sigmix.engine.cpu.kernels import available, contiguous_head
from sigmix.engine.cpu.native import NativeLinear
from sigmix.errors import ConfigError, SigmixError
from sigmix.models.default import DEFAULT
from sigmix.models.loading import load_base
from sigmix.tasks.base import Sample
from sigmix.tasks.registry import get_task
from sigmix.train.config import TrainConfig, make_config
from sigmix.train.objectives import Learner
from sigmix.train.policy import make_policy
from sigmix.train.rollout import Actor, Rollouts

AIMS = {
    "speedup_vs_dense": Aim(">=", 2.5),
    "speedup_vs_lora": Aim(">=", 1.0),
    "prompt_speedup_vs_lora": Aim(">=", 1.0),
    "time_vs_floor": Aim("<=", 2.5),
}

CONTESTANTS = ("ours", "dense", "lora", "ours-prompt", "lora-prompt")

LEAST_COSINE = 0.9999
"""Of the two gradients of z in float32; anything below means that the contestants do not compute the same thing."""

WARMUP = 1

PEAK_SIZES = ((2048, 2048, 2048), (4096, 1024, 4096), (2048, 576, 1536))


@dataclass(frozen=True)
class Setting:
    """Settings of a run.

    Attributes:
        dtype: None: as `load_base` picks. batch: answers of a step. group: of them per prompt; None: as the preset.
        new_tokens: of every answer.
    """

    base: str = DEFAULT
    dtype: str | None = None
    batch: int = 64
    group: int | None = None
    new_tokens: int = 8
    seed: int = 0
    task: str = "addition"

    def samples(self, number: int) -> list[Sample]:
        """The prompts of a round; the same for all contestants."""
        prompts = self.batch // self.config().num_generations
        return get_task(self.task).samples("train", prompts, seed=self.seed + number)

    def config(self, policy: str = "svf", **options: Any) -> TrainConfig:
        """The laptop preset with a policy, and what differs from it."""
        return make_config(
            "laptop", task=self.task, base=self.base, policy=policy, generation_batch_size=self.batch,
            num_generations=self.group, seed=self.seed, lora_r=16, **options,
        )  # fmt: skip


class Loop:
    """Our own loop with a policy, "svf" or "lora", and answers of one length."""

    def __init__(self, setting: Setting, policy: str, **options: Any) -> None:
        model, tokenizer = load_base(setting.base, setting.dtype)
        self.dtype = model.dtype
        self.config = setting.config(policy, **options)
        self.policy = make_policy(model, self.config)
        contiguous_head(self.policy.model)
        actor = Actor(self.policy.model, tokenizer, get_task(setting.task), self.policy.prompt_only)
        actor.ends = []
        self.learner = Learner(self.policy, actor, self.config, setting.new_tokens)

    def step(self, number: int, samples: Sequence[Sample]) -> dict[str, float]:
        """One step on its own rollouts."""
        return self.learner.step(number, samples)


def contestant(setting: Setting, name: str, **options: Any) -> Loop | Dense:
    """A fresh contestant, one of `CONTESTANTS`, on a base of its own. ``options`` go into the configuration."""
    if name == "dense":
        model, tokenizer = load_base(setting.base, setting.dtype)
        return Dense(model, tokenizer, get_task(setting.task), setting.config(**options), setting.new_tokens)
    if name not in CONTESTANTS:
        raise ConfigError(f"no contestant {name!r}")
    kind, _, positions = name.partition("-")
    return Loop(setting, "svf" if kind == "ours" else "lora", positions=positions or "all", **options)


def agreement(setting: Setting) -> dict[str, Any]:
    """Gradients of z that ours and dense compute from the same rollouts and the same z, in float32.

    z is drawn around 1 (standard deviation 0.1) so that the KL term counts; rewards are drawn too, ±1, so that the
    policy gradient counts however few answers are right. Nothing is clipped.
    """
    single = replace(setting, dtype="float32", batch=min(setting.batch, 16))
    ours, dense = (contestant(single, name, max_grad_norm=1e30) for name in ("ours", "dense"))
    assert isinstance(ours, Loop)
    assert isinstance(dense, Dense)
    mine = ours.policy.parameters()
    if mine.keys() != dense.z.keys():
        raise SigmixError(f"the contestants adapt other matrices: {sorted(mine.keys() ^ dense.z.keys())}")
    random = torch.Generator().manual_seed(setting.seed)
    with torch.no_grad():
        for path, parameter in mine.items():
            parameter.copy_((1 + 0.1 * torch.randn(parameter.shape, generator=random)).clamp_min(0.5))
            dense.z[path].copy_(parameter)
    samples = single.samples(0)
    rolled = ours.learner.rollouts(0, samples)
    rewards = torch.where(torch.rand(len(rolled.completions), generator=random) < 0.5, 1.0, -1.0)
    rollouts = Rollouts(rolled.prompts, rolled.completions, rolled.texts, rewards, rolled.parsed)
    ours.learner.rollouts = lambda *_: rollouts  # type: ignore[method-assign]
    losses = ours.step(0, samples)["loss"], dense.step(0, samples, rollouts)["loss"]
    pairs = {path: (_grad(mine[path]), _grad(dense.z[path])) for path in mine}
    a, b = (torch.cat([pair[i] for pair in pairs.values()]) for i in (0, 1))
    return {
        "rows": len(rewards),
        "numbers": len(a),
        "cosine": _cosine(a, b),
        "lowest_cosine_of_a_matrix": min(_cosine(*pair) for pair in pairs.values()),
        "norm_ratio": float(a.norm() / b.norm()),
        "relative_difference": float((a - b).norm() / b.norm()),
        "loss_ours": losses[0],
        "loss_dense": losses[1],
        "gradient_norm": float(b.norm()),
    }


def _grad(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad.double()


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few large matmuls, each the best of several tries."""
    best = 0.0
    for rows, inner, columns in PEAK_SIZES:
        x, weight = torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype)
        for _ in range(6):
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - start))
    return best


def counted_flops(ours: Loop, samples: Sequence[Sample]) -> dict[str, int]:
    """Matmul FLOPs of one real step of ours, by operator and in ``total``: all passes, the merge and the head."""
    from torch.utils.flop_counter import FlopCounterMode

    packed, plain = [0], NativeLinear.__call__

    def counting(layer: NativeLinear, x: torch.Tensor) -> torch.Tensor:
        packed[0] += 2 * x.numel() * layer.out_features
        return plain(layer, x)

    def onednn(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * x.numel() * weight[0]

    mapping = {torch.ops.mkldnn._linear_pointwise: onednn} if available() else {}
    with (
        FlopCounterMode(display=False, custom_mapping=mapping) as counter,
        patch.object(NativeLinear, "__call__", counting),
    ):
        ours.step(0, samples)
    by = {str(operator): int(count) for operator, count in counter.get_flop_counts()["Global"].items()}
    return {**by, "packed": packed[0], "total": counter.get_total_flops() + packed[0]}


def run(repeats: int | None = None, dtype: str | None = None, memory: bool = True, **setting: Any) -> dict[str, Any]:
    """Run the benchmark; see `harness.report` for the result.

    Args:
        repeats: rounds that count, default 3. dtype: of all contestants. memory: measure peak memory too.
        setting: other fields of `Setting`.

    Raises:
        SigmixError: the contestants' gradients differ.
    """
    from benchmarks.peak import peak_memory

    here = Setting(dtype=dtype, **setting)
    where = device()  # before our own load
    started = time.perf_counter()
    say("gradients of z, ours and dense, on the same rollouts in float32")
    agreed = agreement(here)
    say(f"cosine {agreed['cosine']:.8f}, after {time.perf_counter() - started:.0f} s")
    if not agreed["cosine"] >= LEAST_COSINE:
        raise SigmixError(f"ours and the dense peer disagree on the gradient of z (cosine {agreed['cosine']:.6f})")
    loops = {name: contestant(here, name) for name in CONTESTANTS}
    ours, dense = loops["ours"], loops["dense"]
    assert isinstance(ours, Loop)
    assert isinstance(dense, Dense)
    where["dtype"] = str(ours.dtype).removeprefix("torch.")
    rounds = {number: here.samples(number) for number in range(WARMUP + (repeats or 3))}
    flops = counted_flops(ours, rounds[0])
    figures: dict[str, list] = {name: [] for name in (*CONTESTANTS, "dense_phases", "flop_rate")}

    def timed(name: str, one: Loop | Dense) -> Any:
        def step(number: int) -> None:
            figures[name].append(one.step(number, rounds[number]))
            if isinstance(one, Dense):
                figures["dense_phases"].append(dict(one.phases))

        return step

    def floor(number: int) -> float:
        figures["flop_rate"].append(matmul_rate(ours.dtype))
        return flops["total"] / figures["flop_rate"][-1]

    timings = {name: timed(name, loop) for name, loop in loops.items()}
    seconds = interleaved({**timings, "floor": floor}, repeats or 3, WARMUP)
    lengths = {f["completion_tokens"] for name in CONTESTANTS for f in figures[name]}
    if lengths != {float(here.new_tokens)}:
        raise SigmixError(f"the contestants' answers have other lengths than {here.new_tokens} tokens: {lengths}")
    peaks = {}
    if memory:
        for name in CONTESTANTS:
            say(f"peak memory of {name}")
            peaks[name] = peak_memory(here, name)
    ratios = {
        "speedup_vs_dense": ratio(seconds["dense"], seconds["ours"]),
        "speedup_vs_lora": ratio(seconds["lora"], seconds["ours"]),
        "prompt_speedup_vs_lora": ratio(seconds["lora-prompt"], seconds["ours-prompt"]),
        "time_vs_floor": ratio(seconds["ours"], seconds["floor"]),
    }
    raw = {
        "setting": {
            **here.__dict__,
            "group": ours.config.num_generations,
            "warmup": WARMUP,
            "training": ours.config.to_dict(),
        },
        "seconds": seconds,
        "agreement_float32": agreed,
        "flops_of_our_step": flops,
        "matmul_flops_per_second": figures["flop_rate"][WARMUP:],
        "dense_phases_seconds": figures["dense_phases"][WARMUP:],
        "answer_tokens": here.new_tokens,
        "trainable": {
            "ours": _size(ours),
            "dense": sum(z.numel() for z in dense.z.values()),
            "lora": _size(loops["lora"]),
        },
        "peak_memory_bytes": peaks,
    }
    return report("train-step", where, ratios, AIMS, raw)


def _size(loop: Any) -> int:
    return sum(parameter.numel() for parameter in loop.policy.parameters().values())
