"""Strategy A (Transformer², section 3.2): the base model classifies the request by a prompt.

The prompt lists the bank's labels with their descriptions, then the request. Each label is scored by its log-likelihood
as the reply under constrained decoding: wherever labels diverge, probabilities are renormalised over the tokens still
possible. If all labels begin with different tokens this is one prefill. The prefix up to the request is cached.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import torch

from sigmix.adapt.base import OTHER, Decision, Label, check_bank, labels
from sigmix.engine.base import InferenceEngine
from sigmix.engine.constrained import TokenTrie
from sigmix.errors import ContextError
from sigmix.experts.mix import Mix

NEUTRAL = ("", "N/A", "…")  # requests without content, for contextual calibration (Zhao et al. 2021, arXiv 2102.09690)


def question(kinds: Sequence[Label], request: str) -> str:
    """Return the user turn of the first pass. The request comes last, so that all before it is a shared prefix."""
    listed = "\n".join(f"- {label.name}: {label.description}" for label in kinds)
    names = ", ".join(label.name for label in kinds)
    return (
        f"What kind of task is the request below?\n{listed}\n\nDo not do what it asks. Answer with the kind only: "
        f"{names}.\n\nRequest: {request.strip()}"
    )


class PromptDispatch:
    """Strategy A: the label that the base model finds most likely.

    Args:
        calibrate: divide by the labels' probabilities for requests without content.
        mix: mixture that classifies; default: the base.
    """

    name = "A (prompt)"
    subject = "the base"

    def __init__(self, engine: InferenceEngine, *, calibrate: bool = True, mix: Mix | None = None) -> None:
        self.engine, self.mix = engine, mix or Mix.base()
        self.labels = labels(engine.bank)
        check_bank(engine)
        engine.check_mix(self.mix)
        names = [label.name for label in self.labels]
        self.trie = TokenTrie.from_texts(engine.tokenizer, names, engine.eos_token_ids)
        one, two = self._encode("a"), self._encode("7 b")
        # 0: a tokenizer that has neither text
        self.prefix = one[: next((place for place, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), 0)]
        self.prior = torch.zeros(len(self.labels))
        if calibrate and len(self.labels) > 1:
            with contextlib.suppress(ContextError):  # too many labels for the context: `decide` gives the base
                self.prior = self.scores(NEUTRAL)[0].softmax(-1).mean(0).log()

    def scores(self, requests: Sequence[str]) -> tuple[torch.Tensor, list[int]]:
        """Return the constrained log-likelihood of every label, float32 [N, L], and the tokens computed per request."""
        return self._scores([self._encode(request) for request in requests])

    def decide(self, prompts: Sequence[str]) -> list[Decision]:
        """Return one decision per user turn; the label "other" and a request over the context length mean the base."""
        if len(self.labels) == 1:
            return [Decision(Mix.base(), OTHER, "the bank is empty") for _ in prompts]
        longest, readable = max(map(len, self.trie.replies)), []
        refused: dict[int, Decision] = {}
        for number, row in enumerate(map(self._encode, prompts)):
            try:
                self.engine.check_prompt(row, longest, "the request in the first pass")
                readable.append(row)
            except ContextError as error:
                refused[number] = Decision(Mix.base(), OTHER, error.message)
        decisions = iter(self._decide(readable) if readable else [])
        return [refused[number] if number in refused else next(decisions) for number in range(len(prompts))]

    def _encode(self, request: str) -> list[int]:
        return self.engine.encode(question(self.labels, request))

    def _scores(self, rows: list[list[int]]) -> tuple[torch.Tensor, list[int]]:
        replies = self.trie.replies
        scores = torch.zeros(len(rows), len(replies))
        tokens = [0] * len(rows)
        if len(replies) == 1:
            return scores, tokens
        cached = self.engine.cached_tokens(self.prefix)
        for stem in self.trie.branches():
            options = self.trie.allowed(stem)
            tokens = [count + len(row) - cached + len(stem) for count, row in zip(tokens, rows, strict=True)]
            logprobs = self.engine.next_logprobs(rows, options, self.mix, answer=stem, start=self.prefix)
            for column, ids in enumerate(replies):
                if ids[: len(stem)] == stem:
                    scores[:, column] += logprobs[:, options.index(ids[len(stem)])]
        return scores, tokens

    def _decide(self, rows: list[list[int]]) -> list[Decision]:
        started = time.perf_counter()
        scores, tokens = self._scores(rows)
        probabilities = (scores - self.prior).softmax(-1)
        seconds = (time.perf_counter() - started) / len(rows)
        decisions = []
        for row, count in zip(probabilities.tolist(), tokens, strict=True):
            best = max(range(len(row)), key=row.__getitem__)
            label = self.labels[best]
            reason = f"{self.subject} calls it {label.name} ({row[best]:.0%})"
            evidence = {"probabilities": {one.name: value for one, value in zip(self.labels, row, strict=True)}}
            decisions.append(Decision(label.mix, label.name, reason, evidence, count, seconds))
        return decisions
