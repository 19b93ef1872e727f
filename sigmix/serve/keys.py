"""API keys: made here, shown once, kept as SHA-256. A key is 32 random bytes, so a fast hash gives nothing away."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sigmix.errors import ConfigError, UnknownNameError
from sigmix.experts.metadata import check_name
from sigmix.files import atomic_file

PREFIX = "sk-sigmix-"


@dataclass
class Key:
    """Who a key is for, and what it allows.

    Attributes:
        name: of the client. hash: hex SHA-256 of the key. admin: may load experts and see metrics.
        per_minute: requests. at_once: requests under way. max_new_tokens: of an answer. None: no limit of its own.
    """

    name: str
    hash: str
    admin: bool = False
    per_minute: int | None = None
    at_once: int | None = None
    max_new_tokens: int | None = None
    made: float = 0.0


def digest(key: str) -> str:
    """Hex SHA-256 of a key's text."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def read_keys(path: Path) -> list[Key]:
    """Keys of a file; none where there is no file.

    Raises:
        ConfigError: damaged.
    """
    if not path.is_file():
        return []
    try:
        found = [Key(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["keys"]]
        if not all(isinstance(key.hash, str) and len(key.hash) == 64 for key in found):
            raise ValueError("a hash is missing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"the file of API keys {path} cannot be read: {error}", remedy="mend or remove it") from error
    return found


def _write(path: Path, keys: list[Key]) -> None:
    text = json.dumps({"keys": [asdict(key) for key in keys]}, indent=2) + "\n"
    with atomic_file(path, mode=0o600) as temporary:
        temporary.write_text(text, encoding="utf-8")


def add_key(path: Path, name: str, **allowed: Any) -> str:
    """Make a key; returns its text, which is stored nowhere.

    Raises:
        ConfigError: the name is taken. ExpertError: it is no name. OutputError: the file cannot be written.
    """
    keys = read_keys(path)
    if any(key.name == check_name(name) for key in keys):
        raise ConfigError(f"there is a key {name!r} already", remedy=f"remove it first: sigmix keys remove {name}")
    text = PREFIX + secrets.token_urlsafe(32)
    _write(path, [*keys, Key(name, digest(text), made=round(time.time()), **allowed)])
    return text


def remove_key(path: Path, name: str) -> None:
    """Take a key away; a server that runs notices within seconds.

    Raises:
        UnknownNameError: there is none of that name.
    """
    keys = read_keys(path)
    if all(key.name != name for key in keys):
        raise UnknownNameError("key", name, [key.name for key in keys])
    _write(path, [key for key in keys if key.name != name])


@dataclass
class Use:
    """What one client is doing."""

    at_once: int = 0
    allowance: float = 0.0
    since: float = field(default_factory=time.monotonic)


class Keyring:
    """The keys of a file, read anew when it changes, and what their clients are doing.

    Args:
        path: of the file.
    """

    LOOK = 2.0
    """Seconds after which the file is looked at again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._looked = self._changed = -1.0
        self._keys: list[Key] = []
        self._uses: dict[str, Use] = {}

    def keys(self) -> list[Key]:
        """All keys as they are now."""
        now = time.monotonic()
        if self._looked < 0 or now - self._looked > self.LOOK:
            self._looked = now
            try:
                changed = self.path.stat().st_mtime_ns
            except OSError:
                changed = 0
            if changed != self._changed:
                self._keys, self._changed = read_keys(self.path), changed
        return self._keys

    def find(self, text: str) -> Key | None:
        """The key with a text; all hashes are compared, each in constant time."""
        wanted, found = digest(text), None
        for key in self.keys():
            if hmac.compare_digest(key.hash, wanted):
                found = key
        return found

    def enter(self, key: Key) -> float | None:
        """Count a request; returns None if it may go on, else the seconds after which to try again."""
        use = self._uses.setdefault(key.name, Use(allowance=float(key.per_minute or 0)))
        if key.at_once is not None and use.at_once >= key.at_once:
            return 1.0
        if key.per_minute is not None:
            now, rate = time.monotonic(), key.per_minute / 60
            use.allowance = min(use.allowance + (now - use.since) * rate, float(key.per_minute))
            use.since = now
            if use.allowance < 1:
                return (1 - use.allowance) / rate
            use.allowance -= 1
        use.at_once += 1
        return None

    def leave(self, key: Key) -> None:
        """A request that had entered has ended."""
        self._uses[key.name].at_once -= 1
