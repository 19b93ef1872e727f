"""`sigmix chat`: a conversation with the base model or a mixture that can be changed between turns."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sigmix.cli import _options as shared
from sigmix.cli import app
from sigmix.cli._console import note
from sigmix.cli._loading import open_bank, open_engine
from sigmix.errors import ConfigError, SigmixError, UnknownNameError

if TYPE_CHECKING:
    from sigmix.engine import Engine
    from sigmix.experts.mix import Mix

HELP = """/expert NAME      answer with one expert
/mix a:0.7+b:0.3  answer with a mixture (or a .json file); without one: show the active mixture
/base             answer with the base model
/auto             choose a mixture for every turn
/experts          list the experts
/new              start a new conversation
/help             show this list
/quit             leave (Ctrl-D too); Ctrl-C stops an answer"""


@app.command(epilog="Example: sigmix chat --mix dates")
@shared.with_sampling
def chat(
    mix: str = typer.Option("base", help=f"First mixture: {shared.MIXTURE}, auto, or base."),
    strategy: str = shared.STRATEGY,
    max_new_tokens: int = typer.Option(256, min=1, help="Maximum tokens of an answer."),
    seed: int = typer.Option(0, help="Random seed; turn i is sampled with seed + i."),
    single_turn: bool = typer.Option(
        False, "--single-turn", help="Forget each turn after its answer, as the bundled experts were trained."
    ),
    system: str = shared.SYSTEM, base: str = shared.BASE, quantization: str = shared.QUANTIZATION,
    basis: str = shared.BASIS, device_map: str = shared.DEVICE_MAP, decode_weights: str = shared.DECODE_WEIGHTS,
    compile: bool = shared.COMPILE, bank: Path = shared.BANK,
    **sampling: Any,
) -> None:  # fmt: skip
    """Talk with the base model or its experts; /help lists the commands."""
    from sigmix.engine.generation import SamplingParams
    from sigmix.experts.mix import Mix, read_mix

    experts = open_bank(bank)
    first = Mix.base() if mix == "auto" else read_mix(mix, experts)
    engine = open_engine(base, experts, [first], quantization, basis, device_map, decode_weights, compile)
    options = {"max_new_tokens": max_new_tokens, "do_sample": sampling["temperature"] > 0, **sampling}
    engine.check_params(SamplingParams(**options))
    session = Session(engine, first, strategy, options, seed, single_turn, system)
    if system:
        engine.encode("", system)  # raises where the chat template takes no system message
    if mix == "auto":
        session.choose()
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (used by input())
        note(f"{base}, {len(engine.bank)} experts. /help shows the commands, /quit or Ctrl-D leaves.")
    for line in session.lines():
        if not session.turn(line):
            return


class Session:
    """State of a conversation: the active mixture and the history.

    Args:
        options: of the engine's ``stream``. seed: of the first turn. single_turn: keep no history.
    """

    def __init__(
        self, engine: Engine, mix: Mix, strategy: str, options: dict[str, Any], seed: int = 0,
        single_turn: bool = False, system: str | None = None,
    ) -> None:  # fmt: skip
        from sigmix.adapt.two_pass import TwoPass

        self.engine, self.mix, self.options, self.seed, self.single_turn = engine, mix, options, seed, single_turn
        self.two_pass, self.auto = TwoPass(engine, strategy), False
        self.system, self.history = system, list[dict[str, str]]()

    def lines(self) -> Iterator[str]:
        """Yield typed lines, or those of piped input."""
        if not sys.stdin.isatty():
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")  # type: ignore[union-attr]
            yield from sys.stdin
            return
        while True:
            try:
                yield input(f"{'auto' if self.auto else self.mix.id}> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                note("\n/quit or Ctrl-D leaves")

    def turn(self, line: str) -> bool:
        """Execute a command or answer a message; False ends the session. Errors are printed."""
        line = line.strip()
        try:
            if line.startswith("/"):
                return self.command(*line.partition(" ")[::2])
            if line:
                self.answer(line)
        except SigmixError as error:
            sys.stdout.flush()
            note(f"sigmix: {error}")
        return True

    def command(self, word: str, rest: str) -> bool:
        """Execute a command; False ends the session."""
        from sigmix.experts.mix import Mix, read_mix

        rest = rest.strip()
        if word in ("/quit", "/exit", "/q"):
            return False
        if word == "/help":
            print(HELP, flush=True)
        elif word == "/new":
            self.history.clear()
            print("(new conversation)", flush=True)
        elif word == "/experts":
            from sigmix.experts.inspect import listing

            rows = listing(self.engine.bank)  # type: ignore[arg-type]
            lines = [f"{one['name']:<20} {one['problem'] or one['description'] or one['domain'] or ''}" for one in rows]
            print("\n".join(lines) or "there are no experts; --bank gives a folder of them", flush=True)
        elif word == "/base":
            self.switch(Mix.base())
        elif word == "/auto":
            self.choose()
        elif word == "/expert":
            if not rest:
                raise ConfigError("/expert needs a name", remedy="/experts lists them")
            self.switch(Mix.base() if rest == "base" else Mix.one(rest))
        elif word == "/mix":
            self.switch(read_mix(rest) if rest else self.mix)
        else:
            raise UnknownNameError("command", word, [text.split()[0] for text in HELP.splitlines()])
        return True

    def switch(self, mix: Mix) -> None:
        """Answer with another mixture from now on, unless it does not fit the base model."""
        from sigmix.experts.mix import answer_note

        self.engine.z(mix)
        self.mix, self.auto = mix, False
        print(f"(answering with {answer_note(mix, self.engine.bank) or mix.id})", flush=True)

    def choose(self) -> None:
        """Choose a mixture for every turn from now on."""
        print(f"(choosing for every turn, strategy {self.two_pass.strategy.name})", flush=True)
        self.auto = True

    def answer(self, text: str) -> None:
        """Stream one answer."""
        messages = [*([] if self.single_turn else self.history), {"role": "user", "content": text}]
        ids, messages = self.fit(messages)
        if self.auto:
            (decision,) = self.two_pass.decide([text])
            self.mix = decision.mix
            print(f"({decision.mix.id}: {decision.reason})", flush=True)
        reply = ""
        pieces: Any = self.engine.stream(ids, self.mix, seed=self.seed, **self.options)
        try:
            with contextlib.closing(pieces):
                for piece in pieces:
                    reply += piece
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" (stopped)", end="")
        print(flush=True)
        self.seed += 1
        self.history = [*messages, {"role": "assistant", "content": reply}]

    def fit(self, messages: list[dict[str, str]]) -> tuple[list[int], list[dict[str, str]]]:
        """Return token ids of the conversation, and its messages without the oldest that exceed the context."""
        limit, kept = self.engine.context_length, messages
        ids = self.engine.encode(kept, self.system)
        while limit is not None and len(kept) > 1 and len(ids) + self.options["max_new_tokens"] > limit:
            kept = kept[2:]
            ids = self.engine.encode(kept, self.system)
        if dropped := (len(messages) - len(kept)) // 2:
            note(f"({dropped} of the oldest turns dropped: the context has {limit} tokens)")
        return ids, kept
