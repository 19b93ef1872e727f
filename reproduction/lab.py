"""Base models, training runs and test cells of the stages; results are stored and never computed twice."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import reproduction.snips  # noqa: F401  # registers the task
from reproduction.blend import Blend
from reproduction.divergence import Under, divergence
from reproduction.names import BASE, chosen_lr, mix_name, run_as, run_name
from reproduction.scale import ANSWERS, Scale
from reproduction.store import Cell, Store, safe
from reproduction.tiny import TINY, tiny_base
from reproduction.variants import VariantTrainer, surviving
from sigmix.adapt.base import Strategy
from sigmix.engine import Engine
from sigmix.engine.cpu.kernels import contiguous_head
from sigmix.engine.prefix_cache import PromptOnly, everywhere
from sigmix.errors import ConfigError, DivergedError
from sigmix.evals.accuracy import Result, commit, constant_baseline, evaluate
from sigmix.evals.statistics import wilson
from sigmix.evals.strategies import measure_strategy
from sigmix.experts.mix import Mix
from sigmix.models.loading import load_base
from sigmix.tasks.base import Sample, Split, Task
from sigmix.tasks.registry import get_task
from sigmix.train.config import TrainConfig, make_config
from sigmix.train.rollout import Actor
from sigmix.train.trainer import Trainer
from sigmix.utils.io import file_lock

KL_ITEMS = 64
"""Number of replies of a test cell for the KL to the base model."""


class Lab:
    """A reproduction in progress.

    Args:
        scale: what and how large. store: where results go. work: folder for checkpoints and adapters, which are too
            large for results. data_dir: local data sets. allow_code: let code tasks run programs. say: told what
            happens, a line at a time.
    """

    def __init__(
        self,
        scale: Scale,
        store: Store,
        work: Path,
        data_dir: Path | None = None,
        allow_code: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.scale, self.store, self.work = scale, store, Path(work)
        self.data_dir, self.allow_code, self.say = data_dir, allow_code, say
        self._drawn: dict[tuple[str, str, int | None, int], list[Sample]] = {}

    def begin(self) -> None:
        """Hold the store to this scale: what was measured under other settings must not stand beside it.

        Raises:
            ConfigError: the store was begun with another base, number of items or training.
        """
        scale = self.scale
        own = {
            "base": scale.base, "dtype": scale.dtype, "n": scale.n, "validation": scale.validation,
            "sweep": scale.sweep, "preset": scale.preset, "training": dict(scale.training),
            **({"items": dict(scale.items)} if scale.items else {}),
        }  # fmt: skip
        known = self.store.fact("scale")
        if known is None:
            self.store.write_fact("scale", own)
        elif differing := sorted(key for key in own if own[key] != known.get(key)):
            raise ConfigError(
                f"{self.store.folder} was begun with another {' and '.join(differing)}: {differing[0]} was "
                f"{known.get(differing[0])!r}, not {own[differing[0]]!r}",
                remedy="give another --out and --work",
            )

    # ------------------------------------------------------------------ bases and tasks

    def base(self, name: str | None = None, dtype: str | None = None) -> tuple[Any, Any]:
        """Return a fresh model and its tokenizer; default: the scale's base model and dtype."""
        gc.collect()
        name = name or self.scale.base
        place: Any = name
        if name == TINY:
            with self.held(TINY):  # two stages may begin at once
                place = tiny_base(self.work / "models" / "tiny-llama")
        model, tokenizer = load_base(place, dtype or self.scale.dtype)
        contiguous_head(model)
        return model, tokenizer

    def task(self, spec: str) -> Task:
        """Return a task of the registry."""
        return get_task(spec, data_dir=self.data_dir, allow_code=self.allow_code)

    def samples(self, spec: str, split: Split, n: int | None, seed: int = 0) -> list[Sample]:
        """Return items of a task, drawn once."""
        key = (spec, split, n, seed)
        if key not in self._drawn:
            self._drawn[key] = self.task(spec).samples(split, n, seed=seed)
        return self._drawn[key]

    def timed(self, work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the figures of ``work`` with its duration and the commit."""
        started = time.perf_counter()
        found = dict(work())
        return {**found, "seconds": round(time.perf_counter() - started, 2), "commit": commit()}

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Hold a lock shared by the processes of this reproduction."""
        with file_lock(self.work / "locks" / f"{safe(name)}.lock", lambda: self.say(f"waiting for {name}")):
            yield

    # ------------------------------------------------------------------ training

    def named(self, kind: str, task: str, seed: int, lr: float | None = None, after: Sequence[str] = ()) -> str:
        """Return the name of a run, see `trained`."""
        return run_name(kind, self._rate(kind, lr), task, seed, after)

    def _rate(self, kind: str, lr: float | None) -> float:
        rate = lr if lr is not None else chosen_lr(self.store, self.scale, kind)
        if rate is None:
            raise LookupError(f"the learning rate of {kind} is undefined before its sweep")
        return rate

    def trained(
        self, kind: str, task: str, seed: int, lr: float | None = None, after: Sequence[str] = ()
    ) -> tuple[str, Path]:
        """Train an adapter unless that has been done; returns the run's name and the adapter's folder.

        Args:
            lr: default: what the kind's sweep chose. after: tasks that the adapter learns before, in turn; each of
                these is a run of its own.

        A run that diverges is a result: its record says so, and its best checkpoint by validation is what it gives.
        """
        name, rate = self.named(kind, task, seed, lr, after), self._rate(kind, lr)
        folder = self.work / "runs" / name
        if not self._has_run(name):
            with self.held(name):
                if not self._has_run(name):
                    self._train(name, kind, task, seed, rate, after)
        return name, folder / "best"

    def _has_run(self, name: str) -> bool:
        return self.store.run(name) is not None and (self.work / "runs" / name / "best").exists()

    def config(self, kind: str, task: str, **options: Any) -> TrainConfig:
        """Return the configuration of a training run."""
        settings = {**self.scale.training, **self.scale.kinds[kind].options}
        if self.scale.preset == "laptop":
            settings = {"generation_batch_size": ANSWERS, **settings}
        return make_config(self.scale.preset, **settings, task=task, base=self.scale.base, **options)

    def _train(self, name: str, kind: str, task: str, seed: int, rate: float, after: Sequence[str]) -> None:
        folder = self.work / "runs" / name
        start = self.trained(kind, after[-1], seed, rate, after[:-1])[1] if after else None
        made, own = self.task(task), self.scale.kinds[kind]
        config = self.config(kind, task, learning_rate=rate, seed=seed, init_from=None if start is None else str(start))
        model, tokenizer = self.base()
        arguments = (model, tokenizer, made, config, folder, task)
        trainer = VariantTrainer(own, *arguments) if own.varied else Trainer(*arguments)
        outcome = "done"
        try:
            trainer.fit(resume=(folder / "config.json").exists())
        except DivergedError as error:
            outcome = str(error)
        self.store.write_run(
            name,
            {
                "name": name, "kind": kind, "task": task, "seed": seed, "lr": rate, "after": list(after),
                "outcome": outcome, "best": trainer.best, "seconds": round(trainer.seconds, 1),
                "parameters": sum(p.numel() for p in trainer.policy.parameters().values()),
                "config": replace(trainer.config, init_from=None).to_dict(), "commit": commit(),
                "history": [_short(entry) for entry in trainer.run.history()],
            },
        )  # fmt: skip
        self.say(f"trained {name}: validation {trainer.best['accuracy']:.3f} ({trainer.seconds:.0f} s)")

    # ------------------------------------------------------------------ cells

    def measured(
        self,
        task: str,
        samples: Sequence[Sample],
        model: Any,
        tokenizer: Any,
        under: Under,
        reference: Under | None = None,
        kl_items: int = KL_ITEMS,
        prompt_only: PromptOnly = everywhere,
    ) -> tuple[Result, dict[str, Any]]:
        """Greedy answers to samples, scored; and ``kl``, the mean exact KL(π‖π₀) in nats per token of the first ones.

        Args:
            under: puts the model into the state that is measured. reference: into the base's; None: no KL.
            kl_items: how many replies KL is measured on; it costs two more passes over each. prompt_only: state in
            which replies are read, see `complete`.
        """
        made = self.task(task)
        actor = Actor(model, tokenizer, made, prompt_only)
        with under():
            rows = actor.generate(samples, made.max_new_tokens, self.scale.batch)
        result = replace(evaluate(made, samples, actor.decode(rows)), task=task)
        if reference is None:
            return result, {}
        kl = divergence(model, actor, samples[:kl_items], rows[:kl_items], under, reference)
        return result, {"kl": kl}

    def cell(
        self,
        task: str,
        who: str,
        model: Any,
        tokenizer: Any,
        under: Under,
        reference: Under | None = None,
        prompt_only: PromptOnly = everywhere,
        **facts: Any,
    ) -> Cell:
        """`measured` on a task's test items and stored, unless it is there; ``facts`` are stored with it."""

        def measure(samples: Sequence[Sample]) -> tuple[Result, Mapping[str, Any]]:
            return self.measured(task, samples, model, tokenizer, under, reference, prompt_only=prompt_only)

        return self._stored(task, who, facts, measure)

    def strategy_cell(
        self, task: str, who: str, engine: Engine, strategy: Strategy | Mix, form: str | None = None
    ) -> Cell:
        """Evaluate a strategy, or one mixture, on a task's test items and store the cell."""
        made = self.task(task)
        return self._stored(task, who, {}, lambda samples: measure_strategy(engine, made, samples, strategy, form=form))

    def _stored(
        self,
        task: str,
        who: str,
        facts: Mapping[str, Any],
        measure: Callable[[Sequence[Sample]], tuple[Result, Mapping[str, Any]]],
    ) -> Cell:
        if not self.store.has(task, who):
            samples = self.samples(task, "test", self.scale.items.get(task, self.scale.n))
            started = time.perf_counter()
            result, found = measure(samples)
            about = {"n": len(samples), "seconds": round(time.perf_counter() - started, 2), "commit": commit()}
            self._keep(task, samples)
            self.store.write(replace(result, task=task), who, {**facts, **found, **about})
            low, high = wilson(sum(result.right), len(result.right))
            self.say(f"{task} under {who}: {100 * result.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        return self.store.cell(task, who)  # type: ignore[return-value]

    def _keep(self, task: str, samples: Sequence[Sample]) -> None:
        """Store a task's items with their best constant answer, once."""
        if not self.store.about(task):
            made = self.task(task)
            facts = {"best_constant": constant_baseline(made, samples), "notes": list(made.notes), "seed": 0}
            self.store.write_items(task, samples, facts)

    def base_cells(self, tasks: Sequence[str]) -> None:
        """Measure the base model on some tasks."""
        missing = [task for task in tasks if not self.store.has(task, BASE)]
        if missing:
            model, tokenizer = self.base()
            for task in missing:
                self.cell(task, BASE, model, tokenizer, nullcontext)

    def single_cells(
        self,
        kind: str,
        task: str,
        seed: int,
        on: Sequence[str] | None = None,
        positions: str | None = None,
        **how: Any,
    ) -> str:
        """Train an adapter and measure it on its task, or on ``on``; returns its name.

        Args:
            positions: at which z acts in the measurement; default: those of its training.
        """
        own = self.scale.kinds[kind]
        positions = positions or own.positions
        name = self.named(kind, task, seed, **how)
        who = name if positions == own.positions else run_as(name, positions)
        missing = [one for one in on or [task] if not self.store.has(one, who)]
        if missing or self.store.run(name) is None:
            folder = self.trained(kind, task, seed, **how)[1]
            model, tokenizer = self.base()
            blend = Blend(model, {"it": folder}, own.policy, True, positions, own.answer_tokens)
            facts = {"surviving": surviving(blend.experts["it"])} if own.l1 else {}
            for one in missing:
                self.cell(
                    one, who, blend.model, tokenizer, lambda: blend.under({"it": 1.0}), blend.reference,
                    blend.prompt_only, **facts,
                )  # fmt: skip
        return name

    def mixed_cells(
        self,
        blend: Blend,
        tokenizer: Any,
        kind: str,
        seed: int,
        weights: Mapping[str, float],
        on: Sequence[str],
    ) -> None:
        """Measure a merge of one seed's adapters on some tasks, with the KL to the base model."""
        rate = chosen_lr(self.store, self.scale, kind)
        who = mix_name(kind, rate or 0.0, weights, seed, blend.method)
        for task in on:
            self.cell(
                task, who, blend.model, tokenizer, lambda: blend.under(weights), blend.reference, blend.prompt_only
            )


def _short(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Round the metrics of one step to four digits."""
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in entry.items()}
