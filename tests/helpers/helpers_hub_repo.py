"""What the stand-in for the hub keeps of one model: commits of {path: bytes}, and git's names of their contents."""

from __future__ import annotations

import hashlib


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "refused") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Repo:
    """Commits of one model."""

    def __init__(self, name: str, private: bool = False) -> None:
        self.name, self.private, self.gated = name, private, False
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.messages: list[str] = []
        self.commit({".gitattributes": b"*.safetensors filter=lfs"}, "main", "initial commit")

    def commit(self, changes: dict[str, bytes | None], branch: str = "main", message: str = "by hand") -> str:
        merged = {**self.commits.get(self.branches.get(branch, ""), {}), **changes}
        files = {path: content for path, content in merged.items() if content is not None}
        sha = hashlib.sha1(f"{self.name} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def at(self, revision: str) -> str:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, "RevisionNotFound", "Invalid rev id")
        return sha


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".png"))


def oid(path: str, content: bytes) -> str:
    """git's name of a blob; of a large file its SHA-256."""
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
