"""Robustness: kill -9, SIGTERM, a full disk, fuzzed requests, memory leaks."""

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
from helpers_serve import BODY, CHAT, NEVER_ENDS, TIMEOUT, bank, live, serving, wait_until
from helpers_tiny import build_tiny, build_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]
ASK = {**BODY, "max_tokens": 4, "model": "math"}
FUZZ = int(os.environ.get("SIGMIX_FUZZ", "2000"))


# --- Server processes


@contextlib.contextmanager
def process(tmp_path: Path, *flags: str):
    """`sigmix serve` as a separate process; yields (process, port)."""
    base, folder = tmp_path / "base", tmp_path / "bank"
    if not base.exists():
        build_tiny().save_pretrained(base)
        build_tokenizer().save_pretrained(base)
        for expert in bank().values():
            expert.save_pretrained(folder / expert.name)
    words = ["serve", "--base", str(base), "--bank", str(folder), "--state", str(tmp_path / "state"), "--port", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "SIGMIX_SERVE_DTYPE": "float32"}
    server = subprocess.Popen(
        [sys.executable, "-m", "sigmix", *words, *flags], stderr=subprocess.PIPE, text=True, env=env
    )
    try:
        port = 0
        for line in server.stderr:
            if "at http://127.0.0.1:" in line:
                port = int(line.split("127.0.0.1:")[1].split()[0])
                break
        assert port, "the server did not start"
        threading.Thread(target=server.stderr.read, daemon=True).start()  # keeps the pipe from filling up
        wait_until(lambda: healthy(port))
        yield server, port
    finally:
        server.kill()
        server.wait(TIMEOUT)


def healthy(port: int) -> bool:
    with contextlib.suppress(OSError):
        return call(port, "GET", "/health")[0] == 200
    return False


def call(port: int, method: str, path: str, body=None) -> tuple[int, dict]:
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    try:
        link.request(method, path, json.dumps(body) if body is not None else None, {"content-type": "application/json"})
        answer = link.getresponse()
        return answer.status, json.loads(answer.read() or b"{}")
    finally:
        link.close()


def test_state_survives_kill_9_under_load(tmp_path):
    with process(tmp_path) as (server, port):
        assert call(port, "POST", "/v1/mixes", {"name": "mine", "mix": "math:.5+code:.5"})[0] == 201
        found = [call(port, "POST", CHAT, {**ASK, "model": "auto"})[1]["id"] for _ in range(3)]
        assert call(port, "POST", "/v1/feedback", {"id": found[0], "reward": 1})[0] == 200

        def load() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                while True:
                    call(port, "POST", CHAT, {**ASK, "max_tokens": 100})

        threads = [threading.Thread(target=load, daemon=True) for _ in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        server.send_signal(signal.SIGKILL)
        server.wait(TIMEOUT)
        for thread in threads:
            thread.join(TIMEOUT)
    with process(tmp_path) as (_, port):
        status, reply = call(port, "POST", CHAT, {**ASK, "model": "mine"})
        assert (status, reply["sigmix"]["mix"]) == (200, "code:0.5+math:0.5")
        assert call(port, "POST", "/v1/feedback", {"id": found[0], "reward": 1})[0] == 409
        assert call(port, "POST", "/v1/feedback", {"id": found[1], "reward": -1})[0] == 200


def test_sigterm_finishes_requests_and_exits_with_0(tmp_path):
    with process(tmp_path, "--shutdown-timeout", str(TIMEOUT)) as (server, port):
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
        body = json.dumps({**ASK, **NEVER_ENDS, "max_tokens": 200, "stream": True})
        link.request("POST", CHAT, body, {"content-type": "application/json"})
        answer = link.getresponse()  # the first event has been sent
        server.send_signal(signal.SIGTERM)
        received = answer.read()
        assert server.wait(TIMEOUT) == 0
        assert answer.status == 200
        assert b'"finish_reason": "length"' in received
        assert received.endswith(b"data: [DONE]\n\n")


# --- In this process


def test_full_disk(tmp_path):
    with serving(tmp_path) as server:
        db = server.service.store._db
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages}")
        ids = []
        for number in range(60):
            status, found = server.chat(f"one {number}")
            assert status == 200  # generation needs no disk
            ids.append(found["id"])
        status, found, _ = server.call(
            "POST", "/v1/mixes", {"name": "new", "mix": {"weights": {"math": [0.123456789] * 2}}}
        )
        assert status in (201, 503)
        statuses = {server.call("POST", "/v1/feedback", {"id": one, "reward": 1})[0] for one in ids}
        assert statuses <= {200, 404, 503}
        assert 404 in statuses  # replies that could not be saved
        db.execute("PRAGMA max_page_count = 1000000")
        status, found = server.chat("again")
        assert server.call("POST", "/v1/feedback", {"id": found["id"], "reward": 1})[0] == 200


def test_fuzzed_requests(tmp_path):
    """Requests generated by schemathesis from the OpenAPI schema, valid and invalid: no response has status 500.

    ``SIGMIX_FUZZ=10000`` sets their number.
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
        link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)

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
                    link.close()  # reopened by the next request
                    raise AssertionError((case.method, path, sent)) from error
                codes[answer.status] = codes.get(answer.status, 0) + 1
                assert answer.status < 500 or answer.status == 503, (answer.status, case.method, path, body, text)

            send()

        for operation in operations:
            valid, invalid = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
            # the chat schema is the largest: generating its requests takes ten times as long
            count = -(-FUZZ // (40 if operation.path == CHAT else 15))
            send_all(operation.as_strategy(generation_mode=valid), count)
            if operation.body:  # every text is a valid name in a path
                send_all(operation.as_strategy(generation_mode=invalid), count)
        link.close()
        assert sum(codes.values()) >= FUZZ, codes
        assert {200, 400, 404} <= set(codes), codes
        assert server.chat()[0] == 200
        print(codes)


def test_no_memory_leak(tmp_path):
    def resident() -> int:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc")
    draw = random.Random(0)
    with live(tmp_path, max_new_tokens=4) as server:
        server.service.engine.prefix_cache.entries.max_bytes = 1 << 20  # the prefix cache grows on purpose

        def load(count: int) -> None:
            def send(number: int) -> None:
                for _ in range(number):
                    model = f"math:{draw.random():.6f}+code:{draw.random():.6f}"  # always a new mixture
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
