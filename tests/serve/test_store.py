"""SQLite store."""

from __future__ import annotations

import pytest

from sigmix.errors import ConfigError, OutputError
from sigmix.experts.mix import Mix
from sigmix.serve import store as store_module
from sigmix.serve.store import Store


def test_state_survives_without_closing(tmp_path):
    store = Store(tmp_path)
    mix = Mix({"a": [0.1, 0.2], "b": 0.5})
    store.save_mix("mine", mix, {"examples": 3})
    store.save_reply("r1", "alice", "a", {"a": 0.9})
    store.learn("r1", 1.0, "bandit", {"x": 1})
    again = Store(tmp_path)
    assert again.mixes() == {"mine": (mix, {"examples": 3})}
    assert again.reply("r1") == {"client": "alice", "arm": "a", "context": {"a": 0.9}, "reward": 1.0}
    assert again.learned("bandit") == {"x": 1}
    assert again.reply("r2") is None
    again.delete_mix("mine")
    assert again.mixes() == {}


def test_one_reward_per_reply(tmp_path):
    store = Store(tmp_path)
    store.save_reply("r", "a", "math", {"x": 1.0})
    assert store.learn("r", 1.0, "bandit", [1])
    assert not store.learn("r", -1.0, "bandit", [2])
    assert not store.learn("unknown", 1.0, "bandit", [3])
    assert (store.reply("r")["reward"], store.learned("bandit")) == (1.0, [1])


def test_old_replies_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "MAX_REPLIES", 3)
    monkeypatch.setattr(store_module, "TRIM_EVERY", 5)
    store = Store(tmp_path)
    for number in range(5):
        store.save_reply(str(number), "a", None, None)
    assert [store.reply(str(number)) is not None for number in range(5)] == [False, False, True, True, True]


def test_full_disk_changes_nothing(tmp_path):
    store = Store(tmp_path)
    store.save_mix("small", Mix.one("a"), {})
    for reply in "rs":
        store.save_reply(reply, "me", "a", {"a": 1.0})
    store.learn("r", 1.0, "bandit", [1])
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(OutputError) as error:
        store.save_mix("large", Mix.one("a"), {"x": "y" * 100_000})
    assert str(store.path) in str(error.value)
    assert "--state" in str(error.value)
    with pytest.raises(OutputError):
        store.learn("s", -1.0, "bandit", ["z" * 100_000])
    assert store.reply("s")["reward"] is None
    assert list(store.mixes()) == ["small"]
    assert store.learned("bandit") == [1]
    store.delete_mix("small")
    assert store.mixes() == {}


def test_damaged_file(tmp_path):
    (tmp_path / "serve.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(ConfigError) as error:
        Store(tmp_path)
    assert str(tmp_path / "serve.sqlite") in str(error.value)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        Store(tmp_path / "file")
