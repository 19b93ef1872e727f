"""Which mix answers which request of an evaluation, and the account of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sigmix.adapt.decision import OTHER, Decision, Strategy
from sigmix.adapt.opening import AUTO
from sigmix.experts.mix import Mix
from sigmix.files import write_text


class Requests:
    """Which mix answers a request: one for all, or what a strategy decides, once for each distinct request."""

    def __init__(self, mix: Mix | None, strategy: Strategy | None, file: Path | None = None) -> None:
        self.mix, self.strategy, self.file = mix, strategy, file
        self.decisions: dict[str, Decision] = {}
        self.count: Counter[str] = Counter()

    def mixes(self, asked: Sequence[str]) -> list[Mix]:
        """A mix for each request, in order; "" is no request, and gets the base."""
        if self.strategy is None:
            assert self.mix is not None
            found = [self.mix] * len(asked)
        else:
            fresh = [text for text in dict.fromkeys(asked) if text not in self.decisions]
            some = [text for text in fresh if text.strip()]
            self.decisions |= dict(zip(some, self.strategy.decide(some) if some else [], strict=True))
            none = Decision(Mix.base(), OTHER, "there is no context to decide by")
            self.decisions |= {text: none for text in fresh if text not in self.decisions}
            found = [self.decisions[text].mix for text in asked]
            if self.file is not None:
                lines = [{"request": text, **one.to_json()} for text, one in self.decisions.items()]
                write_text(self.file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        self.count.update(mix.id for mix in found)
        return found

    def summary(self) -> dict[str, Any]:
        """JSON values: mixes with how many requests each answered; with a strategy also what it decided and cost.

        ``mixes`` counts every request of the harness (each choice of a question is one); ``contexts`` and ``labels``
        count what was decided, once for each distinct request. ``tokens`` and ``seconds`` are pass one's, in sum.
        """
        mix = AUTO if self.mix is None else self.mix.id
        told: dict[str, Any] = {"mix": mix, "mixes": dict(self.count.most_common())}
        if self.strategy is not None:
            made = list(self.decisions.values())
            told |= {
                "strategy": self.strategy.name, "contexts": len(made),
                "labels": dict(Counter(one.label for one in made).most_common()),
                "tokens": sum(one.tokens for one in made), "seconds": round(sum(one.seconds for one in made), 3),
            }  # fmt: skip
        return told
