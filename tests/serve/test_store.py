"""What a server keeps and is told, without a model: bandit, state, keys, settings."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sigmix.adapt.bandit import LinUCB
from sigmix.errors import ConfigError, ExpertError, OutputError, UnknownNameError
from sigmix.experts.mix import Mix
from sigmix.serve.auth import Keyring, add_key, read_keys, remove_key
from sigmix.serve.settings import load_settings
from sigmix.serve.store import State

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


def test_a_reply_gets_one_reward(tmp_path):
    state = State(tmp_path)
    state.note_reply("r", "a", "math", {"x": 1.0})
    assert state.learn("r", 1.0, "bandit", [1])
    assert not state.learn("r", -1.0, "bandit", [2])
    assert not state.learn("unknown", 1.0, "bandit", [3])
    assert (state.reply("r")["reward"], state.learned("bandit")) == (1.0, [1])


def test_a_full_disk_loses_nothing(tmp_path):
    state = State(tmp_path)
    state.save_mix("small", Mix.one("a"), {})
    for reply in "rs":
        state.note_reply(reply, "me", "a", {"a": 1.0})
    state.learn("r", 1.0, "bandit", [1])
    pages = state._base.execute("PRAGMA page_count").fetchone()[0]
    state._base.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(OutputError, match=r"full.*--state"):
        state.save_mix("large", Mix.one("a"), {"x": "y" * 100_000})
    with pytest.raises(OutputError):
        state.learn("s", -1.0, "bandit", ["z" * 100_000])
    assert state.reply("s")["reward"] is None
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
