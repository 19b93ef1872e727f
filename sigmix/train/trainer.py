"""The training run: steps, validation, early stopping, checkpoints, the expert at the end.

Resuming gives the same z as never having stopped, bit for bit on the CPU: what a step does depends only on the
configuration, its number, the parameters and the optimiser's moments, and all of these are in the checkpoint.
Only validation items choose which parameters are kept; test items are not touched here.

Of several processes (`sigmix.train.distributed`) each runs this same loop. They answer and learn from their shares of a
step and hold the same parameters at its end; all that is written or shown comes from the main one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sigmix.engine.cpu_kernels import contiguous_head
from sigmix.engine.tokenization import end_ids
from sigmix.errors import ConfigError, DivergedError
from sigmix.evals.accuracy import Result, commit, compare, constant_baseline, evaluate, in_part, rank
from sigmix.evals.plots import figure, save_png
from sigmix.experts.expert import Expert
from sigmix.experts.metadata import thaw
from sigmix.svf.linears import describe
from sigmix.tasks.base import Sample, Task
from sigmix.train.checkpointing import RunDir, optimizer_tensors, restore_optimizer
from sigmix.train.config import TrainConfig
from sigmix.train.distributed import Processes, ProcessLostError, Terminated, check_text, shared_policy
from sigmix.train.objectives import Learner
from sigmix.train.policy import SVFPolicy
from sigmix.train.rollout import Actor, PromptStream

Listener = Callable[[dict[str, Any]], None]


SAVE_SECONDS = 60.0
"""A checkpoint is written at every validation, and after a step when the last one is older than this."""


class Trainer:
    """One training run.

    Args:
        model, tokenizer: a base from `load_base`; the model is wrapped by PEFT.
        task: what to learn. config: how. run: where state is kept. name: of the expert.
        listener: called with every metrics entry (kind "step" or "validation"), in the main process.
        processes: that share the work; default: those that a launcher started, or this one alone.
        shard: spread the base over the processes (`sigmix.train.distributed`).

    Raises:
        ConfigError: the configuration names another dtype than the model's, its batch cannot be shared evenly, or see
            `shared_policy`. ProcessError: processes start from different numbers.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task: Task,
        config: TrainConfig,
        run: RunDir,
        name: str,
        listener: Listener | None = None,
        processes: Processes | None = None,
        shard: bool = False,
    ) -> None:
        self.processes = processes or Processes.launched()
        check_batch(config, self.processes.count)
        dtype = describe(model)["dtype"]
        if config.dtype not in (None, dtype):
            raise ConfigError(f"the configuration says dtype {config.dtype}, but the base is in {dtype}")
        # recorded, because it decides the run as a seed does, and each machine has its own default
        config = dataclasses.replace(config, dtype=dtype)
        self.task, self.config, self.run, self.name = task, config, run, name
        self.listener = listener or (lambda entry: None)
        self.max_new_tokens = config.max_new_tokens or task.max_new_tokens
        prompts = config.generation_batch_size // config.num_generations
        self.train = task.samples("train", config.max_train_samples or prompts * config.max_steps, seed=config.seed)
        self.validation = task.samples("validation", config.max_eval_samples, seed=0)
        ends = end_ids(model, tokenizer)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
        if shard:
            check_text([*self.train, *self.validation])
        self.policy = shared_policy(model, config, self.processes, shard)
        if (start := config.init_from) is not None:
            self.processes.gather(lambda: self.policy.start_from(Path(start)))
            self.processes.check_equal(self.policy.z(), f"init_from {start}", "give all machines the same folder")
        contiguous_head(self.policy.model)
        self.actor = Actor(self.policy.model, tokenizer, task, ends, pad)
        self.learner = Learner(self.policy, self.actor, config, self.max_new_tokens, self.processes)
        self.stream = PromptStream(self.train, prompts, config.seed)
        self.names = list(self.learner.parameters)
        self.step, self.seconds = 0, 0.0
        self.best: dict[str, Any] = {"accuracy": -1.0, "step": 0}
        self.bad = 0

    # ------------------------------------------------------------------ running

    def fit(self, resume: bool = False) -> Expert | None:
        """Train to the end and return the best expert by validation (None for PEFT's own policies, whose best
        adapter is in the run's ``best`` folder).

        A KeyboardInterrupt saves a checkpoint and is raised again. So does the end of another process. Processes other
        than the main one return the expert's name and z without its metadata.

        Raises:
            DivergedError: NaN or collapse; the last good expert stays in the run's ``best`` folder.
            OutputError, ConfigError: see `RunDir`. ProcessError, ProcessLostError: see `Processes`.
        """
        with contextlib.ExitStack() as held:
            stored = self.processes.from_main(lambda: self._begin(held, resume))
            if stored is not None:
                self._restore(*stored)
            try:
                self._run()
            except (KeyboardInterrupt, ProcessLostError, Terminated):
                self.processes.ending()
                if self.processes.main:
                    self.run.save(*self._stable)  # a step or validation under way is taken again
                raise
            self._save()
            self.processes.from_main(
                lambda: curve(self.run.history(), self.run.path / "curve.png", f"{self.name}: {self.task.name}")
            )
        if not isinstance(self.policy, SVFPolicy):
            return None
        if self.processes.count == 1:
            return Expert.from_pretrained(self.run.best)
        z = self.processes.from_main(lambda: dict(Expert.from_pretrained(self.run.best).z))
        return Expert.from_pretrained(self.run.best) if self.processes.main else Expert(self.name, z)

    def _begin(self, held: contextlib.ExitStack, resume: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        held.enter_context(self.run.locked())
        state = self.run.begin(self.config, resume)
        if state is None:
            return None
        tensors = self.run.tensors()
        # a checkpoint of before the first validation has no best one yet
        self.run.forget_after(state["step"] if state["best"]["accuracy"] >= 0 else -1)
        return state, tensors

    def _run(self) -> None:
        config = self.config
        self._stable, self._saved = self._state(), time.monotonic()
        if self.best["accuracy"] < 0:
            self._validate()
            self._stable = self._state()
        while self.step < config.max_steps and not self._patience_spent():
            started = time.perf_counter()
            figures = self.learner.step(self.step, self.stream.step(self.step))
            self.seconds += time.perf_counter() - started
            self._emit({"kind": "step", "step": self.step, "seconds": self.seconds, **figures})
            self.processes.alike(functools.partial(self._check, figures))
            self.step += 1
            if self.step % config.eval_steps == 0 or self.step == config.max_steps:
                started = time.perf_counter()
                self._validate()
                self.seconds += time.perf_counter() - started
                self._save()
            self._stable = self._state()
            if self.processes.main and time.monotonic() - self._saved > SAVE_SECONDS:
                self.run.save(*self._stable)
                self._saved = time.monotonic()

    def _patience_spent(self) -> bool:
        return bool(self.config.early_stopping_patience) and self.bad >= self.config.early_stopping_patience

    def _validate(self) -> None:
        result = self.evaluate(self.validation)
        summary = result.summary()
        better = rank(summary) > rank(self.best)
        if better:
            self.best = {"accuracy": summary["accuracy"], **in_part(summary), "step": self.step}
        self.bad = 0 if better else self.bad + 1
        self._emit({"kind": "validation", "step": self.step, "seconds": self.seconds, "best": better, **summary})
        if better:
            self.processes.from_main(lambda: self._keep(result))

    def evaluate(self, samples: Sequence[Sample], z: dict[str, torch.Tensor] | None = None) -> Result:
        """Greedy answers to samples, scored, each process taking its share; the same result on all of them.

        Args:
            z: to act under, by path, in place of the policy's own.
        """

        def work() -> Result:
            mine = samples[self.processes.share(len(samples))]
            with self.policy.acting(z):
                return evaluate(self.task, mine, lambda part: self.actor.answer(part, self.max_new_tokens))

        parts = self.processes.gather(work, self.policy.sharded)
        return Result(self.task.name, [item for part in parts for item in part.items])

    def _keep(self, result: Result) -> None:
        if isinstance(self.policy, SVFPolicy):
            self.expert(result).save_pretrained(self.run.best)
        else:
            self.policy.save(self.run.best)

    def expert(self, validation: Result | None = None) -> Expert:
        """The current z as an expert, with how it was made."""
        summary = validation.summary() if validation else {}
        metric = {
            "name": "validation accuracy", "value": summary.get("accuracy"), "n": summary.get("n"),
            "interval": summary.get("interval"), **in_part(summary), "note": "chose the checkpoint",
        }  # fmt: skip
        assert isinstance(self.policy, SVFPolicy)
        settings = {k: v for k, v in self.config.to_dict().items() if k not in ("task", "base", "dtype", "seed")}
        if self.processes.count > 1:
            settings["processes"] = self.processes.count
        meta = {
            "task": self.task.name,
            "domain": self.task.domain,
            "description": self.task.description,
            "objective": self.config.objective,
            "seed": self.config.seed,
            "commit": commit(),
            "license": "Apache-2.0",
            "metrics": [metric] if summary else [],
            "training": {**settings, **self.task.facts, "step": self.step, "seconds": round(self.seconds, 1)},
        }
        return self.policy.expert(self.name, meta)

    # ------------------------------------------------------------------ trouble

    def _check(self, figures: dict[str, float]) -> None:
        where = f"the last good expert, of step {self.best['step']}, is in {self.run.best}"
        if not math.isfinite(figures["loss"]) or not math.isfinite(figures["grad_norm"]):
            raise DivergedError(
                f"step {self.step}: loss {figures['loss']}, gradient norm {figures['grad_norm']}: the run diverged; "
                f"{where}",
                remedy="lower --learning-rate, or raise --beta",
            )
        if figures["kl"] > self.config.kl_limit:
            raise DivergedError(
                f"step {self.step}: {figures['kl']:.2f} nats per token from the base (limit {self.config.kl_limit}): "
                f"the policy collapsed; {where}",
                remedy="lower --learning-rate, raise --beta, or raise --kl-limit if that is meant",
            )
        constant = figures["most_common"] >= 0.95 and figures["right"] < 0.9 and self.config.objective == "reinforce"
        self.constant = getattr(self, "constant", 0) + 1 if constant else 0
        if self.constant >= 5:
            raise DivergedError(
                f"step {self.step}: for 5 steps nearly all sampled answers were the same text (entropy "
                f"{figures['entropy']:.3f} nats per token): the policy collapsed to a constant; {where}",
                remedy="raise --beta, lower --learning-rate, or check that no constant answer wins the task",
            )

    # ------------------------------------------------------------------ state

    def _emit(self, entry: dict[str, Any]) -> None:
        if self.processes.main:
            self.run.log(entry)
            self.listener(entry)

    def _save(self) -> None:
        self.processes.check_equal(self.policy.z(), f"step {self.step}")
        self.processes.from_main(lambda: self.run.save(*self._state()))
        self._saved = time.monotonic()

    def _state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        tensors = {f"parameter.{name}": p.detach().cpu().clone() for name, p in self.learner.parameters.items()}
        tensors |= optimizer_tensors(self.learner.optimizer, self.names)
        constant = getattr(self, "constant", 0)
        state = {"step": self.step, "seconds": self.seconds, "best": self.best, "bad": self.bad, "constant": constant}
        return state, tensors

    def _restore(self, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.learner.parameters.items():
                parameter.copy_(tensors[f"parameter.{name}"])
        restore_optimizer(self.learner.optimizer, self.names, tensors)
        self.step, self.seconds = state["step"], state["seconds"]
        self.best, self.bad, self.constant = state["best"], state["bad"], state["constant"]


def check_batch(config: TrainConfig, count: int) -> None:
    """Raise `ConfigError` unless a step's prompts divide evenly among `count` processes."""
    prompts = config.generation_batch_size // config.num_generations
    if prompts % count:
        fitting = max(n for n in range(1, count) if prompts % n == 0)
        multiple = config.num_generations * count
        raise ConfigError(
            f"the {prompts} prompts of a step (generation_batch_size / num_generations) cannot be divided evenly among "
            f"{count} processes",
            remedy=f"set --generation-batch-size to a multiple of {multiple}, or start {fitting} processes",
        )


# --- After training: base and expert on the same held-out test items, and the figures on the expert's card.


def held_out(trainer: Trainer, expert: Expert, n: int) -> tuple[Expert, dict[str, Any]]:
    """Test accuracy of base and expert.

    Args:
        trainer: a finished run with an SVF policy. n: test items (fewer if the task has fewer).

    Returns:
        The expert with the figures in its metrics, and {"test", "base", "paired", "best_constant"}. The items of both
        are written to the run's folder as test-base.jsonl and test-expert.jsonl.
    """
    task = trainer.task
    samples = task.samples("test", n, seed=0)
    before = trainer.evaluate(samples, {path: torch.ones_like(z) for path, z in expert.z.items()})
    after = trainer.evaluate(samples, dict(expert.z))

    def write() -> None:
        before.save(trainer.run.path / "test-base.jsonl")
        after.save(trainer.run.path / "test-expert.jsonl")

    trainer.processes.from_main(write)
    constant, paired = constant_baseline(task, samples), compare(after, before)
    test, base = after.summary(), before.summary()
    metric = {
        "name": "test accuracy",
        "value": test["accuracy"],
        "n": test["n"],
        "interval": test["interval"],
        "base": base["accuracy"],
        "base_interval": base["interval"],
        "p": paired["p"],
        "best_constant": constant.get("accuracy"),
        "answer_entropy": test["answer_entropy"],
        "note": "held out; chose nothing",
    }
    if in_part(test) or in_part(base):
        metric |= {"mean_score": test["mean_score"], "base_mean_score": base["mean_score"]}
    figures = {"test": test, "base": base, "paired": paired, "best_constant": constant}
    return expert.with_meta(metrics=[metric, *thaw(expert.meta.get("metrics", []))]), figures


# --- What a person sees of a run: the learning-curve picture and the model card's figures.


def curve(history: list[dict[str, Any]], path: str | Path, title: str) -> None:
    """Write a PNG with reward, validation accuracy (with its interval), KL and entropy over steps, atomically."""
    steps = [entry for entry in history if entry["kind"] == "step"]
    checks = [entry for entry in history if entry["kind"] == "validation"]
    canvas = figure(7, 6)
    top, bottom = canvas.subplots(2, 1, sharex=True)
    top.plot([e["step"] + 1 for e in steps], [e["right"] for e in steps], lw=1, alpha=0.6, label="rollouts right")
    if checks:
        x, y = [e["step"] for e in checks], [e["accuracy"] for e in checks]
        low = [a - e["interval"][0] for a, e in zip(y, checks, strict=True)]
        high = [e["interval"][1] - a for a, e in zip(y, checks, strict=True)]
        top.errorbar(x, y, yerr=[low, high], fmt="o-", capsize=3, label=f"validation, n = {checks[0]['n']}, 95 %")
    top.set(ylabel="accuracy", ylim=(-0.02, 1.02), title=title)
    top.legend()
    bottom.plot([e["step"] + 1 for e in steps], [e["kl"] for e in steps], label="KL to the base, nats per token")
    bottom.plot([e["step"] + 1 for e in steps], [e["entropy"] for e in steps], label="entropy, nats per token")
    bottom.set(xlabel="step", ylabel="nats")
    bottom.legend()
    save_png(canvas, path)
