"""What outlives a restart: saved mixes, replies that wait for feedback, and what feedback taught. One SQLite file.

Every change is one transaction, in write-ahead mode, so a killed server loses nothing that it had confirmed.
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

FILE = "serve.sqlite"


TABLES = """
CREATE TABLE IF NOT EXISTS mixes (name TEXT PRIMARY KEY, mix TEXT NOT NULL, about TEXT NOT NULL, made REAL NOT NULL);
CREATE TABLE IF NOT EXISTS replies (
  id TEXT PRIMARY KEY, client TEXT NOT NULL, arm TEXT, context TEXT, made REAL NOT NULL, reward REAL
);
CREATE INDEX IF NOT EXISTS replies_made ON replies (made);
CREATE TABLE IF NOT EXISTS learned (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


KEPT = 100_000
"""Replies that can still get feedback; older ones are forgotten."""


TRIM_EVERY = 1000


class State:
    """The file.

    Args:
        folder: where it is; made if it is not there.

    Raises:
        OutputError: it cannot be written. ConfigError: it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / FILE
        self._lock = threading.Lock()
        self._noted = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error.strerror}", remedy="give another --state") from error
        with self._errors():
            self._base = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute("PRAGMA synchronous=NORMAL")
            found = self._base.execute("PRAGMA quick_check").fetchone()[0]
            if found != "ok":
                raise ConfigError(f"{self.path} is damaged: {found}", remedy="move it away; the server makes a new one")
            self._base.executescript(TABLES)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._base.close()

    # ------------------------------------------------------------------ mixes

    def mixes(self) -> dict[str, tuple[Mix, dict[str, Any]]]:
        """{name: (mix, what is known about it)}."""
        with self._change() as base:
            rows = base.execute("SELECT name, mix, about FROM mixes ORDER BY name").fetchall()
        return {name: (Mix.from_json(mix), json.loads(about)) for name, mix, about in rows}

    def save_mix(self, name: str, mix: Mix, about: dict[str, Any]) -> None:
        """Save or replace a mix.

        Raises:
            OutputError: the disk is full or cannot be written; what was saved before is as it was.
        """
        values = (name, json.dumps(mix.to_json()), json.dumps(about), time.time())
        with self._change() as base:
            base.execute("INSERT OR REPLACE INTO mixes VALUES (?, ?, ?, ?)", values)

    def drop_mix(self, name: str) -> bool:
        """Forget a mix; False if there is none of that name."""
        with self._change() as base:
            return base.execute("DELETE FROM mixes WHERE name = ?", (name,)).rowcount > 0

    # ------------------------------------------------------------------ replies and feedback

    def note_reply(self, reply: str, client: str, arm: str | None, context: dict[str, float] | None) -> None:
        """A reply that may get feedback: which arm gave it, in which context."""
        values = (reply, client, arm, None if context is None else json.dumps(context), time.time())
        with self._change() as base:
            base.execute(
                "INSERT OR REPLACE INTO replies (id, client, arm, context, made) VALUES (?, ?, ?, ?, ?)", values
            )
            self._noted += 1
            if self._noted % TRIM_EVERY == 0:
                base.execute(
                    "DELETE FROM replies WHERE id NOT IN (SELECT id FROM replies ORDER BY made DESC LIMIT ?)", (KEPT,)
                )

    def reply(self, reply: str) -> dict[str, Any] | None:
        """What was noted of a reply, and its ``reward`` (None: no feedback yet)."""
        with self._change() as base:
            row = base.execute("SELECT client, arm, context, reward FROM replies WHERE id = ?", (reply,)).fetchone()
        if row is None:
            return None
        client, arm, context, reward = row
        return {"client": client, "arm": arm, "context": json.loads(context) if context else None, "reward": reward}

    def learn(self, reply: str, reward: float, name: str, value: Any) -> bool:
        """A reply's reward, and what it makes of what is learned, both or neither; False, and nothing is changed, for a
        reply that has a reward."""
        with self._change() as base:
            found = base.execute("UPDATE replies SET reward = ? WHERE id = ? AND reward IS NULL", (reward, reply))
            if found.rowcount and value is not None:
                base.execute("INSERT OR REPLACE INTO learned VALUES (?, ?)", (name, json.dumps(value)))
            return found.rowcount > 0

    def learned(self, name: str) -> Any:
        """What `learn` saved last under a name; None if nothing."""
        with self._change() as base:
            row = base.execute("SELECT value FROM learned WHERE name = ?", (name,)).fetchone()
        return json.loads(row[0]) if row else None

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._errors():
            self._base.execute("BEGIN")
            try:
                yield self._base
            except BaseException:
                if self._base.in_transaction:
                    self._base.execute("ROLLBACK")
                raise
            self._base.execute("COMMIT")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if getattr(self, "_base", None) is not None and self._base.in_transaction:
                self._base.execute("ROLLBACK")
            raise OutputError(
                f"cannot write {self.path}: {error}", remedy="free some space, or give another --state"
            ) from error
        except sqlite3.DatabaseError as error:
            raise ConfigError(
                f"{self.path} is damaged: {error}", remedy="move it away; the server makes a new one"
            ) from error
