"""``python -m benchmarks serve``: `sigmix serve` against `transformers serve` on the same base model, over loopback.

Both servers are processes of their own; 1, 8 and 32 clients each send one streamed request after another. sigmix
answers with one expert for all, with a different mixture per client, with `auto` and with the base model; the peer,
which has no experts, with the base model, in its default mode (one answer at a time) and with its experimental
continuous batching (``_cb``). The experts are copies of the bank's that act on the prompt alone. Contestants take
turns; tokens are those of the base model's tokenizer in the text.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Aim, device, interleaved, ratio, report, say
from benchmarks.requests import acting_on, bundled_engine, mixtures, save_base
from sigmix.errors import SigmixError
from sigmix.experts.bank import Bank
from sigmix.models.default import DEFAULT

AIMS = {
    "mixed_vs_single_32": Aim(">=", 0.95), "between_p99_32": Aim("<=", 0.25), "vs_transformers_8": Aim(">=", 2.0),
    "vs_transformers_cb_8": Aim(">=", 1.5),
}  # fmt: skip

CLIENTS = (1, 8, 32)

SUBJECTS = "rivers bridges bread clocks maps bees glass wool salt trains paper lamps".split()

WAIT = 180.0


@dataclass
class Seen:
    """Measurements of one round of clients: texts, seconds to the first token, seconds between pieces."""

    texts: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)

    def add(self, other: Seen) -> None:
        """Take in what another client saw."""
        self.texts += other.texts
        self.first += other.first
        self.between += other.between


@contextlib.contextmanager
def server(
    words: Sequence[str], port: int, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server process that answers on a port, and stop it at the end; ``environment`` is added to ours.

    Raises:
        SigmixError: it does not start.
    """
    with log.open("w") as out:
        made = subprocess.Popen(words, stdout=out, stderr=out, env={**os.environ, **(environment or {})})
        try:
            until = time.monotonic() + WAIT
            while time.monotonic() < until:
                if made.poll() is not None:
                    raise SigmixError(f"{log.stem} ended at once: {log.read_text()[-400:]}")
                with contextlib.suppress(OSError, http.client.HTTPException):
                    link = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                    link.request("GET", "/health")
                    if link.getresponse().status == 200:
                        break
                time.sleep(0.2)
            else:
                raise SigmixError(f"{log.stem} did not start: {log.read_text()[-400:]}")
            yield made
        finally:
            made.terminate()
            try:
                made.wait(30)
            except subprocess.TimeoutExpired:
                made.kill()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def is_compiled(port: int) -> bool:
    """Return True if our server decodes with a compiled step."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
        return bool(json.load(answer)["compiled"])


def ask(port: int, model: str, question: str, tokens: int) -> Seen:
    """One streamed request."""
    seen, started, text = Seen(), time.perf_counter(), ""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    body = {
        "model": model, "messages": [{"role": "user", "content": question}], "max_tokens": tokens, "stream": True,
        "temperature": 0,
    }  # fmt: skip
    link.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    answer = link.getresponse()
    if answer.status != 200:
        raise SigmixError(f"{model}: {answer.status} {answer.read(400)!r}")
    last = None
    for line in answer:
        if not line.startswith(b"data: {"):
            continue
        found = json.loads(line[6:])
        if "error" in found:
            raise SigmixError(f"{model}: {found['error']}")
        for choice in found["choices"]:
            if piece := choice["delta"].get("content"):
                now = time.perf_counter()
                (seen.first if last is None else seen.between).append(now - (started if last is None else last))
                last = now
                text += piece
    link.close()
    seen.texts.append(text)
    return seen


def load(port: int, models: Sequence[str], each: int, tokens: int, offset: int) -> Seen:
    """Every client, one for each of ``models``, sends ``each`` requests in turn."""
    whole, errors, lock = Seen(), [], threading.Lock()

    def client(number: int, model: str) -> None:
        try:
            for turn in range(each):
                subject = SUBJECTS[(number + turn + offset) % len(SUBJECTS)]
                found = ask(port, model, f"Write a few sentences about {subject}, number {number}.", tokens)
                with lock:
                    whole.add(found)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=client, args=pair) for pair in enumerate(models)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return whole


def run(
    repeats: int | None = None,
    dtype: str | None = None,
    base: str = DEFAULT,
    new_tokens: int = 32,
    each: int = 2,
    clients: Sequence[int] = CLIENTS,
    bank: Path | None = None,
    peers: bool = True,
) -> dict[str, Any]:
    """Run the benchmark; see `harness.report` for the result.

    Args:
        repeats: rounds that count, default 3. dtype, base, bank: what is served. new_tokens: of an answer at most.
        each: requests of a client in a round. clients: how many at once. peers: start `transformers serve` too.
    """
    where = device()
    experts = acting_on("prompt", Bank.bundled() if bank is None else Bank(bank))
    names = [name for name in experts if experts[name].meta.get("domain") != "dispatch"]
    mixed = [mix.id for mix in mixtures(names, max(clients))]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        place = Path(folder) / "base"
        tokenizer, where["dtype"] = save_base(base, dtype, place)
        for name, expert in experts.items():
            expert.save_pretrained(Path(folder) / "bank" / name)
        bundled_engine(base, dtype, experts, compile=True)  # the server finds the compiled step in the cache
        port = free_port()
        words = [sys.executable, "-m", "sigmix", "serve", "--port", str(port), "--state", str(Path(folder) / "state")]
        words += ["--base", base, "--bank", str(Path(folder) / "bank")]
        os.environ["SIGMIX_SERVE_LOG_LEVEL"] = "warning"
        if dtype:
            os.environ["SIGMIX_SERVE_DTYPE"] = dtype
        stack.enter_context(server(words, port, Path(folder) / "ours.log"))
        say("our server is up")
        theirs = {}
        for name, flags in {"transformers": [], "transformers_cb": ["--continuous-batching"]}.items() if peers else ():
            own = free_port()
            command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(place), "--port", str(own)]
            command += ["--host", "127.0.0.1", "--device", "cpu", "--dtype", where["dtype"], *flags]
            try:
                stack.enter_context(server(command, own, Path(folder) / f"{name}.log"))
                ask(own, str(place), "Hello", 2)
                theirs[name] = own
                say(f"{name} is up")
            except (SigmixError, OSError, http.client.HTTPException) as error:
                say(f"{name} is left out: {error}")
        seen: dict[str, dict[int, list[Seen]]] = {}
        rates: dict[int, dict[str, list[float]]] = {}
        for count in clients:
            say(f"{count} clients")
            contestants = {
                "one": (port, [names[0]] * count), "different": (port, mixed[:count]), "auto": (port, ["auto"] * count),
                "base": (port, ["base"] * count),
                **{name: (their, [str(place)] * count) for name, their in theirs.items()},
            }  # fmt: skip
            rates[count] = rates_of(contestants, each, new_tokens, repeats or 3, tokenizer, count, seen)
        compiled = is_compiled(port)
    ratios = {"mixed_vs_single_32": ratio(rates[max(clients)]["different"], rates[max(clients)]["one"])}
    ratios["auto_vs_single_32"] = ratio(rates[max(clients)]["auto"], rates[max(clients)]["one"])
    for count in clients if theirs else ():
        for name in theirs:
            ratios[f"vs_{name}_{count}"] = ratio(rates[count]["base"], rates[count][name])
            ratios[f"one_expert_vs_{name}_{count}"] = ratio(rates[count]["one"], rates[count][name])
    raw = {
        "base": base, "new_tokens": new_tokens, "requests_each": each, "compiled": compiled, "tokens_per_second": rates,
        "latency": {
            name: {count: latency(*found) for count, found in own.items()} for name, own in seen.items()
        },
    }  # fmt: skip
    stalls = {"between_p99_32": [latency(found)["between_p99"] for found in seen["different"][max(clients)]]}
    aims = {name: aim for name, aim in AIMS.items() if name in ratios or name in stalls}
    return report("serve", where, ratios, aims, raw, stalls)


def rates_of(
    contestants: dict[str, tuple[int, list[str]]], each: int, tokens: int, repeats: int, tokenizer: Any, count: int,
    seen: dict[str, dict[int, list[Seen]]],
) -> dict[str, list[float]]:  # fmt: skip
    """Tokens per second of each contestant in each repeat; what the clients saw is added to ``seen``."""
    written: dict[str, list[int]] = {name: [] for name in contestants}

    def runner(name: str) -> Callable[[int], None]:
        port, models = contestants[name]

        def go(number: int) -> None:
            found = load(port, models, each, tokens, number)
            written[name].append(sum(len(tokenizer(text)["input_ids"]) for text in found.texts))
            if number:  # the first is the warm-up
                seen.setdefault(name, {}).setdefault(count, []).append(found)

        return go

    taken = interleaved({name: runner(name) for name in contestants}, repeats)
    return {name: [w / s for w, s in zip(written[name][1:], taken[name], strict=True)] for name in contestants}


def latency(*rounds: Seen) -> dict[str, float]:
    """Percentiles in seconds over the clients of some rounds."""
    found = Seen()
    for one in rounds:
        found.add(one)
    first, between = (
        np.quantile(values or [np.nan], (0.5, 0.99), method="higher") for values in (found.first, found.between)
    )
    return {
        "first_p50": float(first[0]), "first_p99": float(first[1]),
        "between_p50": float(between[0]), "between_p99": float(between[1]),
    }  # fmt: skip
