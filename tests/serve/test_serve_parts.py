"""The server's small parts, without a model: queue, text, turnstile, bandit, state, keys, settings."""

from __future__ import annotations

import json
import random
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
from helpers_tiny import build_tokenizer

from sigmix.errors import ConfigError, ExpertError, OutputError, UnknownNameError
from sigmix.experts.mix import Mix
from sigmix.serve.bandit import LinUCB
from sigmix.serve.fair import FairQueue, QueueFull
from sigmix.serve.keys import Keyring, add_key, read_keys, remove_key
from sigmix.serve.pieces import Pieces
from sigmix.serve.settings import load_settings
from sigmix.serve.state import State
from sigmix.serve.turnstile import Turnstile

# ------------------------------------------------------------------ the queue


@dataclass(eq=False)
class Asks:
    client: str
    size: int = 10
    context: dict = field(default_factory=dict)


def anything(_) -> bool:
    return True


def test_a_client_with_many_requests_does_not_keep_another_waiting():
    queue = FairQueue(100, 100)
    for _ in range(20):
        queue.push(Asks("many"))
    served = []
    for step in range(12):
        if step == 4:
            queue.push(Asks("few"))
            queue.push(Asks("few"))
        job = queue.pop(anything)
        served.append(job.client)
        queue.charge(job.client, read=job.size)
    assert served[:4] == ["many"] * 4
    assert "few" in served[4:6]
    assert served.count("few") == 2


def test_being_away_saves_up_nothing():
    queue = FairQueue(100, 100)
    for client in ("a", "b"):
        queue.push(Asks(client))
    for _ in range(2):
        job = queue.pop(anything)
        queue.charge(job.client, written=10)
    queue.done("b")  # b goes away, a goes on and is served much
    for _ in range(5):
        queue.push(Asks("a"))
        job = queue.pop(anything)
        queue.charge("a", written=1000)
        queue.done("a")
    for _ in range(3):
        queue.push(Asks("a"))
        queue.push(Asks("b"))
    order = []
    while (job := queue.pop(anything)) is not None:
        order.append(job.client)
        queue.charge(job.client, written=10)
    assert order[:4] in (["a", "b", "a", "b"], ["b", "a", "b", "a"])


def test_shares_are_even_whatever_is_asked_for():
    draw, queue, served = random.Random(0), FairQueue(10_000, 10_000), {"small": 0, "large": 0}
    for client, size in (("small", 10), ("large", 100)):
        for _ in range(2000):
            queue.push(Asks(client, size))
    for _ in range(1000):
        job = queue.pop(anything)
        written = draw.randrange(1, job.size)
        served[job.client] += job.size + 2 * written
        queue.charge(job.client, read=job.size, written=written)
    assert abs(served["small"] - served["large"]) < 400


def test_the_queue_has_ends():
    queue = FairQueue(3, 2)
    first, second = Asks("a"), Asks("a")
    queue.push(first)
    queue.push(second)
    with pytest.raises(QueueFull) as full:
        queue.push(Asks("a"))
    assert full.value.own
    queue.push(Asks("b"))
    with pytest.raises(QueueFull) as full:
        queue.push(Asks("c"))
    assert not full.value.own
    assert queue.remove(first)
    assert not queue.remove(first)
    assert queue.pop(lambda job: job is not second) in queue or len(queue) >= 1


def test_no_job_overtakes_one_that_does_not_fit_yet():
    queue = FairQueue(10, 10)
    large, small = Asks("a", 100), Asks("b", 1)
    queue.push(large)
    queue.push(small)
    assert queue.pop(lambda job: job.size < 50) is None
    assert queue.pop(anything) is large
    assert queue.pop(anything) is small


# ------------------------------------------------------------------ text


@pytest.mark.parametrize("stop", [(), ("ab",), ("b c", "c"), ("never",)])
def test_pieces_are_the_text(stop):
    tokenizer, draw = build_tokenizer(), random.Random(1)
    for _ in range(40):
        ids = [draw.randrange(4, 250) for _ in range(60)]
        pieces, shown = Pieces(tokenizer, stop), ""
        for number, token in enumerate(ids, 1):
            shown += pieces.add(token)
            whole = tokenizer.decode(ids[:number], skip_special_tokens=True)
            cuts = [whole.find(mark) for mark in stop if mark in whole]
            if cuts:
                assert pieces.stopped in stop
                assert shown == whole[: min(cuts)]
                break
            assert whole.startswith(shown)
        else:
            shown += pieces.end()
            assert shown == tokenizer.decode(ids, skip_special_tokens=True)


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(ids).decode("utf-8", "replace")


