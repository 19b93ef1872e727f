"""What must not bring a server down: kill -9, a full disk, damaged experts, bad clients, odd requests."""

from __future__ import annotations

import contextlib
import gc
import http.client
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers_serve import bank, live
from helpers_tiny import build_tiny, build_tokenizer

pytestmark = pytest.mark.usefixtures("cache")
ASK = {"messages": [{"role": "user", "content": "one two"}], "max_tokens": 4, "model": "math"}
FUZZ = int(os.environ.get("SIGMIX_FUZZ", "2000"))


# ------------------------------------------------------------------ kill -9


@contextlib.contextmanager
def process(tmp_path: Path, *flags: str):
    """`sigmix serve` as a process of its own; yields (process, port)."""
    base, folder = tmp_path / "base", tmp_path / "bank"
    if not base.exists():
        build_tiny().save_pretrained(base)
        build_tokenizer().save_pretrained(base)
        for expert in bank().values():
            expert.save_pretrained(folder / expert.name)
    words = ["serve", "--base", str(base), "--bank", str(folder), "--state", str(tmp_path / "state"), "--port", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "SIGMIX_SERVE_DTYPE": "float32"}
    made = subprocess.Popen(
        [sys.executable, "-m", "sigmix", *words, *flags], stderr=subprocess.PIPE, text=True, env=env
    )
    try:
        port = 0
        for line in made.stderr:
            if "at http://127.0.0.1:" in line:
                port = int(line.split("127.0.0.1:")[1].split()[0])
                break
        assert port, "the server did not start"
        threading.Thread(target=made.stderr.read, daemon=True).start()  # so that its log never fills the pipe
        until = time.monotonic() + 30
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                if call(port, "GET", "/health")[0] == 200:
                    break
            time.sleep(0.05)
        yield made, port
    finally:
        made.kill()
        made.wait(20)


def call(port: int, method: str, path: str, body=None) -> tuple[int, dict]:
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        link.request(method, path, json.dumps(body) if body is not None else None, {"content-type": "application/json"})
        answer = link.getresponse()
        return answer.status, json.loads(answer.read() or b"{}")
    finally:
        link.close()


