"""`sigmix chat`: a conversation whose mix of experts can be changed between turns."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from sigmix.cli._console import note
from sigmix.cli._loading import AUTO, explained, open_bank, open_engine, open_strategy, read_mix
from sigmix.cli._options import BANK, BASE, BASIS, DEVICE_MAP, QUANTIZATION, STRATEGY

HELP = """/expert NAME      answer with one expert
/mix a:0.7+b:0.3  answer with a mix (or a .json file); alone: show the active one
/base             answer with the base
/auto             choose experts anew for every turn
/experts          list the experts
/new              forget the conversation so far
/help             this list
/quit             leave (Ctrl-D too); Ctrl-C stops an answer"""


def chat(
    mix: str = typer.Option("base", help="What answers at first: a:0.7+b:0.3, a name, a .json file, auto, or base."),
    strategy: str = STRATEGY,
    max_new_tokens: int = typer.Option(256, min=1, help="Longest answer."),
    temperature: float = typer.Option(0.0, min=0.0, help="0 is greedy."),
    top_p: float = typer.Option(1.0, help="Sample from the smallest set of this probability."),
    seed: int = typer.Option(0, help="Turn number i is sampled with seed + i."),
    single_turn: bool = typer.Option(
        False, "--single-turn", help="Forget each turn after its answer: the bundled experts were trained on one."
    ),
    system: str = typer.Option(None, help="System turn. Default: the chat template's own."),
    base: str = BASE,
    quantization: str = QUANTIZATION,
    basis: str = BASIS,
    device_map: str = DEVICE_MAP,
    bank: Path = BANK,
) -> None:
    """Talk with the base or its experts; type /help for the commands."""
    from sigmix.errors import ConfigError, ExpertError

    if not 0 < top_p <= 1:
        raise ConfigError(f"--top-p must be in (0, 1], not {top_p:g}")
    try:
        experts = open_bank(bank)
    except ExpertError:
        if bank is not None:
            raise
        experts = None
    started = read_mix("base" if mix == AUTO else mix, experts)
    if (started.weights or mix == AUTO) and experts is None:
        experts = open_bank(None)  # raises, and says why
    engine = open_engine(base, experts, [started], quantization, basis, device_map)
    session = Session(engine, started, max_new_tokens, temperature, top_p, seed, single_turn, system)
    session.strategy = strategy
    if mix == AUTO:
        session.choose()
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (input() uses it)
        note(f"{base}, {len(engine.bank)} experts. /help shows the commands, /quit or Ctrl-D leaves.")
    for line in session.lines():
        if not session.turn(line):
            return


class Session:
    """The state of a conversation: active mix and history."""

    def __init__(
        self, engine: Any, mix: Any, max_new_tokens: int, temperature: float, top_p: float, seed: int, single: bool,
        system: str | None,
    ) -> None:  # fmt: skip
        self.engine, self.mix, self.single = engine, mix, single
        self.max_new_tokens, self.temperature, self.top_p, self.seed = max_new_tokens, temperature, top_p, seed
        self.system = [{"role": "system", "content": system}] if system else []
        self.history: list[dict[str, str]] = []
        self.turns = 0
        self.strategy = AUTO
        self.chooser: Any = None  # set while every turn chooses its own experts

    def lines(self) -> Iterator[str]:
        """What is typed, with the active mix as the prompt, or the lines of piped input."""
        if not sys.stdin.isatty():
            yield from sys.stdin
            return
        while True:
            try:
                yield input(f"{AUTO if self.chooser else self.mix.id}> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                note("\n/quit or Ctrl-D leaves")

    def turn(self, line: str) -> bool:
        """Carry out one line; False ends the session. Errors are shown and the session goes on."""
        from sigmix.errors import SigmixError

        line = line.strip()
        if not line:
            return True
        try:
            if line.startswith("/"):
                return self.command(line)
            self.answer(line)
        except SigmixError as error:
            sys.stdout.flush()
            note(f"sigmix: {error}")
        return True

    def command(self, line: str) -> bool:
        """A line that begins with a slash."""
        from sigmix.errors import ConfigError, UnknownNameError
        from sigmix.experts.mix import Mix

        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word in ("/quit", "/exit", "/q"):
            return False
        if word == "/help":
            print(HELP, flush=True)
        elif word == "/new":
            self.history.clear()
            print("(a new conversation)", flush=True)
        elif word == "/experts":
            self.list_experts()
        elif word == "/base":
            self.switch(Mix.base())
        elif word == "/auto":
            self.choose()
        elif word == "/expert":
            if not rest:
                raise ConfigError("/expert needs a name", remedy="/experts lists them")
            if rest != "base":
                self._known(rest)
            self.switch(Mix.base() if rest == "base" else Mix.one(rest))
        elif word == "/mix":
            mix = read_mix(rest) if rest else self.mix
            for name in mix.weights:
                self._known(name)
            self.switch(mix)
        else:
            commands = [text.split()[0] for text in HELP.splitlines()]
            raise UnknownNameError("command", word, commands, remedy="/help lists them")
        return True

    def _known(self, name: str) -> None:
        from sigmix.errors import UnknownNameError

        if name not in self.engine.bank:
            raise UnknownNameError("expert", name, self.engine.bank, remedy="/experts lists them")

    def switch(self, mix: Any) -> None:
        """Answer with another mix from now on; one that does not fit the base changes nothing."""
        self.engine.z(mix)
        self.mix, self.chooser = mix, None
        print(f"(answering with {mix.id})", flush=True)

    def choose(self) -> None:
        """Choose experts for every turn from now on."""
        self.chooser = open_strategy(self.engine, self.strategy)
        print(f"(choosing for every turn, strategy {self.chooser.name})", flush=True)

    def list_experts(self) -> None:
        """Names, domains and descriptions."""
        from sigmix.experts.inspect import listing

        rows = listing(self.engine.bank) if self.engine.bank else []
        for row in rows:
            print(f"{row['name']:<20} {row['problem'] or row['description'] or row['domain'] or ''}")
        if not rows:
            print("there are no experts; --bank gives a folder of them")
        sys.stdout.flush()

    def answer(self, text: str) -> None:
        """Stream one answer."""
        messages = [*([] if self.single else self.history), {"role": "user", "content": text}]
        ids, messages = self.fit(messages)
        told = ""
        if self.chooser is not None:
            (decision,) = self.chooser.decide([text])
            self.mix = decision.mix
            print(f"({explained(decision)})", flush=True)
        pieces = self.engine.stream(
            ids, self.mix, max_new_tokens=self.max_new_tokens, do_sample=self.temperature > 0,
            temperature=self.temperature, top_p=self.top_p, seed=self.seed + self.turns,
        )  # fmt: skip
        try:
            with contextlib.closing(pieces):
                for piece in pieces:
                    told += piece
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" (stopped)", end="")
        print(flush=True)
        self.turns += 1
        self.history = [*messages, {"role": "assistant", "content": told}]

    def fit(self, messages: list[dict[str, str]]) -> tuple[list[int], list[dict[str, str]]]:
        """Token ids of the conversation, and what is left of it when the oldest turns do not fit into the context.

        Raises:
            ContextError: the last turn alone does not fit.
        """
        from sigmix.engine.tokenization import check_context, context_length

        limit, dropped = context_length(self.engine.model), 0
        ids = self.ids(messages)
        while limit is not None and len(messages) > 1 and len(ids) + self.max_new_tokens > limit:
            messages, dropped = messages[2:], dropped + 1
            ids = self.ids(messages)
        check_context(self.engine.model, ids, self.max_new_tokens)
        if dropped:
            note(f"({dropped} of the oldest turns forgotten: the context holds {limit} tokens)")
        return ids, messages

    def ids(self, messages: list[dict[str, str]]) -> list[int]:
        """The conversation under the chat template, or as bare lines where there is none."""
        from sigmix.engine.tokenization import encode_turns, has_template

        tokenizer = self.engine.tokenizer
        every = [*self.system, *messages]
        if not has_template(tokenizer):
            return list(tokenizer("\n".join(message["content"] for message in every))["input_ids"])
        return encode_turns(tokenizer, every)
