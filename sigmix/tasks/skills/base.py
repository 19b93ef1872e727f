"""`skill`: a task in ten lines. A generator function returns an `Item`; its keyword arguments are the task's options.

    @skill("double", domain="arithmetic", grader=strict_number, description="Double a number.")
    def double(rng, digits: int = 2):
        a = rng.randrange(1, 10**digits)
        return Item(f"What is twice {a}? Answer with the number only.", str(2 * a), wrong=[str(a)])

Rules for a skill: no constant reply wins, no candidate's position gives the answer away, and ``wrong`` holds the
replies that a lax grader would accept (see `sigmix.tasks.graders.wrong_candidates`).
"""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sigmix.errors import ConfigError
from sigmix.tasks.base import ProceduralTask, Sample, Score, final_part
from sigmix.tasks.registry import register

ONE_WORD = "Answer with one word."
NUMBER_ONLY = "Answer with the number only."
Grader = Callable[..., Score]  # ``grader(reply, gold, **extra)``


@dataclass
class Item:
    """A generated question.

    Attributes:
        prompt, gold: as in `Sample`.
        wrong: replies that must score 0.
        extra: keyword arguments for the grader (e.g. ``accept``).
        key: items with the same key stay in one split (e.g. "3 5" for 3+5 and 5+3); default: the prompt.
    """

    prompt: str
    gold: str
    wrong: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    key: str | None = None


def split_key(task: str, key: str) -> str:
    """Return the key for `hash_split`; with the name, equal keys of different tasks fall into different splits."""
    return f"{task} {key}"


class SkillTask(ProceduralTask):
    """A generated task with one generator function and one grader."""

    def __init__(self, generate: Callable[..., Item], grader: Grader, label: str, options: dict[str, Any]) -> None:
        super().__init__()
        self._generate = functools.partial(generate, **options)
        self._grader = grader
        self._label = label

    def stream(self, seed: int) -> Iterator[tuple[Sample, str | None]]:
        rng = random.Random(f"sigmix skill {self._label} {seed}")
        while True:
            item = self._generate(rng)
            sample = Sample.make(item.prompt, item.gold, wrong=item.wrong, extra=item.extra)
            yield sample, None if item.key is None else split_key(self._label, item.key)

    def score(self, sample: Sample, reply: str) -> Score:
        return self._grader(final_part(reply), sample.gold, **sample.meta.get("extra", {}))

    def wrong_replies(self, sample: Sample) -> list[str]:
        return [*super().wrong_replies(sample), f"{sample.gold} {sample.gold}", *sample.meta["wrong"]]


def skill(
    name: str, *, domain: str, grader: Grader, description: str, max_new_tokens: int = 8
) -> Callable[[Callable[..., Item]], Callable[..., Item]]:
    """Register a generator function as the task ``name``; return the function unchanged.

    Options must have the type of their default (else `ConfigError`); whole numbers must be from 1 to 12.
    """

    def decorate(generate: Callable[..., Item]) -> Callable[..., Item]:
        parameters = list(inspect.signature(generate).parameters.values())[1:]

        def factory(**options: Any) -> SkillTask:
            for parameter in parameters:
                _check_option(name, parameter, options.get(parameter.name, parameter.default))
            task = SkillTask(generate, grader, name, options)
            task.domain, task.description, task.max_new_tokens = domain, description, max_new_tokens
            return task

        factory.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        )
        factory.__doc__ = description
        register(name)(factory)
        return generate

    return decorate


def _check_option(task: str, parameter: inspect.Parameter, value: Any) -> None:
    kind = type(parameter.default)
    if type(value) is not kind:
        raise ConfigError(f"task {task}: option {parameter.name} must be of type {kind.__name__}, not {value!r}")
    if kind is int and not 1 <= value <= 12:
        raise ConfigError(f"task {task}: option {parameter.name} must be from 1 to 12, not {value}")
