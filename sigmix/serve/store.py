"""Persistent server state in one SQLite file: mixtures, replies open for feedback, bandit weights, files and jobs.

Every change is one transaction in write-ahead mode, so a killed server loses nothing it has confirmed.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sigmix.errors import ConfigError, OutputError
from sigmix.experts.mix import Mix
from sigmix.utils.io import writing

FILE = "serve.sqlite"

SCHEMA = """
CREATE TABLE IF NOT EXISTS mixes (name TEXT PRIMARY KEY, mix TEXT NOT NULL, about TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS replies (
  id TEXT PRIMARY KEY, client TEXT NOT NULL, arm TEXT, context TEXT, created REAL NOT NULL, reward REAL
);
CREATE INDEX IF NOT EXISTS replies_created ON replies (created);
CREATE TABLE IF NOT EXISTS learned (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS files (
  id TEXT PRIMARY KEY, client TEXT NOT NULL, created REAL NOT NULL, name TEXT NOT NULL, bytes INTEGER NOT NULL,
  purpose TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS jobs (
  id TEXT PRIMARY KEY, client TEXT NOT NULL, base TEXT NOT NULL, created REAL NOT NULL, queued REAL NOT NULL,
  status TEXT NOT NULL, value TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS job_events (
  number INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, key TEXT, created REAL NOT NULL, level TEXT NOT NULL,
  message TEXT NOT NULL, data TEXT, UNIQUE (job, key)
);
"""

MAX_REPLIES = 100_000  # most recent replies that can receive feedback

TRIM_EVERY = 1000  # saved replies between two deletions of old ones


class Store:
    """SQLite store; safe for use from several threads.

    Args:
        folder: created if missing.

    Raises:
        OutputError: the folder or file cannot be written.
        ConfigError: the file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / FILE
        self._lock = threading.Lock()
        self._saved_replies = 0
        with writing(folder):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._translate_errors():
            self._db = sqlite3.connect(self.path, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            if (result := self._db.execute("PRAGMA quick_check").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(result)
            self._db.executescript(SCHEMA)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def mixes(self) -> dict[str, tuple[Mix, dict[str, Any]]]:
        """Return {name: (mixture, metadata)}."""
        with self.transaction() as db:
            rows = db.execute("SELECT name, mix, about FROM mixes ORDER BY name").fetchall()
        return {name: (Mix.from_json(mix), json.loads(about)) for name, mix, about in rows}

    def save_mix(self, name: str, mix: Mix, metadata: dict[str, Any]) -> None:
        """Save or replace a mixture.

        Raises:
            OutputError: the disk is full or read-only; the previous mixture is kept.
        """
        values = (name, json.dumps(mix.to_json()), json.dumps(metadata), time.time())
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO mixes VALUES (?, ?, ?, ?)", values)

    def delete_mix(self, name: str) -> None:
        """Delete a mixture."""
        with self.transaction() as db:
            db.execute("DELETE FROM mixes WHERE name = ?", (name,))

    def save_reply(self, reply_id: str, client: str, arm: str | None, context: dict[str, float] | None) -> None:
        """Save the bandit's arm and context of a reply, for later feedback."""
        values = (reply_id, client, arm, None if context is None else json.dumps(context), time.time())
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?, ?, NULL)", values)
            self._saved_replies += 1
            if self._saved_replies % TRIM_EVERY == 0:
                db.execute(
                    "DELETE FROM replies WHERE id NOT IN (SELECT id FROM replies ORDER BY created DESC LIMIT ?)",
                    (MAX_REPLIES,),
                )

    def reply(self, reply_id: str) -> dict[str, Any] | None:
        """Return client, arm, context and reward (None: no feedback yet) of a saved reply, or None."""
        with self.transaction() as db:
            row = db.execute("SELECT client, arm, context, reward FROM replies WHERE id = ?", (reply_id,)).fetchone()
        if row is None:
            return None
        client, arm, context, reward = row
        return {"client": client, "arm": arm, "context": json.loads(context) if context else None, "reward": reward}

    def learn(self, reply_id: str, reward: float, name: str = "", value: Any = None) -> bool:
        """Save a reply's reward and the state learned from it, in one transaction.

        Args:
            name, value: key and JSON value of the learned state; None saves the reward only.

        Returns:
            False, without any change, if the reply is unknown or has a reward.
        """
        with self.transaction() as db:
            query = "UPDATE replies SET reward = ? WHERE id = ? AND reward IS NULL"
            updated = db.execute(query, (reward, reply_id)).rowcount > 0
            if updated and value is not None:
                db.execute("INSERT OR REPLACE INTO learned VALUES (?, ?)", (name, json.dumps(value)))
            return updated

    def learned(self, name: str) -> Any:
        """Return the value that `learn` saved last under a name, or None."""
        with self.transaction() as db:
            row = db.execute("SELECT value FROM learned WHERE name = ?", (name,)).fetchone()
        return json.loads(row[0]) if row else None

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Yield the database; the changes are saved together on success.

        Raises:
            OutputError: the disk is full or read-only. ConfigError: the file is damaged.
        """
        with self._lock, self._translate_errors(), self._db:
            yield self._db

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise OutputError(f"cannot write {self.path}: {error}", remedy="free disk space or use --state") from error
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{self.path} is damaged: {error}", remedy=f"delete or move {self.path}") from error
