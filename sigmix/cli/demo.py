"""`sigmix demo`: one batch with a mixture per request, accuracy of the experts, and unchanged base weights.

Nothing is trained. The requests are in ``demo.jsonl``: {"prompt", "expert", "answer"}; everyday ones have a prompt
alone. For a bank that lacks one of these experts, the batch has test items of the bank's tasks.
"""

from __future__ import annotations

import functools
import json
import math
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sigmix.cli import app
from sigmix.cli._console import Progress, accuracy, emit, note, table
from sigmix.cli._loading import open_bank, open_engine
from sigmix.cli._options import BANK, BASE, DEFAULT, JSON
from sigmix.errors import ConfigError, ExpertError, SigmixError

if TYPE_CHECKING:
    from sigmix.adapt.base import Decision
    from sigmix.engine import Engine
    from sigmix.evals.accuracy import Result
    from sigmix.experts.bank import Bank
    from sigmix.experts.expert import Expert
    from sigmix.experts.mix import Mix
    from sigmix.tasks.base import Sample, Score, Task

REQUESTS = Path(__file__).with_name("demo.jsonl")
MAX_NEW_TOKENS = 64  # tasks with longer answers are skipped: one would take several minutes
EXAMPLES = 2  # test items of a task that are shown
MAX_ITEMS = 100  # test items per expert without --n
ROUND = 10  # test items per expert in one batch
MAX_ROWS = 128  # of a batch
SECONDS = 90.0  # from the loaded model until the last batch of test items should end, without --n
WIDTH = 100  # of a line, where stdout is no terminal


@dataclass(frozen=True)
class Request:
    """A request of the batch.

    Attributes:
        ids: the prompt's tokens, with the chat template.
        expert: name of the expert that it is for; None: the base.
        gold, grade: right reply, and grader of a reply; None: no reply is right or wrong.
    """

    prompt: str
    ids: list[int]
    max_new_tokens: int
    expert: str | None = None
    gold: str | None = None
    grade: Callable[[str], Score] | None = None


@dataclass(frozen=True)
class Batch:
    """Replies of the base, and under a mixture per request.

    Attributes:
        rows: JSON figures of each request.
        tokens, seconds: generated tokens and wall time of the two calls: base, mixed.
        choice: how the mixtures were chosen, in words.
    """

    rows: list[dict[str, Any]]
    tokens: tuple[int, int] = (0, 0)
    seconds: tuple[float, float] = (0.0, 0.0)
    choice: str = ""

    @property
    def tokens_per_second(self) -> dict[str, float] | None:
        """Speed of the two calls; None without requests."""
        if not self.rows:
            return None
        base, mixed = (round(tokens / seconds, 1) for tokens, seconds in zip(self.tokens, self.seconds, strict=True))
        return {"base": base, "mixed": mixed}