def test_no_half_characters():
    text = "grün 🙂🙂 ende" * 5
    pieces = Pieces(Bytes())
    parts = [pieces.add(byte) for byte in text.encode()]
    assert "".join(parts) == text
    assert not any("�" in part for part in parts)
    broken = Pieces(Bytes())
    assert "".join(broken.add(byte) for byte in "🙂".encode()[:3]) + broken.end() == "�"


# ------------------------------------------------------------------ the turnstile


def test_first_come_first_served():
    turnstile, order = Turnstile(), []

    def wait(number: int) -> None:
        with turnstile:
            order.append(number)

    threads = []
    with turnstile:
        for number in range(8):
            threads.append(threading.Thread(target=wait, args=(number,)))
            threads[-1].start()
            until = time.monotonic() + 5
            while turnstile.waiting != number + 1 and time.monotonic() < until:
                time.sleep(0.001)
    for thread in threads:
        thread.join(5)
    assert order == list(range(8))
    assert turnstile.waiting == 0


# ------------------------------------------------------------------ the bandit


def contexts(draw, sure=0.8):
    """A probe that is often right: what a request is, and what the probe says."""
    truth = draw.integers(3)
    x = draw.dirichlet(np.ones(3)) * (1 - sure)
    x[truth] += sure
    return truth, x


def test_without_feedback_the_bandit_is_the_probe():
    bandit, draw = LinUCB(["a", "b", "other"], {"A": "a", "B": "b", "base": "other"}), np.random.default_rng(0)
    for _ in range(50):
        truth, x = contexts(draw)
        assert bandit.choose(x, ["A", "B", "base"])[0] == ["A", "B", "base"][truth]


def test_feedback_moves_it():
    bandit, draw = LinUCB(["a", "b", "other"], {"A": "a", "B": "b", "base": "other"}), np.random.default_rng(1)
    right = {0: "B", 1: "B", 2: "base"}  # the expert A is no good at its own label
    rewards = []
    for _ in range(300):
        truth, x = contexts(draw)
        arm, _ = bandit.choose(x, ["A", "B", "base"])
        reward = 1.0 if arm == right[truth] else -1.0
        bandit.learn(arm, x, reward)
        rewards.append(reward)
    assert np.mean(rewards[-100:]) > 0.9
    again = LinUCB.from_json(json.loads(json.dumps(bandit.to_json())))
    _, x = contexts(draw)
    assert again.choose(x, ["A", "B", "base"]) == bandit.choose(x, ["A", "B", "base"])
    assert again.count == bandit.count


def test_a_new_arm_is_tried():
    bandit, draw = LinUCB(["a", "other"], {"A": "a", "base": "other"}), np.random.default_rng(2)
    for _ in range(200):
        x = np.array([0.9, 0.1])
        arm, _ = bandit.choose(x, ["A", "base"])
        bandit.learn(arm, x, -0.5 + 0.1 * draw.standard_normal())
    bandit.add("new")
    assert bandit.choose(x, ["A", "base", "new"])[0] == "new"


@pytest.mark.parametrize(
    "damage",
    [
        {},
        {"labels": 3},
        {"labels": ["a"], "arms": {"A": {"a": [[1, 2]], "b": [1], "count": 0}}},
        {"labels": ["a"], "arms": {"A": {"a": [[float("nan")]], "b": [1], "count": 0}}},
    ],
)
def test_damaged_state_of_the_bandit(damage):
    with pytest.raises((ValueError, KeyError, TypeError)):
        LinUCB.from_json(damage)


# ------------------------------------------------------------------ state


