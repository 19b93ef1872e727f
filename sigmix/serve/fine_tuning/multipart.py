"""Incremental parser of multipart/form-data (RFC 7578), for uploads that are written to disk as they arrive."""

from __future__ import annotations

from dataclasses import dataclass
from email.message import Message

from python_multipart.multipart import MultipartParser


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
        if message.get_content_type() != "multipart/form-data" or not boundary:
            raise ValueError("the body must be multipart/form-data with a boundary")
        self.complete = False
        self._events: list[Part | bytes] = []
        self._header: list[bytes] = [b"", b""]
        self._headers = Message()
        self._parser = MultipartParser(
            boundary.encode("latin-1", "replace"),
            {
                "on_header_field": lambda data, start, end: self._add(0, data[start:end]),
                "on_header_value": lambda data, start, end: self._add(1, data[start:end]),
                "on_header_end": self._end_header, "on_headers_finished": self._begin,
                "on_part_data": lambda data, start, end: self._events.append(data[start:end]), "on_end": self._end,
            },
        )  # fmt: skip

    def feed(self, data: bytes) -> list[Part | bytes]:
        """Return the parts that begin in ``data``, and the content of the current part as far as it is certain."""
        self._parser.write(data)
        events, self._events = self._events, []
        return events

    def _add(self, place: int, text: bytes) -> None:
        self._header[place] += text

    def _end_header(self) -> None:
        name, value = (text.decode("utf-8") for text in self._header)
        self._headers[name], self._header = value, [b"", b""]

    def _begin(self) -> None:
        headers, self._headers = self._headers, Message()
        name, filename = headers.get_param("name", header="content-disposition"), headers.get_filename()
        if headers.get_content_disposition() != "form-data" or not isinstance(name, str):
            raise ValueError("a part has no content-disposition: form-data with a name")
        self._events.append(Part(name, filename))

    def _end(self) -> None:
        self.complete = True
