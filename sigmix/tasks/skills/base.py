"""`skill`: ten lines make a task. A generator function gives an `Item`; its keyword arguments are the task's options.

    @skill("double", domain="arithmetic", verify=strict_number, description="Double a number.")
    def double(rng, digits: int = 2):
        a = rng.randrange(1, 10**digits)
        return Item(f"What is twice {a}? Answer with the number only.", str(2 * a), wrong=[str(a)])

Rules for a skill: no constant reply wins, no candidate's position gives the answer away, and ``wrong`` holds the
replies that a lax verifier would take (the other candidate, all candidates, a false sentence with the right word).
"""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sigmix.errors import ConfigError
from sigmix.tasks.base import ProceduralTask, Sample, Score
from sigmix.tasks.registry import register

Verify = Callable[..., Score]


@dataclass
class Item:
    """What a generator returns.

    Attributes:
        prompt, gold: as in `Sample`.
        wrong: replies that must score 0.
        extra: keyword arguments for the verifier (e.g. ``accept``).
        key: items with the same key stay in one split (e.g. "3 5" for 3+5 and 5+3); default: the prompt alone.
    """

    prompt: str
    gold: str
    wrong: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    key: str | None = None


class SkillTask(ProceduralTask):
    """A generated task around one generator function and one verifier ``verify(reply, gold, **extra)``."""

    def __init__(self, generate: Callable[..., Item], verify: Verify, label: str, options: dict[str, Any]) -> None:
        super().__init__()
        self._generate = functools.partial(generate, **options)
        self._verify = verify
        self._label = label

    def stream(self, seed: int) -> Iterator[tuple[Sample, str | None]]:
        rng = random.Random(f"sigmix skill {self._label} {seed}")
        while True:
            item = self._generate(rng)
            sample = Sample.make(item.prompt, item.gold, wrong=item.wrong, extra=item.extra)
            # the label keeps equal keys of different tasks from falling into the same split together
            yield sample, None if item.key is None else f"{self._label} {item.key}"

    def score(self, sample: Sample, reply: str) -> Score:
        return self._verify(reply, sample.gold, **sample.meta["extra"])

    def wrong_replies(self, sample: Sample) -> list[str]:
        return [*super().wrong_replies(sample), f"{sample.gold} {sample.gold}", *sample.meta["wrong"]]


def skill(
    name: str, *, domain: str, verify: Verify, description: str, max_new_tokens: int = 8
) -> Callable[[Callable[..., Item]], Callable[..., Item]]:
    """Register a generator function as the task ``name``; returns the function unchanged.

    Whole-number options must be at least 1, and an option of another type than its default's is a `ConfigError`.
    """

    def decorate(generate: Callable[..., Item]) -> Callable[..., Item]:
        parameters = list(inspect.signature(generate).parameters.values())[1:]

        def factory(**options: Any) -> SkillTask:
            for parameter in parameters:
                _check_option(name, parameter, options.get(parameter.name, parameter.default))
            task = SkillTask(generate, verify, name, options)
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