@app.command(epilog="Example: sigmix demo --n 100")
def demo(
    n: int | None = typer.Option(
        None, min=EXAMPLES,
        help=f"Held-out items per expert. [default: at most {MAX_ITEMS}, as many as fit into two minutes]",
    ),
    seed: int = typer.Option(0, help="Random seed of the items."),
    base: str = BASE, bank: Path = BANK, as_json: bool = JSON,
) -> None:  # fmt: skip
    """Answer one batch of requests with an expert chosen for each, and compare base and experts on held-out items."""
    started = time.monotonic()
    experts = open_bank(bank)
    if not len(experts):
        raise ExpertError(f"{experts.folder} has no experts", remedy="train one: sigmix train --help")
    note(f"loading {base} (downloaded on the first run)")
    engine = open_engine(base, experts)
    loaded = time.monotonic()

    from sigmix.experts.fingerprint import fingerprint, short

    before = fingerprint(engine.model, fresh=True)
    skipped = _keep_fitting(engine, experts)
    tasks, examples, unmeasured = _tasks(engine, seed)
    skipped |= unmeasured
    batch = _answer(engine, _written(engine) or [one for every in examples.values() for one in every])
    if not as_json:
        _print_batch(batch)
    rows, failed = _measure(engine, tasks, n or MAX_ITEMS, seed, math.inf if n else loaded + SECONDS)
    skipped |= failed
    after = fingerprint(engine.model, fresh=True)
    seconds = round(time.monotonic() - started, 1)
    figures = {
        "base": base, "seed": seed, "batch": batch.rows, "tokens_per_second": batch.tokens_per_second, "experts": rows,
        "skipped": skipped, "weights": {"before": before, "after": after}, "seconds": seconds,
    }  # fmt: skip
    if not emit(figures, as_json):
        _print_table(rows, skipped)
        if n is None and rows and max(row["n"] for row in rows) < MAX_ITEMS:
            typer.echo(f"these items fit into two minutes; for more: sigmix demo --n {MAX_ITEMS}")
    if before != after:
        raise SigmixError(
            f"the base's weights changed: their fingerprint was {short(before)} and is {short(after)}",
            remedy="please report this with the command that you ran",
        )
    if not as_json:
        typer.echo(f"weights of the base: fingerprint {short(before)} before, {short(after)} after: unchanged")
        typer.echo(f"{seconds:.0f} s, nothing was trained. Try next:")
        for line in _next_commands(batch.rows, rows, base, bank):
            typer.echo(f"  {line}")


# ------------------------------------------------------------------ experts, tasks and requests


def _keep_fitting(engine: Engine, bank: Bank) -> dict[str, str]:
    """Set the engine's bank to the experts that fit its base; return the others with the reasons."""
    from sigmix.adapt.base import DISPATCH
    from sigmix.experts.mix import Mix

    skipped: dict[str, str] = {}
    fitting = {}
    for name in bank.names():
        try:
            if bank[name].meta.get("domain") == DISPATCH:  # chooses experts and answers nothing
                continue
            engine.check_mix(Mix.one(name))
            fitting[name] = bank[name]
        except SigmixError as error:
            skipped[name] = str(error)
    engine.bank = fitting
    return skipped


def _tasks(engine: Engine, seed: int) -> tuple[dict[str, Task], dict[str, list[Request]], dict[str, str]]:
    """Return the experts' tasks that can be measured quickly, requests of each, and for the others the reason."""
    from sigmix.evals.accuracy import training_task

    tasks: dict[str, Task] = {}
    examples: dict[str, list[Request]] = {}
    skipped: dict[str, str] = {}
    for name, expert in engine.bank.items():
        try:
            task = training_task(expert)
            task.prepare(engine.tokenizer, engine.encode, engine.context_length)
            if task.costly or task.max_new_tokens > MAX_NEW_TOKENS:
                command = f"sigmix eval --task {shlex.quote(task.name)} --expert {name}"
                skipped[name] = f"{task.name} takes too long for a demo: {command}"
                continue
            samples = task.samples("test", EXAMPLES, seed=seed)
            requests = _requests(engine, name, task, samples)
            for sample in samples:
                task.score(sample, sample.gold)
            tasks[name], examples[name] = task, requests
        except SigmixError as error:
            skipped[name] = str(error)
        except Exception as error:  # of a user's own task
            skipped[name] = f"{type(error).__name__}: {error}"
    return tasks, examples, skipped


def _written(engine: Engine) -> list[Request]:
    """Return the requests of `REQUESTS`; none if the bank lacks one of their experts."""
    rows = [json.loads(line) for line in REQUESTS.read_text(encoding="utf-8").splitlines()]
    if not all(row["expert"] in engine.bank for row in rows if "expert" in row):
        return []
    return [
        Request(
            row["prompt"], engine.encode(row["prompt"]), MAX_NEW_TOKENS, row.get("expert"), row.get("answer"),
            _grader(engine.bank[row["expert"]], row["prompt"], row["answer"]) if "expert" in row else None,
        )
        for row in rows
    ]  # fmt: skip