def test_state_comes_back(tmp_path):
    state = State(tmp_path)
    mix = Mix({"a": [0.1, 0.2], "b": 0.5})
    state.save_mix("mine", mix, {"examples": 3})
    state.note_reply("r1", "alice", "a", {"a": 0.9})
    state.learn("r1", 1.0, "bandit", {"x": 1})
    # not closed: a killed server does not close either
    again = State(tmp_path)
    assert again.mixes() == {"mine": (mix, {"examples": 3})}
    assert again.reply("r1") == {"client": "alice", "arm": "a", "context": {"a": 0.9}, "reward": 1.0}
    assert again.learned("bandit") == {"x": 1}
    assert again.reply("r2") is None
    assert again.drop_mix("mine")
    assert not again.drop_mix("mine")


def test_a_full_disk_loses_nothing(tmp_path):
    state = State(tmp_path)
    state.save_mix("small", Mix.one("a"), {})
    state.learn("r", 1.0, "bandit", [1])
    pages = state._base.execute("PRAGMA page_count").fetchone()[0]
    state._base.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(OutputError, match=r"full.*--state"):
        state.save_mix("large", Mix.one("a"), {"x": "y" * 100_000})
    with pytest.raises(OutputError):
        state.learn("r", -1.0, "bandit", ["z" * 100_000])
    assert list(state.mixes()) == ["small"]
    assert state.learned("bandit") == [1]
    state.drop_mix("small")
    assert state.mixes() == {}


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "serve.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(ConfigError, match=r"serve\.sqlite is damaged.*move it away"):
        State(tmp_path)


# ------------------------------------------------------------------ keys


def test_keys(tmp_path):
    path = tmp_path / "keys.json"
    text = add_key(path, "alice", admin=True)
    other = add_key(path, "bob", per_minute=2, at_once=1)
    assert text.startswith("sk-sigmix-")
    assert text not in path.read_text()
    assert other not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    ring = Keyring(path)
    assert ring.find(text).admin
    bob = ring.find(other)
    assert ring.find("sk-sigmix-guess") is None
    assert ring.enter(bob) is None
    assert ring.enter(bob) == 1.0  # at once
    ring.leave(bob)
    assert ring.enter(bob) is None
    ring.leave(bob)
    assert 20 < ring.enter(bob) <= 30  # a minute
    with pytest.raises(ConfigError, match="alice"):
        add_key(path, "alice")
    with pytest.raises(ExpertError):
        add_key(path, "No Name")
    remove_key(path, "bob")
    with pytest.raises(UnknownNameError):
        remove_key(path, "bob")
    ring.LOOK = 0.0
    assert ring.find(other) is None
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"keys\.json"):
        read_keys(path)


# ------------------------------------------------------------------ settings


def test_flags_then_environment_then_file(tmp_path, monkeypatch):
    file = tmp_path / "serve.toml"
    file.write_text('port = 1111\nrows = 4\nexpert_folders = ["/srv/experts"]\npolicy = "B"\n')
    monkeypatch.setenv("SIGMIX_SERVE_ROWS", "5")
    monkeypatch.setenv("SIGMIX_SERVE_PORT", "2222")
    made = load_settings(file, port=3333, host=None)
    assert (made.port, made.rows, made.policy, made.host) == (3333, 5, "B", "127.0.0.1")
    assert [str(folder) for folder in made.expert_folders] == ["/srv/experts"]
    assert load_settings().policy == "auto"


@pytest.mark.parametrize(
    "flags, word",
    [({"port": 99999}, "port"), ({"rows": 0}, "rows"), ({"form": "fast"}, "form"), ({"origins": ["*"]}, "origins")],
)
def test_settings_that_cannot_be(flags, word):
    with pytest.raises(ConfigError, match=word):
        load_settings(None, **flags)


def test_settings_files_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match="no settings file"):
        load_settings(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("port = = 3")
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        load_settings(tmp_path / "bad.toml")
    (tmp_path / "odd.toml").write_text("prot = 3")
    with pytest.raises(ConfigError, match="prot"):
        load_settings(tmp_path / "odd.toml")


@pytest.mark.parametrize("host, loopback", [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False),
                                            ("10.0.0.1", False), ("example.org", False)])  # fmt: skip
def test_what_only_this_machine_reaches(host, loopback):
    assert load_settings(None, host=host).loopback is loopback
