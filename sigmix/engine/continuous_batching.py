"""Continuous batching: answers join and leave between decoding steps, each under a mix of its own.

`Engine.generate` starts and ends a batch as a whole; here a server's requests share steps as they come. What a row
answers does not depend on the others in its batch, up to the rounding of batched matmuls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from sigmix.engine.engine import Engine
from sigmix.engine.generation import choose, uniforms
from sigmix.engine.kv_cache import Prefilled, Slots
from sigmix.engine.prefix_cache import Entry, StoredPrefix, prefill
from sigmix.experts.mix import Mix

CHUNK = 512
"""Prompt tokens that are read between two decoding steps; a longer prompt takes several turns."""


MERGE_AFTER = 32
"""Steps under one mix after which its weights are merged: about as many as the factored form needs to lose the time
that merging takes (half a second on two cores, at eight rows of the default base). So a mix that soon goes never pays
for it, and one that stays pays little more than twice what it would have had to."""


MIXES = 1000
"""How many mixes such steps are counted of."""


Take = Callable[[int, float, list[tuple[int, float]]], bool]
"""(token id, its natural log-probability, the most probable tokens with theirs) -> whether the answer ends here."""


@dataclass(eq=False)
class Member:
    """One answer under way.

    Attributes:
        ids: the prompt. mix: what answers. max_new_tokens, temperature, top_p, seed: see `SamplingParams`.
        top: how many of the most probable tokens `take` is told. take: called with every token.
        remember: keep what was read, so that a prompt that goes on from this answer is not read again as a whole.
        answer: token ids so far. context: whatever the caller wants to find here again.
        finish: "" while it goes on, then "stop", "length" or "error" (the logits were not finite).
    """

    ids: list[int]
    mix: Mix
    take: Take
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top: int = 0
    remember: bool = False
    finish: str = ""
    answer: list[int] = field(default_factory=list)
    context: Any = None
    draws: torch.Tensor | None = field(default=None, repr=False)


class Running:
    """A batch of members that changes between steps.

    Args:
        engine: an `Engine`; while a step is under way nothing else may use it, and `rest` lets others use it.
        form: how several mixes are computed: "factored" or "gain" (exact), or "truncated", see `States.under`; steps
            with an expert that the truncation was not fitted for are factored.
    """

    def __init__(self, engine: Engine, form: str = "factored") -> None:
        self.engine, self.form = engine, engine.states.mixed if form == "factored" else form
        self.members: list[Member] = []
        self.slots = Slots()
        self._reading: list[tuple[Member, DynamicCache, int]] = []
        self._next: list[int] = []
        self._stack = ExitStack()
        self._keep: Any = None
        self._order: list[int] | None = None  # rows of the state that is entered; None: none is
        self._kept: list[tuple[Mix, list[int], Entry]] = []  # what was read of answers that ended, until the next rest
        self._only: Mix | None = None  # the one mix of the state that is entered, if its weights are not merged
        self._paid: Counter[Mix] = Counter()  # steps under one mix since its weights were merged

    def __len__(self) -> int:
        return len(self.members) + len(self._reading)

    # ------------------------------------------------------------------ joining

    @torch.no_grad()
    def join(self, members: Sequence[Member]) -> None:
        """Read prompts and choose their first tokens; long ones are read in the steps to come.

        Prompts must not be empty, and must fit the context with their answers.
        """
        self.rest()
        short = []
        for member in members:
            known = self.engine.known_beginning(member.ids, member.mix, self._form([member.mix]))
            if known is not None:
                self._reading.append((member, known.cache, len(known.ids)))
            elif len(member.ids) > CHUNK:
                self._reading.append((member, DynamicCache(config=self.engine.model.config), 0))
            else:
                short.append(member)
        for part in _alike(short):
            mixes = [member.mix for member in part]
            with self.engine.under(mixes, self._form(mixes)) as keep:
                state = self.engine.read([member.ids for member in part], mixes, keep)
                self._start(part, state)

    def _start(self, members: Sequence[Member], state: Prefilled) -> None:
        tokens = self._choose(members, state.logits)
        stay = [place for place, member in enumerate(members) if not member.finish]
        if not stay:
            return
        if len(stay) < len(members):
            keep = torch.tensor(stay, device=state.mask.device)
            state.cache.batch_select_indices(keep)
            state = Prefilled(state.cache, state.mask[keep], state.logits[keep], state.lengths[keep])
        self.slots.join(state)
        self.members += [members[place] for place in stay]
        self._next += [tokens[place] for place in stay]

    def _read_on(self, budget: int) -> int:
        """The next part, of up to ``budget`` tokens, of the prompt that came first; returns its tokens."""
        member, cache, done = self._reading[0]
        part = member.ids[done : done + budget]
        with self.engine.under([member.mix], self._form([member.mix])) as keep:
            start = StoredPrefix(tuple(member.ids[:done]), cache) if done else None
            if done + len(part) < len(member.ids):
                model = self.engine.model
                device = model.get_input_embeddings().weight.device
                none = torch.empty(0, dtype=torch.long, device=device)
                model(
                    input_ids=torch.tensor([part], device=device), past_key_values=cache, use_cache=True,
                    logits_to_keep=none,
                )  # fmt: skip
                self._reading[0] = (member, cache, done + len(part))
                return len(part)
            self._reading.pop(0)
            self._start([member], prefill(self.engine.model, [member.ids], self.engine.pad_id, keep is None, start))
        return len(part)

    # ------------------------------------------------------------------ stepping

    @torch.no_grad()
    def step(self) -> None:
        """A token for every member, and a part of one long prompt; those that finish leave."""
        budget = CHUNK
        while self._reading and budget > 0:
            self.rest()
            budget -= self._read_on(budget)
        if not self.members:
            return
        self._enter()
        tokens = torch.tensor(self._next, device=self.slots.lengths.device)
        logits = self.engine.model(**self.slots.inputs(tokens)).logits[:, -1]
        self.slots.advance()
        self._next = self._choose(self.members, logits)
        if done := [member for member in self.members if member.finish]:
            self.leave(done)

    def leave(self, members: Sequence[Member]) -> None:
        """Take members out at once; those that are not there are passed over."""
        gone = set(map(id, members))
        self._reading = [entry for entry in self._reading if id(entry[0]) not in gone]
        for wipe in (True, False):
            places = [
                place
                for place, member in enumerate(self.members)
                if id(member) in gone and (member.finish == "error") == wipe
            ]
            if not places:
                continue
            for place in places:
                self._remember(place)
            order = self.slots.leave(places, wipe)
            self.members = [self.members[place] for place in order]
            self._next = [self._next[place] for place in order]
            if self._order is not None:
                self._order = [self._order[place] for place in order]
                if self._keep is not None and order:
                    self._keep(self._order)
        if not self.members:
            self.rest()

    def _remember(self, place: int) -> None:
        member = self.members[place]
        if member.remember and member.finish in ("stop", "length"):
            read = (member.ids + member.answer)[: int(self.slots.lengths[place])]  # the last token was chosen, not read
            self._kept.append((member.mix, read, self.slots.row(place)))

    def rest(self) -> None:
        """Give the engine back its own state, so that others can use it; the next step goes on."""
        self._stack.close()
        self._keep = self._order = self._only = None
        kept, self._kept = self._kept, []
        for mix, read, row in kept:
            self.engine.keep_beginning(read, mix, row, self._form([mix]))

    def _enter(self) -> None:
        if self._order is not None and len(self._order) == len(self.members) and not self._worth_merging():
            return
        self.rest()
        mixes = [member.mix for member in self.members]
        only = mixes[0] if len(set(mixes)) == 1 else None
        merge = only is not None and self._paid[only] >= MERGE_AFTER
        if merge:
            del self._paid[only]
        form = None if merge else self._form(mixes)
        self._keep = self._stack.enter_context(self.engine.under(mixes, form))
        self._order = list(range(len(mixes)))
        self._only = only if form is not None else None

    def _worth_merging(self) -> bool:
        """Counts a step under one mix that is not merged; whether there have been as many as merging it costs."""
        if self._only is None:
            return False
        if len(self._paid) > MIXES:
            self._paid.clear()
        self._paid[self._only] += 1
        return self._paid[self._only] >= MERGE_AFTER

    def _form(self, mixes: Sequence[Mix]) -> str | None:
        """None (merged) for the base, and for one mix whose weights are at hand; else the form of mixed batches."""
        one = mixes[0] if len(set(mixes)) == 1 else None
        if one is not None and (one == Mix.base() or self.engine.is_merged(one)):
            return None
        states = self.engine.states
        return self.form if self.form != "truncated" or all(map(states.truncates, mixes)) else states.mixed

    def _choose(self, members: Sequence[Member], logits: torch.Tensor) -> list[int]:
        """The next token of every member, which is told; sets ``finish`` of those that end."""
        scores = logits.float()
        for member in members:
            if member.draws is None and member.temperature > 0:
                member.draws = uniforms([member.seed], member.max_new_tokens)[0]
        draws = [0.0 if m.draws is None else float(m.draws[len(m.answer)]) for m in members]
        tokens = choose(scores, [m.temperature for m in members], [m.top_p for m in members], draws)
        chosen = (scores.gather(1, tokens[:, None])[:, 0] - scores.logsumexp(-1)).tolist()
        found = tokens.tolist()
        most = max(member.top for member in members)
        best = scores.log_softmax(-1).topk(most) if most else None
        for place, (member, token, logprob) in enumerate(zip(members, found, chosen, strict=True)):
            if not logprob > float("-inf"):  # NaN too: this row's weights are broken, and only its own
                member.finish = "error"
                continue
            told = []
            if best is not None and member.top:
                values, ids = best.values[place, : member.top], best.indices[place, : member.top]
                told = list(zip(ids.tolist(), values.tolist(), strict=True))
            member.answer.append(token)
            if member.take(token, logprob, told) or token in self.engine.ends:
                member.finish = "stop"
            elif len(member.answer) >= member.max_new_tokens:
                member.finish = "length"
        return found


def _alike(members: Sequence[Member]) -> Iterator[list[Member]]:
    """Members whose prompts are read together: so long that padding costs at most as much as the prompts."""
    part: list[Member] = []
    for member in sorted(members, key=lambda member: len(member.ids)):
        if part and len(member.ids) > 2 * len(part[0].ids):
            yield part
            part = []
        part.append(member)
    if part:
        yield part