def _grader(expert: Expert, prompt: str, gold: str) -> Callable[[str], Score]:
    """Return the grader of an expert's task for a request that is not from its data, or one that fits the answer."""
    from sigmix.evals.accuracy import training_task
    from sigmix.tasks.base import Sample
    from sigmix.tasks.graders import grader_of
    from sigmix.tasks.infer import infer_grader

    with suppress(Exception):  # a task that is not there, or that grades its own samples only
        task, sample = training_task(expert), Sample.make(prompt, gold)
        if task.score(sample, gold).value == 1.0:
            return functools.partial(task.score, sample)
    grade = grader_of(infer_grader([gold]).grader)
    return lambda reply: grade(reply, gold)


def _requests(engine: Engine, name: str, task: Task, samples: Sequence[Sample]) -> list[Request]:
    """Return the requests of a task's samples for an expert.

    Raises:
        ContextError: one is too long for the base.
    """
    from sigmix.evals.accuracy import encode_samples

    requests = []
    for sample, ids in zip(samples, encode_samples(engine, samples), strict=True):
        engine.check_prompt(ids, task.max_new_tokens)
        grade = functools.partial(task.score, sample)
        requests.append(Request(sample.prompt, ids, task.max_new_tokens, name, sample.gold, grade))
    return requests


# ------------------------------------------------------------------ figures


def _answer(engine: Engine, requests: Sequence[Request]) -> Batch:
    """Answer requests with the base, and with a mixture per request, in one call each."""
    from sigmix.experts.mix import Mix

    if not requests:
        return Batch([])
    decisions, choice = _decide(engine, requests)
    mixes = [one.mix for one in decisions]
    for mix in (Mix.base(), max(mixes, key=lambda one: len(one.weights))):
        engine.generate([requests[0].ids], [mix], max_new_tokens=1)  # factors are read and weights packed untimed
    base_texts, base_tokens, base_seconds = _generate(engine, requests, [Mix.base()] * len(requests))
    texts, tokens, seconds = _generate(engine, requests, mixes)
    rows = [
        {"prompt": request.prompt, "expert": request.expert, "gold": request.gold,
         "base": base_text, "base_right": _right(request, base_text), "mix": decision.mix.id,
         "reason": decision.reason, "reply": text, "right": _right(request, text)}
        for request, decision, base_text, text in zip(requests, decisions, base_texts, texts, strict=True)
    ]  # fmt: skip
    return Batch(rows, (base_tokens, tokens), (base_seconds, seconds), choice)


def _decide(engine: Engine, requests: Sequence[Request]) -> tuple[list[Decision], str]:
    """Return the router's decisions, or without a router each request's own expert, and which of the two it is."""
    from sigmix.adapt.base import Decision
    from sigmix.adapt.router import REMEDY, unrouted
    from sigmix.adapt.two_pass import TwoPass
    from sigmix.experts.mix import Mix

    try:
        decisions = TwoPass(engine, "D").decide([request.prompt for request in requests])
    except ConfigError as error:
        own = [Mix.base() if one.expert is None else Mix.one(one.expert) for one in requests]
        decisions = [Decision(mix, mix.id, "given: a request of its kind") for mix in own]
        return decisions, f"its own expert, because strategy D is not available: {error}"
    choice = "chosen by strategy D (--mix auto)"
    if names := unrouted(engine.bank, engine.base_fingerprint):
        choice += f"; never chosen, without request statistics: {', '.join(names)} -> {REMEDY}"
    return decisions, choice


def _generate(engine: Engine, requests: Sequence[Request], mixes: Sequence[Mix]) -> tuple[list[str], int, float]:
    """Answer requests in one call; return the replies, the number of their tokens, and the wall time in seconds."""
    from sigmix.engine.generation import SamplingParams

    params = [SamplingParams(request.max_new_tokens) for request in requests]
    started = time.perf_counter()
    rows = [one.ids for one in requests]
    replies = engine.generate(rows, mixes, params=params, batch_size=min(len(rows), MAX_ROWS))
    seconds = time.perf_counter() - started
    return [reply.text for reply in replies], sum(len(reply.ids) for reply in replies), seconds


