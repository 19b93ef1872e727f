"""Uploaded training files and the results of training: content in a folder, metadata in the store.

An uploaded file is data. It is written to disk as it arrives, under a name of the server's own.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi.concurrency import run_in_threadpool

from sigmix.errors import UnknownNameError
from sigmix.serve.fine_tuning.multipart import FormParser, Part
from sigmix.serve.protocol.errors import ApiError, rate_limited
from sigmix.serve.settings import Settings
from sigmix.serve.store import Store
from sigmix.tasks.data import FORMATS
from sigmix.utils.cache import STALE
from sigmix.utils.io import atomic_file, link_or_copy

PURPOSE, RESULTS = "fine-tune", "fine-tune-results"
MAX_NAME = 200  # bytes of a file's name
MAX_FIELD = 1024  # bytes of a field of the form


@dataclass(frozen=True)
class File:
    """Metadata of a file."""

    id: str
    client: str
    created: float
    name: str
    bytes: int
    purpose: str

    def to_json(self) -> dict[str, Any]:
        """Return OpenAI's file object."""
        return {
            "id": self.id, "object": "file", "bytes": self.bytes, "created_at": int(self.created),
            "filename": self.name, "purpose": self.purpose, "status": "processed", "status_details": None,
            "expires_at": None,
        }  # fmt: skip


class Files:
    """Files of all clients.

    Args:
        store: of the metadata. settings: state folder and limits.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store, self.settings = store, settings
        self.folder = settings.state / "files"

    def sweep(self) -> None:
        """Remove content that no file has: of uploads that a killed server was receiving."""
        kept = {self.path(file).name for file in self.all(None)}
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name not in kept and time.time() - path.stat().st_mtime >= STALE:  # another server may write it
                path.unlink(missing_ok=True)

    def path(self, file: File) -> Path:
        """Return the path of a file's content."""
        return self.folder / file.id

    def all(self, client: str | None) -> list[File]:
        """Return a client's files, the latest first; None: of all clients."""
        query = "SELECT id, client, created, name, bytes, purpose FROM files"
        with self.store.transaction() as db:
            rows = db.execute(f"{query} ORDER BY created DESC, rowid DESC").fetchall()
        return [file for file in (File(*row) for row in rows) if client in (None, file.client)]

    def get(self, id: str, client: str | None) -> File:
        """Return a file of a client; None: of any client.

        Raises:
            UnknownNameError: no such file.
        """
        for file in self.all(client):
            if file.id == id:
                return file
        raise UnknownNameError("file", id, [], remedy="POST /v1/files uploads a file")

    def delete(self, file: File) -> None:
        """Delete a file. Jobs keep the content until they end."""
        with self.store.transaction() as db:
            db.execute("DELETE FROM files WHERE id = ?", (file.id,))
        self.path(file).unlink(missing_ok=True)

    def add(self, source: Path, name: str, client: str, purpose: str) -> File:
        """Add a file that the server has written, as a link or a copy.

        Raises:
            OutputError: the disk is full.
        """
        file = File(_new_id(), client, time.time(), name, source.stat().st_size, purpose)
        link_or_copy(source, self.path(file))
        return self._save(file)

    async def receive(self, content_type: str, stream: AsyncIterator[bytes], client: str) -> File:
        """Write the file of an upload to disk as it arrives.

        Args:
            content_type: header of the request. stream: its body.

        Raises:
            ApiError: an invalid form, purpose or name; an empty, incomplete or too large file; nothing is left behind.
            OutputError: the disk is full.
        """
        if len([file for file in self.all(client) if file.purpose == PURPOSE]) >= self.settings.max_files_per_client:
            raise rate_limited(f"{client} has {self.settings.max_files_per_client} files; delete some", 60)
        form = _Form(content_type, self.settings.max_file_bytes)
        id = _new_id()
        with atomic_file(self.folder / id, mode=0o600) as temporary:
            with open(temporary, "wb") as output:
                async for data in stream:
                    for content in form.feed(data):
                        await run_in_threadpool(output.write, content)
            form.check_end()
        return self._save(File(id, client, time.time(), form.name, form.size, PURPOSE))

    def _save(self, file: File) -> File:
        values = (file.id, file.client, file.created, file.name, file.bytes, file.purpose)
        try:
            with self.store.transaction() as db:
                db.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?)", values)
        except BaseException:
            self.path(file).unlink(missing_ok=True)
            raise
        return file


def _new_id() -> str:
    return f"file-{uuid.uuid4().hex}"


class _Form:
    """Checks the form of an upload.

    Args:
        max_bytes: limit of the file.

    Attributes:
        name: of the file.
    """

    def __init__(self, content_type: str, max_bytes: int) -> None:
        try:
            self.parser = FormParser(content_type)
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        self.max_bytes, self.size, self.name = max_bytes, 0, ""
        self.fields: dict[str, bytes] = {}
        self.current = ""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the content of the file in a chunk of the body."""
        contents = []
        try:
            for event in self.parser.feed(data):
                if isinstance(event, Part):
                    self._begin(event)
                elif self.current == "file":
                    self.size += len(event)
                    if self.size > self.max_bytes:
                        raise ApiError(413, f"the file is larger than {self.max_bytes} bytes", code="too_large",
                                       param="file")  # fmt: skip
                    contents.append(event)
                else:
                    self.fields[self.current] += event
                    if len(self.fields[self.current]) > MAX_FIELD:
                        raise ApiError(400, f"{self.current} is too long", param=self.current)
        except ValueError as error:
            raise ApiError(400, f"the form cannot be read: {error}") from error
        return contents

    def _begin(self, part: Part) -> None:
        self.current = part.name
        if part.name not in ("file", "purpose"):
            raise ApiError(400, f"{part.name} is not supported; leave it out", param=part.name)
        if part.name in self.fields:
            raise ApiError(400, f"{part.name} is given twice", param=part.name)
        self.fields[part.name] = b""
        if part.name == "file":
            self.name = check_file_name(part.filename)

    def check_end(self) -> None:
        """Raise `ApiError` unless the form is complete and its file is a training file."""
        if not self.parser.complete:
            raise ApiError(400, "the upload is cut off: its last boundary is missing", code="incomplete", param="file")
        for field in ("file", "purpose"):
            if field not in self.fields:
                raise ApiError(400, f"{field} is missing", param=field)
        if (purpose := self.fields["purpose"].decode(errors="replace")) != PURPOSE:
            raise ApiError(400, f"purpose must be {PURPOSE!r}, not {purpose[:40]!r}", param="purpose")
        if not self.size:
            raise ApiError(400, f"the file {self.name} is empty", param="file")


def check_file_name(name: str | None) -> str:
    """Return the name of an uploaded file.

    Raises:
        ApiError: no name, a path, or not one of `FORMATS`.
    """
    if not name:
        raise ApiError(400, "the file has no name; name it, such as train.jsonl", param="file")
    shown = repr(name if len(name) <= 60 else f"{name[:60]}…")
    if any(part in name for part in "/\\\0") or not name.isprintable() or len(name.encode()) > MAX_NAME:
        raise ApiError(400, f"{shown} is not a valid file name; send a plain name without a path", param="file")
    if Path(name).suffix.lower() not in FORMATS:
        raise ApiError(400, f"{shown} must end in one of {', '.join(FORMATS)}", param="file")
    return name
