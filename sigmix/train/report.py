"""What a person sees of a run: the learning-curve picture and the model card's figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sigmix.evals.plots import figure, save_png


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
