"""Incremental parser of multipart/form-data (RFC 7578), for uploads that are written to disk as they arrive."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message

MAX_HEADERS = 16 << 10  # bytes of one part's headers


@dataclass(frozen=True)
class Part:
    """Start of a field; its content follows.

    Attributes:
        filename: None: a plain field.
    """

    name: str
    filename: str | None


class FormParser:
    """Parser of one body.

    Args:
        content_type: the request's header, with the boundary.

    Attributes:
        complete: the final boundary has been read.

    Raises:
        ValueError: here and in `feed`: not multipart/form-data, or malformed.
    """

    def __init__(self, content_type: str) -> None:
        message = Message()
        message["content-type"] = content_type
        boundary = message.get_boundary()
        if message.get_content_type() != "multipart/form-data" or not boundary or len(boundary) > 200:
            raise ValueError("the body must be multipart/form-data with a boundary")
        self._delimiter = b"\r\n--" + boundary.encode("latin-1", "replace")
        self._buffer = b"\r\n"  # of the line before the first boundary
        self._state = "preamble"
        self.complete = False

    def feed(self, data: bytes) -> Iterator[Part | bytes]:
        """Yield the parts that begin in ``data``, and the content of the current part as far as it is certain."""
        self._buffer += data
        while not self.complete:
            if self._state == "headers":
                if self._buffer[:2] == b"--":
                    self.complete = True
                    return
                headers, end, rest = self._buffer.partition(b"\r\n\r\n")
                if len(headers) > MAX_HEADERS:
                    raise ValueError("the headers of a part are too long")
                if not end:
                    return
                self._buffer, self._state = rest, "content"
                yield _part(headers)
            content, found, rest = self._buffer.partition(self._delimiter)
            if not found:  # the end may be the beginning of the delimiter
                keep = len(self._delimiter) - 1
                content, rest = self._buffer[:-keep], self._buffer[-keep:]
            if content and self._state == "content":
                yield content
            self._buffer = rest
            if not found:
                return
            self._state = "headers"


def _part(headers: bytes) -> Part:
    """Return the part of a block of headers, which begins with the rest of the boundary's line."""
    message = Message()
    for line in headers.decode("utf-8").split("\r\n")[1:]:
        name, _, value = line.partition(":")
        message[name.strip()] = value.strip()
    field, filename = message.get_param("name", header="content-disposition"), message.get_filename()
    if message.get_content_disposition() != "form-data" or not isinstance(field, str):
        raise ValueError("a part has no content-disposition: form-data with a name")
    return Part(field, filename)
