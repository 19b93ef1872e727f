"""``python -m benchmarks fine-tuning``: `sigmix serve` while a fine-tuning job trains, against the same server at rest.

8 clients stream answers of the base before, during and after a job on 1,000 requests of seven generated
tasks, labelled with their names. Also the time from the upload to the first token of the new model.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Aim, device, ratio, report, say
from benchmarks.requests import bundled_engine
from benchmarks.serve import Seen, ask, free_port, is_compiled, latency, load, server
from sigmix.errors import SigmixError
from sigmix.models.default import DEFAULT
from sigmix.tasks.registry import get_task

AIMS = {"tokens_while_training": Aim(">=", 0.5)}

TASKS = ("addition", "larger", "date-iso", "where-is", "who-has", "opposite", "plural")


def rows(count: int) -> list[dict[str, str]]:
    """Return requests with the names of their tasks, in turn, as long as a task has requests."""
    tasks = [[(sample.prompt, name) for sample in get_task(name).samples("train", count)] for name in TASKS]
    pairs = [pair for pair in itertools.chain.from_iterable(itertools.zip_longest(*tasks)) if pair]
    return [{"text": prompt, "label": name} for prompt, name in pairs[:count]]


def run(
    repeats: int | None = None,
    dtype: str | None = None,
    base: str = DEFAULT,
    clients: int = 8,
    new_tokens: int = 32,
    count: int = 1000,
    minutes: float = 3.0,
) -> dict[str, Any]:
    """Run the benchmark; see `harness.report` for the result.

    Args:
        repeats: rounds of requests in each state, default 5. dtype, base: what is served.
        clients: at once, two requests each in a round. new_tokens: of an answer at most.
        count: rows of the file. minutes: time budget of the training.
    """
    from openai import OpenAI

    where, repeats = device(dtype or "auto"), repeats or 5
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        bundled_engine(base, dtype, compile=True)  # the server finds the compiled step in the cache
        port = free_port()
        words = [sys.executable, "-m", "sigmix", "serve", "--port", str(port), "--state", str(Path(folder) / "state")]
        words += ["--base", base, "--training-minutes", str(minutes), *(["--dtype", dtype] if dtype else [])]
        os.environ["SIGMIX_SERVE_LOG_LEVEL"] = "warning"
        stack.enter_context(server(words, port, Path(folder) / "server.log"))
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")

        def measured(state: str) -> list[tuple[float, Seen]]:
            rounds = []
            for number in range(repeats):
                started = time.perf_counter()
                seen = load(port, ["base"] * clients, 2, new_tokens, number)
                rounds.append(((len(seen.first) + len(seen.between)) / (time.perf_counter() - started), seen))
                say(f"{state}: {rounds[-1][0]:.0f} pieces a second")
            return rounds

        load(port, ["base"] * clients, 2, new_tokens, 0)
        compiled = is_compiled(port)
        before = measured("at rest")
        lines = "".join(json.dumps(row) + "\n" for row in rows(count))
        started = time.perf_counter()
        file = client.files.create(file=("requests.jsonl", lines.encode()), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model=base, training_file=file.id, suffix="bench")

        def status() -> str:
            current = client.fine_tuning.jobs.retrieve(job.id)
            if current.status in ("failed", "cancelled"):
                raise SigmixError(f"the job has failed: {current.error}")
            return current.status

        while not any(event.type == "metrics" for event in client.fine_tuning.jobs.list_events(job.id).data):
            status()
            time.sleep(0.5)
        during = measured("while training")
        if status() != "running":
            raise SigmixError("the job ended before the requests: give more minutes or fewer repeats")
        while status() != "succeeded":
            time.sleep(0.5)
        model = client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
        ask(port, str(model), rows(1)[0]["text"], 1)
        seconds = time.perf_counter() - started
        after = measured("after it")
        final = client.fine_tuning.jobs.retrieve(job.id)
    states = {"at_rest": before, "while_training": during, "after": after}
    rates = {name: [rate for rate, _ in rounds] for name, rounds in states.items()}
    ratios = {
        "tokens_while_training": ratio(rates["while_training"], rates["at_rest"]),
        "tokens_after": ratio(rates["after"], rates["at_rest"]),
    }
    raw = {
        "base": base, "clients": clients, "rows": count, "training_minutes": minutes,
        "compiled": compiled, "pieces_per_second": rates,
        "latency": {name: latency(*(seen for _, seen in rounds)) for name, rounds in states.items()},
        "job": final.to_dict().get("sigmix"), "seconds_from_upload_to_first_token": seconds,
    }  # fmt: skip
    return report("fine-tuning", where, ratios, AIMS, raw)