def _right(request: Request, reply: str) -> bool | None:
    """Return whether a reply has full marks; None: ungraded."""
    value = None if request.grade is None else request.grade(reply).value
    return None if value is None else value == 1.0


def _measure(
    engine: Engine, tasks: Mapping[str, Task], n: int, seed: int, deadline: float
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Evaluate the experts beside the base on test items, in batches with rows of every expert.

    Args:
        n: test items per expert, at most.
        deadline: value of `time.monotonic` at which the last batch should end; the first one is always evaluated.

    Returns:
        JSON figures of each expert, and the errors of the tasks that failed.
    """
    from sigmix.evals.accuracy import evaluate
    from sigmix.experts.mix import Mix

    samples: dict[str, Sequence[Sample]] = {}
    requests: dict[str, list[Request]] = {}
    failed: dict[str, str] = {}
    for name, task in tasks.items():
        try:
            samples[name] = task.samples("test", n, seed=seed)
            requests[name] = _requests(engine, name, task, samples[name])
        except SigmixError as error:  # a task that fails does not hide the others
            failed[name] = str(error)
    texts: dict[str, tuple[list[str], list[str]]] = {name: ([], []) for name in requests}
    longest = max(map(len, requests.values()), default=0)
    if requests and not sys.stderr.isatty():
        note(f"evaluating base and experts: {', '.join(requests)}")
    took = 0.0
    with Progress("evaluating", 2 * sum(map(len, requests.values()))) as progress:
        for start in range(0, longest, ROUND):
            began = time.monotonic()
            if start and began + took > deadline:
                break
            batch = [(name, one) for name, every in requests.items() for one in every[start : start + ROUND]]
            for place, mixes in enumerate(([Mix.base()] * len(batch), [Mix.one(name) for name, _ in batch])):
                replies, _, _ = _generate(engine, [one for _, one in batch], mixes)
                for (name, _), reply in zip(batch, replies, strict=True):
                    texts[name][place].append(reply)
                progress.advance(len(batch), "experts" if place else "base")
            took = time.monotonic() - began
    rows: list[dict[str, Any]] = []
    for name, answered in texts.items():
        scored = samples[name][: len(answered[0])]
        try:
            base, tuned = (evaluate(tasks[name], scored, replies) for replies in answered)
            rows.append(_row(engine, name, tasks[name], scored, base, tuned, seed))
        except SigmixError as error:
            failed[name] = str(error)
    return rows, failed


def _row(
    engine: Engine, name: str, task: Task, samples: Sequence[Sample], base: Result, tuned: Result, seed: int
) -> dict[str, Any]:
    """Return the JSON figures of an expert beside the base on the same items."""
    from sigmix.evals.accuracy import compare, constant_baseline

    return {
        "expert": name, "domain": engine.bank[name].meta.get("domain") or task.domain, "task": task.name,
        "n": len(samples), "base": base.summary(), "tuned": tuned.summary(),
        "best_constant": constant_baseline(task, samples), "paired": compare(tuned, base, seed),
        "no_answer": [sum(item.answer is None for item in one.scored) for one in (base, tuned)],
        "examples": [
            {"prompt": b.prompt, "gold": b.gold, "base": b.reply, "base_right": b.score == 1.0,
             "expert": a.reply, "expert_right": a.score == 1.0}
            for b, a in zip(base.items[:EXAMPLES], tuned.items[:EXAMPLES], strict=True)
        ],
    }  # fmt: skip


# ------------------------------------------------------------------ output


def _print_batch(batch: Batch) -> None:
    if not batch.rows:
        return
    _print_wrapped("", f"{len(batch.rows)} requests in one batch, a mixture for each: {batch.choice}")
    label = max(len(one["mix"]) for one in batch.rows)
    for one in batch.rows:
        typer.echo()
        _print_wrapped("> ", one["prompt"])
        _print_reply("base", label, one["base_right"], one["base"], max_lines=2)
        if one["mix"] != "base":
            _print_reply(one["mix"], label, one["right"], one["reply"])
            _print_reply("", label, None, one["reason"], max_lines=2)
            continue
        _print_reply("", label, None, f"left to the base ({one['reason']})", max_lines=2)
        if one["reply"] != one["base"]:  # rounding differs between batches
            _print_reply("", label, one["right"], one["reply"], max_lines=2)
    graded = [one for one in batch.rows if one["right"] is not None]
    base, mixed = (sum(bool(one[key]) for one in graded) for key in ("base_right", "right"))
    typer.echo(f"\nright, of {len(graded)} with a right answer: base {base}, one expert per request {mixed}")
    shown = [
        f"{name} {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} a second"
        for name, tokens, seconds in zip(("base", "a mixture per row"), batch.tokens, batch.seconds, strict=True)
    ]
    _print_wrapped("speed: ", f"{'; '.join(shown)} (one measurement each, with the time to read the prompts)")


def _print_reply(name: str, label: int, right: bool | None, text: str, max_lines: int | None = None) -> None:
    verdict = "" if right is None else "right" if right else "wrong"
    _print_wrapped(f"  {name:<{max(label, 4)}}  {verdict:<5}  ", text, max_lines)


def _print_wrapped(head: str, text: str, max_lines: int | None = None) -> None:
    width = min(shutil.get_terminal_size().columns, 120) if sys.stdout.isatty() else WIDTH
    lines = textwrap.wrap(" ".join(text.split()), max(width - len(head), 20), max_lines=max_lines, placeholder=" …")
    typer.echo(head + f"\n{' ' * len(head)}".join(lines or ["(nothing)"]))


def _print_table(rows: list[dict[str, Any]], skipped: Mapping[str, str]) -> None:
    cells = [
        [row["expert"], row["domain"], row["n"], accuracy(row["base"]), accuracy(row["tuned"]),
         "{accuracy:.3f}".format(**row["best_constant"]) if row["best_constant"] else "-",
         f"{row['paired']['p']:.1g}", "{} -> {}".format(*row["no_answer"])]
        for row in rows
    ]  # fmt: skip
    columns = ["expert", "domain", "n", "base [95 %]", "expert [95 %]", "best constant", "McNemar p", "no answer"]
    if rows:
        typer.echo()
        table("accuracy on held-out test items", columns, cells)
        typer.echo("no answer: replies (base -> expert) from which no answer in the requested form can be read")
    for name, why in skipped.items():
        typer.echo(f"not shown: {name}: {why}")


def _next_commands(
    batch: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], base: str, bank: Path | None
) -> list[str]:
    """Return three commands to continue with."""
    at = [] if base == DEFAULT else ["--base", base]
    train = shlex.join(["sigmix", "train", "--data", "tickets.csv", "--out", "my-experts/tickets", *at])
    commands = [f"{train}   # tickets.csv: your own file of prompts and answers"]
    at += [] if bank is None else ["--bank", str(bank)]
    if batch:
        shown = max(batch, key=lambda one: (bool(one["right"]), not one["base_right"]))
        question = " ".join(shown["prompt"].split())
        commands.append(shlex.join(["sigmix", "generate", question, "--mix", "auto", "--explain", *at]))
    else:
        commands.append(shlex.join(["sigmix", "chat", *at]))
    best = max(rows, key=lambda row: row["paired"]["difference"], default=None)
    if best is None:
        return [*commands, "sigmix doctor"]
    evaluation = ["sigmix", "eval", "--task", best["task"], "--expert", best["expert"], "--n", "300", *at]
    return [*commands, shlex.join(evaluation)]
