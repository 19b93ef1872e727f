"""Interleaved timing of contestants, and the JSON object that every benchmark prints.

Contestants take turns (A B C A B C …), so that a machine that slows down affects all of them. Ratios are formed within
each repeat and reported as minimum, median and maximum over the repeats.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sigmix.errors import ConfigError


@dataclass(frozen=True)
class Aim:
    """Target of a figure's median: at least or at most ``bound``."""

    relation: str
    bound: float

    def __post_init__(self) -> None:
        if self.relation not in (">=", "<="):
            raise ConfigError(f"an aim is >= or <= a bound, not {self.relation!r}")

    def met(self, value: float) -> bool:
        """Return whether ``value`` reaches the target."""
        return value >= self.bound if self.relation == ">=" else value <= self.bound

    def __str__(self) -> str:
        return f"{self.relation} {self.bound:g}"


def say(line: str) -> None:
    """Print progress on stderr."""
    print(line, file=sys.stderr, flush=True)


def interleaved(
    contestants: Mapping[str, Callable[[int], float | None]], repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Return the seconds of each contestant in each repeat.

    Args:
        contestants: called with the number of the round, from 0, warm-ups included. A contestant may return its own
            seconds; otherwise the call is timed.
        repeats: rounds that count, at least 1. warmup: rounds before them.
    """
    if repeats < 1:
        raise ConfigError(f"repeats must be at least 1, not {repeats}")
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(warmup + repeats):
        progress = []
        for name, contestant in contestants.items():
            gc.collect()
            start = time.perf_counter()
            own = contestant(number)
            taken = time.perf_counter() - start if own is None else own
            progress.append(f"{name} {taken:.3g} s")
            if number >= warmup:
                seconds[name].append(taken)
        label = f"repeat {number - warmup + 1} of {repeats}" if number >= warmup else "warm-up"
        say(f"{label}: {', '.join(progress)}")
    return seconds


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Return quotients repeat by repeat."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return min, median and max."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def percent(figures: Mapping[str, Any] | None, key: str = "accuracy") -> str:
    """Format a share and its 95 % interval in per cent: "68.4 [63.0, 73.3]"; "" for None."""
    if figures is None:
        return ""
    low, high = figures["interval"]
    return f"{100 * figures[key]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def device(dtype: Any = "float32") -> dict[str, Any]:
    """Return CPU model, threads, dtype, versions, and the load average of the last minute."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def report(
    bench: str,
    where: Mapping[str, Any],
    ratios: Mapping[str, Sequence[float]],
    aims: Mapping[str, Aim],
    raw: Mapping[str, Any],
    seconds: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, Any]:
    """Return the result of a benchmark as JSON values.

    Args:
        where: from `device`, taken before the work, so that the load average excludes the benchmark.
        ratios: {name: value per repeat}. seconds: the same for other figures; they end up in ``raw``.
        aims: targets of names in ``ratios`` or ``seconds``. raw: all figures behind the ratios, and ``skipped``
            {peer: reason}.

    Returns:
        ``bench``; ``device``; ``ratios`` {name: {min, median, max}}; ``aims`` {name: ">= 2.5"}; ``met`` {name: bool},
        by the median; ``raw``, with the ratios of every repeat under ``ratios_by_repeat``.
    """
    figures = {**(seconds or {}), **ratios}
    return {
        "bench": bench,
        "device": dict(where),
        "ratios": {name: summary(values) for name, values in ratios.items()},
        "aims": {name: str(aim) for name, aim in aims.items()},
        "met": {name: aim.met(summary(figures[name])["median"]) for name, aim in aims.items()},
        "raw": {
            **raw,
            **{name: summary(values) for name, values in (seconds or {}).items()},
            "ratios_by_repeat": {name: list(values) for name, values in ratios.items()},
        },
    }


def text(result: Mapping[str, Any]) -> str:
    """Format a report for the terminal."""
    where = result["device"]
    lines = [
        f"{result['bench']} on {where['cpu']}, {where['threads']} threads, {where['dtype']}, torch {where['torch']}"
        f" (load {where['load_average']:.1f} before)"
        if where["load_average"] is not None
        else f"{result['bench']} on {where['cpu']}, {where['threads']} threads, {where['dtype']}"
    ]
    for name in {**result["ratios"], **result["aims"]}:
        figure = result["ratios"].get(name) or result["raw"][name]
        line = f"{name}: {figure['median']:.3g} ({figure['min']:.3g} to {figure['max']:.3g})"
        if name in result["aims"]:
            line += f", aim {result['aims'][name]}: {'met' if result['met'][name] else 'missed'}"
        lines.append(line)
    lines += [f"{name} is left out: {reason}" for name, reason in result["raw"].get("skipped", {}).items()]
    return "\n".join(lines)
