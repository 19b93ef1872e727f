"""Training run: steps, validation, early stopping, checkpoints, and the expert at the end.

A resumed run gives the same z as an uninterrupted one, bit for bit on a CPU: a step depends only on the configuration,
its number, the parameters and the optimizer's moments, which the checkpoint contains. Validation items alone choose
the parameters that are kept.

With several processes (`sigmix.train.distributed`) each runs this loop on its share of every step and holds the same
parameters after it; the main process writes all files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sigmix.adapt.base import DISPATCH
from sigmix.adapt.router import request_statistics
from sigmix.engine import Engine
from sigmix.engine.cpu.kernels import contiguous_head
from sigmix.engine.prefix_cache import completion_logits
from sigmix.engine.tokenization import context_length, encode, reply_ids
from sigmix.errors import ConfigError, DivergedError, SigmixError
from sigmix.evals.accuracy import Result, commit, compare, constant_baseline, evaluate, held_out_metric, in_part, rank
from sigmix.evals.plots import figure, save_png
from sigmix.experts.expert import Expert
from sigmix.experts.metadata import thaw
from sigmix.models.digests import weight_digest
from sigmix.svf.linears import describe
from sigmix.tasks.base import Sample, Task
from sigmix.train.checkpointing import RunDir, optimizer_tensors, restore_optimizer
from sigmix.train.config import TrainConfig
from sigmix.train.distributed import Processes, ProcessLostError
from sigmix.train.objectives import Learner, token_stats
from sigmix.train.policy import Policy, SVFPolicy
from sigmix.train.rollout import Actor, PromptStream, Rollouts
from sigmix.train.sharding import build_policy, check_text

log = logging.getLogger(__name__)

Checkpoint: TypeAlias = tuple[dict[str, Any], dict[str, torch.Tensor]]
SAVE_SECONDS = 60.0  # a checkpoint is written at every validation, and after a step if the last one is older than this
MIN_STEPS = 40  # of a run with a small training set
VALIDATIONS = 8  # of a run with a time budget, at most
VALIDATION_SHARE = 0.25  # of the budget, at most, unless that leaves fewer than three validations
VALIDATION_PART = 32  # items on which the duration of a validation is measured
SHOWN_REPLIES = 3  # of each validation, in the metrics
SHOWN_CHARACTERS = 1000  # of their texts
COLLAPSE_STEPS = 5  # steps in a row with nearly constant completions after which the run is stopped as collapsed


class Trainer:
    """One training run.

    Args:
        model, tokenizer: from `load_base`. The model is wrapped by PEFT.
        output_dir: folder of the run, see `RunDir`.
        name: of the expert.
        on_log: called with each entry of metrics (kind "step" or "validation") in the main process.
        processes: that share the work. Default: those of a launcher's environment, or this process alone.
        shard: shard the base over the processes (FSDP2).

    Attributes:
        best: accuracy and step of the best validation. seconds: training time. tested: results of `test`, by "base"
            and "expert".

    Raises:
        ConfigError: the model's dtype is not the configured one, a step's prompts cannot be divided among the
            processes, or see `sigmix.train.sharding.build_policy`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        config: TrainConfig,
        output_dir: str | Path,
        name: str,
        on_log: Callable[[dict[str, Any]], None] | None = None,
        processes: Processes | None = None,
        shard: bool = False,
    ) -> None:
        self.processes = processes or Processes.from_environment()
        check_batch(config, self.processes.world_size)
        dtype = describe(model)["dtype"]
        if config.dtype not in (None, dtype):
            raise ConfigError(f"the configured dtype is {config.dtype}, but the base was loaded in {dtype}")
        # recorded because the result depends on it and the default on the machine
        config = dataclasses.replace(config, dtype=dtype)
        self.task, self.config, self.run, self.name, self.on_log = task, config, RunDir(output_dir), name, on_log
        task.prepare(tokenizer, functools.partial(encode, tokenizer), context_length(model))
        self.max_new_tokens = config.max_new_tokens or task.max_new_tokens
        prompts = config.generation_batch_size // config.num_generations
        train = task.samples("train", config.max_train_samples or prompts * config.max_steps, seed=config.seed)
        self.stream = PromptStream(train, prompts, config.seed)
        self.validation = task.samples("validation", config.max_eval_samples, seed=0)
        if shard:
            check_text([*train, *self.validation])
        self.policy = self.make_policy(model, shard)
        if (folder := config.init_from) is not None:
            self.processes.gather(lambda: self.policy.load(Path(folder)))
            self._check_equal_parameters(f"pass the same --init-from folder on all machines, not another {folder}")
        contiguous_head(self.policy.model)
        self.actor = Actor(self.policy.model, tokenizer, task, self.policy.prompt_only)
        self.learner = self.make_learner()
        self.step, self.seconds = 0, 0.0
        self.best: dict[str, Any] = {"accuracy": -1.0, "step": 0}
        self.tested: dict[str, Result] = {}
        self._bad_validations = self._constant_steps = 0

    def make_policy(self, model: PreTrainedModel, shard: bool) -> Policy:
        """Inject the adapter into the model; overridden by variants of the method."""
        return build_policy(model, self.config, self.processes, shard)

    def make_learner(self) -> Learner:
        """Return the learner; overridden by variants of the method."""
        return Learner(self.policy, self.actor, self.config, self.max_new_tokens, self.processes)

    def set_budget(self, seconds: float, epochs: float, resume: bool = False) -> None:
        """Derive the number of steps from the training set and a time budget.

        Args:
            seconds: of steps and validations, the durations of which are measured here. epochs: maximum passes over the
                training prompts. resume: keep the number of steps of a run that began before.
        """
        if resume and self.run.exists:
            stored = self.run.config()
            self._set_steps(stored["max_steps"], stored["eval_steps"])
            return
        steps = max(MIN_STEPS, math.ceil(epochs * len(self.stream.samples) / self.stream.per_step))
        for _ in range(2):  # the first pass includes what is done once
            started = time.perf_counter()
            self.learner.gradients(0, self.stream.step(0))
            step = time.perf_counter() - started
        part = self.validation[:VALIDATION_PART]
        started = time.perf_counter()
        self.evaluate(part)
        validation = (time.perf_counter() - started) * len(self.validation) / len(part)
        count = min(max(int(VALIDATION_SHARE * seconds / validation), 3), VALIDATIONS + 1)
        fitting = max(int((seconds - count * validation) / step), 1)
        steps, count = self.processes.from_main(lambda: (min(steps, fitting), count))
        self._set_steps(steps, math.ceil(steps / (count - 1)))  # one is before the first step

    def _set_steps(self, steps: int, eval_steps: int) -> None:
        self.config = self.learner.config = dataclasses.replace(self.config, max_steps=steps, eval_steps=eval_steps)

    # ------------------------------------------------------------------ loop

    def fit(self, resume: bool = False) -> Expert | None:
        """Train to the end; return the best expert by validation.

        With PEFT's own policies the result is None, and the best adapter is in the run's ``best`` folder. Processes
        other than the main one return the expert without its metadata. On KeyboardInterrupt, or if another process is
        lost, a checkpoint is saved before the error propagates.

        Raises:
            DivergedError: NaN or collapse; the last good expert stays in the run's ``best`` folder.
            OutputError, ConfigError: see `RunDir`. ProcessError, ProcessLostError: see `Processes`.
        """
        with contextlib.ExitStack() as stack:
            if (checkpoint := self.processes.from_main(lambda: self._begin(stack, resume))) is not None:
                self._restore(*checkpoint)
            self._checkpoint, self._saved = self._state(), time.monotonic()
            try:
                self._loop()
            except (KeyboardInterrupt, ProcessLostError):
                self.processes.ignore_sigterm()
                if self.processes.is_main:
                    self.run.save(*self._checkpoint)
                raise
            self._save()
            title = f"{self.name}: {self.task.name}"
            self.processes.from_main(lambda: plot_curve(self.run.history(), self.run.path / "curve.png", title))
        if not isinstance(self.policy, SVFPolicy):
            return None
        best = self._with_statistics(Expert.from_pretrained(self.run.best)) if self.processes.is_main else None
        z = self.processes.from_main(lambda: dict(best.z))  # type: ignore[union-attr]
        return best or Expert(self.name, z, {"positions": self.config.positions})

    def _with_statistics(self, expert: Expert) -> Expert:
        """Add statistics of the training and validation prompts, which the router (strategy D) needs."""
        if self.policy.sharded or self.task.domain == DISPATCH:
            return expert
        train, validation = ([one.prompt for one in samples] for samples in (self.stream.samples, self.validation))
        try:
            engine = Engine(self.policy.model, self.actor.tokenizer, keep_packed=0)
            return dataclasses.replace(expert, requests=request_statistics(engine, train, validation))
        except SigmixError as error:  # the expert is whole without them
            log.warning("no request statistics, so the router does not choose %s: %s", expert.name, error)
            return expert

    def _begin(self, stack: contextlib.ExitStack, resume: bool) -> Checkpoint | None:
        stack.enter_context(self.run.locked())
        state = self.run.begin(self.config, resume)
        if state is None:
            return None
        tensors = self.run.tensors()
        # before the first validation there is no best expert yet, and that validation is repeated
        self.run.truncate_history(state["step"] if state["best"]["accuracy"] >= 0 else -1)
        return state, tensors

    def _loop(self) -> None:
        config = self.config
        if self.best["accuracy"] < 0:
            self._validate()
            self._checkpoint = self._state()
        patience = config.early_stopping_patience or math.inf
        while self.step < config.max_steps and self._bad_validations < patience:
            started = time.perf_counter()
            metrics = self.learner.step(self.step, self.stream.step(self.step))
            self.seconds += time.perf_counter() - started
            self._log({"kind": "step", "step": self.step, "seconds": self.seconds, **metrics})
            self.processes.gather(functools.partial(self._check_metrics, metrics))
            self.step += 1
            if self.step % config.eval_steps == 0 or self.step == config.max_steps:
                started = time.perf_counter()
                self._validate()
                self.seconds += time.perf_counter() - started
                self._save()
            self._checkpoint = self._state()
            if self.processes.is_main and time.monotonic() - self._saved > SAVE_SECONDS:
                self.run.save(*self._checkpoint)
                self._saved = time.monotonic()

    def _validate(self) -> None:
        result = self.evaluate(self.validation)
        summary = result.summary()
        better = rank(summary) > rank(self.best)
        if better:
            self.best = {"accuracy": summary["accuracy"], **in_part(summary), "step": self.step}
        self._bad_validations = 0 if better else self._bad_validations + 1
        samples = [
            {**{key: getattr(item, key)[:SHOWN_CHARACTERS] for key in ("prompt", "gold", "reply")}, "score": item.score}
            for item in result.items[:SHOWN_REPLIES]
        ]
        figures = {"seconds": self.seconds, "best": better, **summary, "samples": samples}
        self._log({"kind": "validation", "step": self.step, **figures})
        if better:
            self.processes.from_main(lambda: self._save_best(result))

    def _log(self, entry: dict[str, Any]) -> None:
        if self.processes.is_main:
            self.run.log(entry)
            if self.on_log is not None:
                self.on_log(entry)

    def _check_metrics(self, metrics: Mapping[str, float]) -> None:
        kept = f"the last good expert, of step {self.best['step']}, is in {self.run.best}"
        if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["grad_norm"]):
            raise DivergedError(
                f"step {self.step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}: the run diverged; "
                f"{kept}",
                remedy="lower --learning-rate, or raise --beta",
            )
        if metrics["kl"] > self.config.kl_limit:
            raise DivergedError(
                f"step {self.step}: KL {metrics['kl']:.2f} nats per token (limit {self.config.kl_limit}): the policy "
                f"collapsed; {kept}",
                remedy="lower --learning-rate, raise --beta, or raise --kl-limit if this is intended",
            )
        constant = metrics["most_common"] >= 0.95 and metrics["right"] < 0.9 and self.config.objective == "reinforce"
        self._constant_steps = self._constant_steps + 1 if constant else 0
        if self._constant_steps >= COLLAPSE_STEPS:
            raise DivergedError(
                f"step {self.step}: nearly all completions of the last {COLLAPSE_STEPS} steps have the same text "
                f"(entropy {metrics['entropy']:.3f} nats per token): the policy collapsed to a constant; {kept}",
                remedy="raise --beta, lower --learning-rate, or check that no constant answer wins the task",
            )

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, samples: Sequence[Sample], z: Mapping[str, torch.Tensor] | None = None) -> Result:
        """Score greedy replies; each process generates its share, and all get the whole result.

        Args:
            z: by path, in place of the policy's own.
        """

        def work() -> Result:
            part = samples[self.processes.share(len(samples))]
            with self.policy.acting(z, len(part) * self.max_new_tokens):
                replies = self.actor.decode(self.actor.generate(part, self.max_new_tokens))
            return evaluate(self.task, part, replies)

        parts = self.processes.gather(work, self.policy.sharded)
        return Result(self.task.name, [item for part in parts for item in part.items])

    def test_samples(self, n: int) -> list[Sample]:
        """Return the first ``n`` held-out items, or all."""
        return self.task.samples("test", n, seed=0)

    def label_probabilities(
        self, samples: Sequence[Sample], labels: Sequence[str], z: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Return float32 [N, L]: softmax over the log-likelihoods of the labels as whole replies.

        Args:
            z: see `evaluate`.
        """
        actor, rows = self.actor, []
        replies = [reply_ids(actor.tokenizer, label, actor.ends) for label in labels]
        step = max(self.config.per_device_train_batch_size // len(labels), 1)
        for start in range(0, len(samples), step):
            part = samples[start : start + step]
            prompts = actor.prompts(part, max(map(len, replies)))
            rollouts = Rollouts(prompts, replies * len(part), [], torch.zeros(0), [])
            ids, mask = rollouts.padded(slice(None), actor.pad_id)
            device = self.policy.model.get_input_embeddings().weight.device
            ids, mask = ids.to(device), mask.to(device)
            with torch.no_grad(), self.policy.acting(z):
                logits = completion_logits(
                    self.policy.model, prompts, ids, mask, actor.pad_id, True, self.policy.prompt_only
                )
                rows.append(token_stats(logits, None, ids, mask).logprob.view(len(part), -1).float().cpu())
        return torch.cat(rows).softmax(-1)

    def test(self, expert: Expert, n: int) -> tuple[Expert, dict[str, Any]]:
        """Measure base and expert on ``n`` held-out test items (fewer if the task has fewer).

        Returns:
            The expert with the figures in its metrics, and {"test", "base", "paired", "best_constant"}. The items are
            written to the run's folder as test-base.jsonl and test-expert.jsonl.
        """
        samples = self.test_samples(n)
        before = self.evaluate(samples, {path: torch.ones_like(z) for path, z in expert.z.items()})
        after = self.evaluate(samples, expert.z)

        def write() -> None:
            before.save(self.run.path / "test-base.jsonl")
            after.save(self.run.path / "test-expert.jsonl")

        self.processes.from_main(write)
        self.tested = {"base": before, "expert": after}
        constant, paired = constant_baseline(self.task, samples), compare(after, before)
        test, base = after.summary(), before.summary()
        metric = held_out_metric(test, base, paired, constant)
        figures = {"test": test, "base": base, "paired": paired, "best_constant": constant}
        return expert.with_meta(metrics=[metric, *thaw(expert.meta.get("metrics", []))]), figures

    # ------------------------------------------------------------------ saving

    def _save_best(self, validation: Result) -> None:
        if not isinstance(self.policy, SVFPolicy):
            self.policy.save(self.run.best)
            return
        config, summary = self.config, validation.summary()
        metric = {
            "name": "validation accuracy", "value": summary["accuracy"], "n": summary["n"],
            "interval": summary["interval"], **in_part(summary), "note": "chose the checkpoint",
        }  # fmt: skip
        options = {k: v for k, v in config.to_dict().items() if k not in ("task", "base", "dtype", "seed")}
        if self.processes.world_size > 1:
            options["processes"] = self.processes.world_size
        meta = {
            "task": self.task.reference, "domain": self.task.domain, "description": self.task.description,
            "objective": config.objective, "seed": config.seed, "commit": commit(), "license": "Apache-2.0",
            "metrics": [metric],
            "training": {**options, **self.task.facts, "step": self.step, "seconds": round(self.seconds, 1)},
        }  # fmt: skip
        self.policy.expert(self.name, meta).save_pretrained(self.run.best)

    def _save(self) -> None:
        self._check_equal_parameters(
            "all processes need the same software and kind of device; continue from the last checkpoint with --resume"
        )
        self.processes.from_main(lambda: self.run.save(*self._state()))
        self._saved = time.monotonic()

    def _check_equal_parameters(self, remedy: str) -> None:
        def digests() -> dict[str, str]:
            return {f"z of {name}": weight_digest(z) for name, z in self.policy.z().items()}

        self.processes.check_equal(digests, remedy)

    def _state(self) -> Checkpoint:
        parameters = {f"parameter.{name}": p.detach().cpu().clone() for name, p in self.learner.parameters.items()}
        moments = optimizer_tensors(self.learner.optimizer, list(self.learner.parameters))
        state = {
            "step": self.step, "seconds": self.seconds, "best": self.best, "bad": self._bad_validations,
            "constant": self._constant_steps,
        }  # fmt: skip
        return state, parameters | moments

    def _restore(self, state: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.learner.parameters.items():
                parameter.copy_(tensors[f"parameter.{name}"])
        restore_optimizer(self.learner.optimizer, list(self.learner.parameters), tensors)
        self.step, self.seconds, self.best = state["step"], state["seconds"], state["best"]
        self._bad_validations, self._constant_steps = state["bad"], state["constant"]


def check_batch(config: TrainConfig, world_size: int) -> None:
    """Raise `ConfigError` unless a step's prompts divide evenly among the processes."""
    prompts = config.generation_batch_size // config.num_generations
    if prompts % world_size:
        fitting = max(n for n in range(1, world_size) if prompts % n == 0)
        multiple = config.num_generations * world_size
        raise ConfigError(
            f"the {prompts} prompts of a step (generation_batch_size / num_generations) cannot be divided evenly among "
            f"{world_size} processes",
            remedy=f"set --generation-batch-size to a multiple of {multiple}, or start {fitting} processes",
        )


def plot_curve(history: Sequence[Mapping[str, Any]], path: str | Path, title: str) -> None:
    """Write the learning curve as a PNG: accuracy of rollouts and validations (with interval), KL and entropy."""
    steps = [entry for entry in history if entry["kind"] == "step"]
    validations = [entry for entry in history if entry["kind"] == "validation"]
    canvas = figure(7, 6)
    top, bottom = canvas.subplots(2, 1, sharex=True)
    top.plot([e["step"] + 1 for e in steps], [e["right"] for e in steps], lw=1, alpha=0.6, label="rollouts")
    if validations:
        x, y = [e["step"] for e in validations], [e["accuracy"] for e in validations]
        low = [a - e["interval"][0] for a, e in zip(y, validations, strict=True)]
        high = [e["interval"][1] - a for a, e in zip(y, validations, strict=True)]
        label = f"validation, n = {validations[0]['n']}, 95 %"
        top.errorbar(x, y, yerr=[low, high], fmt="o-", capsize=3, label=label)
    top.set(ylabel="accuracy", ylim=(-0.02, 1.02), title=title)
    top.legend()
    bottom.plot([e["step"] + 1 for e in steps], [e["kl"] for e in steps], label="KL to the base")
    bottom.plot([e["step"] + 1 for e in steps], [e["entropy"] for e in steps], label="entropy")
    bottom.set(xlabel="step", ylabel="nats per token")
    bottom.legend()
    save_png(canvas, path)
