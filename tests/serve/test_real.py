"""The server on the real default model with the bundled experts."""

from __future__ import annotations

import random
import threading

import pytest
from helpers_llama_server import LlamaServer, llama_server
from helpers_serve import Live

from sigmix.engine import Engine
from sigmix.experts.bank import Bank
from sigmix.experts.mix import Mix
from sigmix.export.base import BaseCheckpoint
from sigmix.export.gguf import export_gguf
from sigmix.export.low_rank import LowRank
from sigmix.models.default import SMOLLM2, fetch_member
from sigmix.models.loading import load_base
from sigmix.serve.service import Service
from sigmix.serve.settings import load_settings
from sigmix.tasks import get_task

pytestmark = [pytest.mark.real, pytest.mark.slow]
SKILLS = (
    "compare-numbers", "dates", "durations", "number-words", "payments", "sums", "times", "units",
)  # fmt: skip
"""Experts with generated tasks of the same names; `topics` and `commands` need local data."""
ROUTED = 0.85  # measured: `auto` gives 44 of 48 test requests, six a skill, their expert
RIGHT, LEAD = 0.6, 0.5  # measured: `auto` answers 34 of them right, the base none


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    model, tokenizer = load_base("smollm2-135m", "float32")
    settings = load_settings(None, state=tmp_path_factory.mktemp("serve"), port=0, dtype="float32")
    server = Live(Service(model, tokenizer, Bank.bundled(), settings, {}))
    yield server
    server.stop()


def at_once(server: Live, bodies: list[dict]) -> list[dict]:
    """Responses to concurrent requests."""
    got: list = [None] * len(bodies)

    def send(place: int) -> None:
        got[place] = server.chat(**bodies[place])

    threads = [threading.Thread(target=send, args=(place,)) for place in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [status for status, _ in got] == [200] * len(bodies)
    return [responses for _, responses in got]


def test_auto_chooses_the_expert_and_the_expert_helps(real):
    samples = [(task, sample) for task in SKILLS for sample in get_task(task).samples("test", 6, seed=0)]
    right, routed = {"auto": 0, "base": 0}, 0
    for model in right:
        bodies = [
            {"content": sample.prompt, "model": model, "max_tokens": get_task(task).max_new_tokens}
            for task, sample in samples
        ]
        for (task, sample), responses in zip(samples, at_once(real, bodies), strict=True):
            right[model] += get_task(task).score(sample, responses["choices"][0]["message"]["content"]).value == 1.0
            if model == "auto":
                routed += responses["sigmix"]["mix"] == task
    assert routed >= ROUTED * len(samples)
    assert right["auto"] >= RIGHT * len(samples)
    assert right["auto"] > right["base"] + LEAD * len(samples)


def test_rows_are_independent(real):
    """Random mixtures, lengths and prompts in one batch, against the engine's outputs one by one."""
    draw = random.Random(0)
    bodies = []
    for number in range(40):
        task = draw.choice(SKILLS)
        sample = get_task(task).samples("test", number + 1, seed=1)[number]
        one, two = draw.sample(SKILLS, 2)
        mix = draw.choice(["base", one, f"{one}:{draw.uniform(0.2, 0.8):.2f}+{two}:{draw.uniform(0.2, 0.8):.2f}"])
        bodies.append({"content": sample.prompt, "model": mix, "max_tokens": draw.randint(4, 32)})
    responses = at_once(real, bodies)
    model, tokenizer = load_base("smollm2-135m", "float32")
    alone = Engine(model, tokenizer, Bank.bundled())
    for one, reply in zip(bodies, responses, strict=True):
        text = alone.generate([one["content"]], Mix.parse(one["model"]), max_new_tokens=one["max_tokens"])[0].text
        assert reply["choices"][0]["message"]["content"] == text, one


@pytest.mark.skipif(llama_server() is None, reason="llama-server is not installed")
def test_auto_in_front_of_llama_server(tmp_path):
    """The router decides here, and llama.cpp answers with the adapters of its choice."""
    bank, files = Bank.bundled(), {name: tmp_path / f"{name}.gguf" for name in ("sums", "dates")}
    source = BaseCheckpoint("smollm2-135m")
    for name, file in files.items():
        export_gguf(LowRank.from_mix(source, Mix.one(name), bank), file, "f16")
    questions = [
        ("what's the date 3rd of March 2021 in iso format?", "dates", "2021-03-03"),
        ("Give me 14 November 1987 as YYYY-MM-DD.", "dates", "1987-11-14"),
        ("Add 17 and 25", "sums", "17 + 25 = "),  # the sum is wrong
    ]
    with LlamaServer(fetch_member(SMOLLM2), files, tmp_path / "log", "--jinja") as upstream:
        settings = load_settings(
            None, state=tmp_path / "state", port=0, dtype="float32", upstream=[f"http://127.0.0.1:{upstream.port}/v1"]
        )
        server = Live(Service(*load_base("smollm2-135m", "float32"), bank, settings, {}))
        try:
            for question, expert, answer in questions:
                status, found = server.chat(question, model="auto", max_tokens=16)
                assert status == 200, found
                assert found["sigmix"]["mix"] == expert
                reply = found["choices"][0]["message"]["content"]
                assert reply.startswith(answer)
                status, found = server.chat(question, model="base", max_tokens=16)
                assert status == 200
                assert found["choices"][0]["message"]["content"] != reply
            status, found = server.chat("half past four in the afternoon, 24-hour clock please", model="times")
            assert (status, found["error"]["code"]) == (404, "model_not_found")  # llama-server has no such adapter
        finally:
            server.stop()
