"""Strategies A and B (paper, section 3.2): the model itself says what a request is about.

The request is put into a template that lists the bank's labels with their descriptions, and each label is scored by
its log-likelihood as the reply, constrained to the labels: at every token where labels part, the probabilities are
renormalised over the labels still possible. Where all labels begin with different tokens that is one prefill. The
template up to the request is computed once.

A asks the base; B asks under a classification expert z_c that was trained on exactly this template.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sigmix.adapt.base import OTHER, Decision, Label, check_bank, decide_those_that_fit, labels
from sigmix.engine.constrained import Choices
from sigmix.engine.scoring import next_logits
from sigmix.engine.tokenization import context_length
from sigmix.experts.mix import Mix

NEUTRAL = ("", "N/A", "…")
"""Requests without content: what the model says to them is its liking for a label, not a judgement."""


def question(kinds: Sequence[Label], request: str) -> str:
    """The user's turn of pass one."""
    # the request comes last: all before it is read once for all requests
    listed = "\n".join(f"- {label.name}: {label.description}" for label in kinds)
    names = ", ".join(label.name for label in kinds)
    return (
        f"What kind of task is the request below?\n{listed}\n\nDo not do what it asks. Answer with the kind only: "
        f"{names}.\n\nRequest: {request.strip()}"
    )


class PromptDispatch:
    """Strategy A: ask the base which label fits.

    Args:
        engine: an `Engine`. bank: whose experts can be chosen; None: the engine's.
        calibrate: divide by the probabilities that the labels get for requests without content.
        batch_size: requests per pass.

    Raises:
        FingerprintError, ExpertError, ConfigError: see `check_bank` and `labels`.
    """

    name = "A (prompt)"

    def __init__(
        self, engine: Any, bank: Mapping[str, Any] | None = None, *, calibrate: bool = True, batch_size: int = 64
    ) -> None:
        self.engine, self.batch_size = engine, batch_size
        self.bank = engine.bank if bank is None else bank
        self.labels = labels(self.bank)
        check_bank(engine, self.bank)
        self.mix = self._under()
        self.choices = Choices.of(engine.tokenizer, [label.name for label in self.labels], engine.ends)
        self.tokens = self.choices.replies
        self.prefix = self._prefix()
        self.prior = torch.zeros(len(self.labels))
        if calibrate and len(self.labels) > 1:
            self.prior = self.scores(NEUTRAL)[0].softmax(-1).mean(0).log()

    def _under(self) -> Mix:
        return Mix.base()

    def _row(self, request: str) -> list[int]:
        return self.engine.encode(question(self.labels, request))

    def _prefix(self) -> list[int]:
        one, two = self._row("a"), self._row("7 b")
        shared = next(i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
        return one[:shared]

    def scores(self, requests: Sequence[str]) -> tuple[torch.Tensor, list[int]]:
        """Constrained log-likelihood float32 [N, L] of every label, and the tokens that each request cost."""
        return self._scores([self._row(request) for request in requests])

    def _scores(self, rows: list[list[int]]) -> tuple[torch.Tensor, list[int]]:
        found = torch.zeros(len(rows), len(self.tokens))
        if len(self.tokens) == 1:
            return found, [0] * len(rows)
        stored = len(self.prefix) if self.engine.prefixes.usable(self.prefix) else 0
        own = [len(row) - stored for row in rows]
        cost = [0] * len(rows)
        for stem in self.choices.branches():
            options = self.choices.after(stem)
            cost = [count + fresh + len(stem) for count, fresh in zip(cost, own, strict=True)]
            logits = next_logits(
                self.engine, [[*row, *stem] for row in rows], self.mix, start=self.prefix, batch_size=self.batch_size
            )
            shares = logits[:, options].log_softmax(-1)
            for number, ids in enumerate(self.tokens):
                if ids[: len(stem)] == stem:
                    found[:, number] += shares[:, options.index(ids[len(stem)])]
        return found, cost

    def decide(self, prompts: Sequence[str]) -> list[Decision]:
        """A decision for each request; "other", and a request that does not fit into the template, is the base."""
        if len(self.labels) == 1:
            return [Decision(Mix.base(), OTHER, "the bank is empty") for _ in prompts]
        limit = context_length(self.engine.model)
        if limit is not None:
            limit -= max(map(len, self.tokens))
        return decide_those_that_fit([self._row(text) for text in prompts], limit, self._decide)

    def _decide(self, rows: list[list[int]]) -> list[Decision]:
        started = time.perf_counter()
        scores, cost = self._scores(rows)
        chances = (scores - self.prior).softmax(-1)
        seconds = (time.perf_counter() - started) / len(rows)
        made = []
        for row, tokens in zip(chances.tolist(), cost, strict=True):
            best = max(range(len(row)), key=row.__getitem__)
            label = self.labels[best]
            reason = f"{self._who()} calls it {label.name} ({row[best]:.0%})"
            shown = {one.name: chance for one, chance in zip(self.labels, row, strict=True)}
            made.append(Decision(label.mix, label.name, reason, {"probabilities": shown}, tokens, seconds))
        return made

    def _who(self) -> str:
        return "the base"