def test_killed_in_the_middle_of_a_load(tmp_path):
    with process(tmp_path) as (made, port):
        assert call(port, "POST", "/v1/mixes", {"name": "mine", "mix": "math:.5+code:.5"})[0] == 201
        found = [call(port, "POST", "/v1/chat/completions", {**ASK, "model": "auto"})[1]["id"] for _ in range(3)]
        assert call(port, "POST", "/v1/feedback", {"id": found[0], "reward": 1})[0] == 200

        def load() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                while True:
                    call(port, "POST", "/v1/chat/completions", {**ASK, "max_tokens": 100})

        threads = [threading.Thread(target=load, daemon=True) for _ in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        made.send_signal(signal.SIGKILL)
        made.wait(20)
        for thread in threads:
            thread.join(30)
    with process(tmp_path) as (_, port):
        status, reply = call(port, "POST", "/v1/chat/completions", {**ASK, "model": "mine"})
        assert (status, reply["sigmix"]["mix"]) == (200, "code:0.5+math:0.5")
        assert call(port, "POST", "/v1/feedback", {"id": found[0], "reward": 1})[0] == 409  # it is known
        assert call(port, "POST", "/v1/feedback", {"id": found[1], "reward": -1})[0] == 200


def test_sigterm_ends_it_with_0(tmp_path):
    with process(tmp_path) as (made, port):
        got = []
        thread = threading.Thread(
            target=lambda: got.append(call(port, "POST", "/v1/chat/completions", {**ASK, "max_tokens": 200}))
        )
        thread.start()
        time.sleep(0.3)
        made.send_signal(signal.SIGTERM)
        thread.join(60)
        assert made.wait(60) == 0
        assert got[0][0] == 200
        assert got[0][1]["usage"]["completion_tokens"] > 0


# ------------------------------------------------------------------ in this process


def test_a_full_disk(tmp_path):
    with live(tmp_path) as server:
        base = server.service.state._base
        pages = base.execute("PRAGMA page_count").fetchone()[0]
        base.execute(f"PRAGMA max_page_count = {pages}")
        ids = []
        for number in range(60):
            status, found = server.chat(f"one {number}")
            assert status == 200  # an answer does not need the disk
            ids.append(found["id"])
        status, found, _ = server.call(
            "POST", "/v1/mixes", {"name": "new", "mix": {"weights": {"math": [0.123456789] * 2}}}
        )
        assert status in (201, 503)
        statuses = {server.call("POST", "/v1/feedback", {"id": one, "reward": 1})[0] for one in ids}
        assert statuses <= {200, 404, 503}
        assert 404 in statuses  # replies that could not be noted
        base.execute("PRAGMA max_page_count = 1000000")
        status, found = server.chat("again")
        assert server.call("POST", "/v1/feedback", {"id": found["id"], "reward": 1})[0] == 200


def test_one_megabyte_of_prompt(tmp_path):
    with live(tmp_path) as server, live(tmp_path / "wide", max_body=4 << 20) as wide:
        large = {**ASK, "messages": [{"role": "user", "content": "one two " * 131072}]}
        assert server.call("POST", "/v1/chat/completions", large)[0] == 413
        status, found, _ = wide.call("POST", "/v1/chat/completions", large)
        assert (status, found["error"]["code"]) == (400, "context_length_exceeded")
        assert server.chat()[0] == wide.chat()[0] == 200


def test_odd_requests(tmp_path):
    """Schemathesis makes requests out of our own schema, good and bad; nothing may answer with 500.

    ``SIGMIX_FUZZ=10000`` makes as many, which takes some minutes.
    """
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, seed, settings

    with live(
        tmp_path, max_new_tokens=2, default_new_tokens=2, max_choices=2, expert_folders=[tmp_path / "none"]
    ) as server:
        schema = schemathesis.openapi.from_dict(server.call("GET", "/openapi.json")[1])
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) >= 15
        codes: dict[int, int] = {}
        link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)

        def send_all(cases, count) -> None:
            @seed(0)
            @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck),
                      phases=[Phase.generate])  # fmt: skip
            @given(case=cases)
            def send(case):
                request = case.as_transport_kwargs(base_url=server.url)
                body = request.get("json", request.get("data"))
                sent = body if isinstance(body, bytes) else json.dumps(body).encode("utf-8", "replace")
                path = case.formatted_path
                try:
                    link.request(case.method.upper(), path, sent, {"content-type": "application/json"})
                    answer = link.getresponse()
                    text = answer.read()
                except Exception as error:
                    link.close()  # the next request opens it again
                    raise AssertionError((case.method, path, sent)) from error
                codes[answer.status] = codes.get(answer.status, 0) + 1
                assert answer.status < 500 or answer.status == 503, (answer.status, case.method, path, body, text)

            send()

        for operation in operations:
            good, bad = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
            # a chat's schema is the largest: its requests take ten times as long to make as others
            count = -(-FUZZ // (40 if operation.path == "/v1/chat/completions" else 15))
            send_all(operation.as_strategy(generation_mode=good), count)  # just one where nothing can be chosen
            if operation.body:  # any text is a good name in a path
                send_all(operation.as_strategy(generation_mode=bad), count)
        link.close()
        assert sum(codes.values()) >= FUZZ, codes
        assert {200, 400, 404} <= set(codes), codes
        assert server.chat()[0] == 200
        print(codes)


def test_no_leak_over_two_thousand_requests(tmp_path):
    def resident() -> int:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc")
    draw = random.Random(0)
    with live(tmp_path, max_new_tokens=4) as server:
        server.service.engine.prefixes.budget = 1 << 20  # what is kept on purpose is no leak

        def load(count: int) -> None:
            def send(number: int) -> None:
                for _ in range(number):
                    model = f"math:{draw.random():.6f}+code:{draw.random():.6f}"  # a new mixture every time
                    assert server.chat(f"one {draw.random()}", model=model, stream=False)[0] == 200

            threads = [threading.Thread(target=send, args=(count // 8,)) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        load(400)
        before = resident()
        objects = len(gc.get_objects())
        load(2000)
        grown = resident() - before
        assert grown < 30 << 20, f"{grown >> 20} MB more"
        assert len(gc.get_objects()) - objects < 50_000
