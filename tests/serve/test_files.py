"""Uploaded files: the form as it arrives, limits, owners; a failed upload leaves nothing behind."""

from __future__ import annotations

import contextlib
import http.client
import socket
import sqlite3

import pytest
from helpers_serve import TIMEOUT, bearer, live, serving, wait_until

from sigmix.serve.auth import add_key
from sigmix.serve.fine_tuning.multipart import FormParser, Part

pytestmark = pytest.mark.usefixtures("cache")
ROWS = b'{"prompt": "a", "completion": "b"}\n' * 30


def form(content=ROWS, name="rows.jsonl", purpose="fine-tune", end=b"--b--\r\n", disposition=None) -> bytes:
    """Body of an upload with the boundary "b"."""
    fields = b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\n' + purpose.encode() + b"\r\n"
    disposition = disposition or f'form-data; name="file"; filename="{name}"'
    return fields + b"--b\r\nContent-Disposition: " + disposition.encode() + b"\r\n\r\n" + content + b"\r\n" + end


def upload(server, body=None, kind="multipart/form-data; boundary=b", **headers):
    return server.call("POST", "/v1/files", form() if body is None else body, content_type=kind, **headers)


def left(server) -> list[str]:
    """Names in the folder of files, and rows of the table."""
    folder = server.service.settings.state / "files"
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    with contextlib.closing(sqlite3.connect(server.service.store.path)) as db:
        return names + [row[0] for row in db.execute("SELECT id FROM files")]


# --- Forms


CONTENT = b"hello\r\n--bound\r\n-\r\n--b\xff\x00\r\n" * 50


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 10_000])
def test_a_form_is_read_in_pieces_of_any_size(size):
    boundary = "boundary-7f"
    body = form(CONTENT).replace(b"--b\r\nco", b"--boundary-7f\r\nco", 1)
    body = body.replace(b"--b\r\nCo", b"--boundary-7f\r\nCo").replace(b"--b--", b"--boundary-7f--") + b"epilogue"
    parser = FormParser(f"multipart/form-data; boundary={boundary}")
    events = [event for at in range(0, len(body), size) for event in parser.feed(body[at : at + size])]
    assert parser.complete
    assert [event for event in events if isinstance(event, Part)] == [Part("purpose", None), Part("file", "rows.jsonl")]
    place = events.index(Part("file", "rows.jsonl"))
    assert b"".join(events[place + 1 :]) == CONTENT
    assert b"".join(events[1:place]) == b"fine-tune"
    assert all(len(event) <= size + len(boundary) + 4 for event in events if isinstance(event, bytes))


@pytest.mark.parametrize(
    "kind",
    ["application/json", "multipart/form-data", "", "multipart/mixed; boundary=b", "multipart/form-data; boundary="],
)
def test_other_bodies_are_no_forms(kind):
    with pytest.raises(ValueError):
        FormParser(kind)


def test_long_headers_are_refused():
    parser = FormParser("multipart/form-data; boundary=b")
    with pytest.raises(ValueError):
        for _ in range(100):
            list(parser.feed(b"--b\r\n" + b"x" * 1000))


# --- Uploads


@pytest.fixture
def server(tmp_path):
    with serving(tmp_path, strategy="A", max_file_bytes=4096) as server:
        yield server


def test_a_file_is_kept_as_it_was_sent(server):
    status, file, _ = upload(server)
    assert status == 200, file
    assert (file["object"], file["filename"], file["bytes"], file["purpose"]) == (
        "file", "rows.jsonl", len(ROWS), "fine-tune"
    )  # fmt: skip
    assert server.call("GET", f"/v1/files/{file['id']}")[1] == file
    assert server.http.get(f"/v1/files/{file['id']}/content").content == ROWS
    assert server.call("GET", "/v1/files")[1]["data"] == [file]
    assert left(server) == [file["id"]] * 2
    path = server.service.settings.state / "files" / file["id"]
    assert path.stat().st_mode & 0o077 == 0
    assert server.call("DELETE", f"/v1/files/{file['id']}")[1]["deleted"]
    assert server.call("GET", f"/v1/files/{file['id']}")[0] == 404
    assert server.call("GET", f"/v1/files/{file['id']}/content")[0] == 404
    assert left(server) == []


BAD = {
    "path": (form(name="../../etc/rows.jsonl"), 400, "path"), "absolute": (form(name="/etc/rows.jsonl"), 400, "path"),
    "windows": (form(name="C:\\\\rows.jsonl"), 400, "path"), "line end": (form(name="a\tb.jsonl"), 400, "name"),
    "only a path": (form(name=".."), 400, ".jsonl"), "parent": (form(name="../../x.jsonl"), 400, "path"),
    "zip": (form(b"PK", name="rows.zip"), 400, ".jsonl"), "array": (form(name="rows.npy"), 400, ".jsonl"),
    "encoded": (form(disposition="form-data; name=file; filename*=utf-8''..%2Frows.jsonl"), 400, "path"),
    "long": (form(name="x" * 300 + ".jsonl"), 400, "name"), "pickle": (form(name="rows.pkl"), 400, ".jsonl"),
    "joblib": (form(name="rows.jsonl.joblib"), 400, ".jsonl"), "no suffix": (form(name="rows"), 400, ".jsonl"),
    "hidden": (form(name=".jsonl"), 400, ".jsonl"), "no name": (form(disposition="form-data; name=file"), 400, "name"),
    "empty": (form(b""), 400, "empty"), "purpose": (form(purpose="batch"), 400, "purpose"),
    "cut off": (form(end=b""), 400, "cut off"), "cut off in the file": (form()[:300], 400, "cut off"),
    "two files": (form(end=form()), 400, "twice"), "field": (form(disposition="form-data; name=other"), 400, "other"),
    "large": (form(b"x" * 5000), 413, "4096"), "larger": (form(b"x" * 200_000), 413, "larger"),
    "nothing": (b"", 400, "cut off"), "latin": (form().replace(b"rows", b"\xe4"), 400, "form"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_upload_leaves_nothing_behind(server, case):
    body, expected, named = BAD[case]
    status, answer, _ = upload(server, body)
    assert (status, named in answer["error"]["message"]) == (expected, True), answer
    assert answer["error"]["type"] == "invalid_request_error"
    assert left(server) == []
    assert server.call("GET", "/v1/files")[1]["data"] == []


def test_json_is_no_upload(server):
    assert upload(server, b"{}", "application/json")[0] == 400
    assert upload(server, form(), "multipart/form-data")[0] == 400


def test_an_upload_may_be_larger_than_other_bodies(tmp_path):
    with serving(tmp_path, strategy="A", max_body_bytes=1024, max_file_bytes=1 << 20) as server:
        assert upload(server, form(b"x" * 500_000))[0] == 200
        assert server.call("POST", "/v1/fine_tuning/jobs", {"model": "x" * 2000})[0] == 413


def test_files_per_client_are_limited(tmp_path):
    with serving(tmp_path, strategy="A", max_files_per_client=2) as server:
        assert [upload(server)[0] for _ in range(3)] == [200, 200, 429]


def test_pages_of_files(server):
    ids = [upload(server, form(name=f"{n}.csv"))[1]["id"] for n in range(5)][::-1]
    first = server.call("GET", "/v1/files?limit=2")[1]
    assert ([one["id"] for one in first["data"]], first["has_more"]) == (ids[:2], True)
    rest = server.call("GET", f"/v1/files?limit=3&after={ids[1]}")[1]
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == (ids[2:], False)
    assert [one["id"] for one in server.call("GET", "/v1/files?order=asc")[1]["data"]] == ids[::-1]
    assert server.call("GET", "/v1/files?purpose=batch")[1]["data"] == []
    for query, field in (("limit=0", "limit"), ("limit=x", "limit"), ("after=file-no", "after"), ("order=up", "order")):
        status, answer, _ = server.call("GET", f"/v1/files?{query}")
        assert (status, answer["error"]["param"]) == (400, field), answer


def test_files_belong_to_the_key_that_uploaded_them(tmp_path):
    keys = tmp_path / "state" / "keys.json"
    alice, bob, root = (bearer(add_key(keys, name, admin=name == "root")) for name in ("alice", "bob", "root"))
    with serving(tmp_path, strategy="A", training="all") as server:
        id = upload(server, **alice)[1]["id"]
        for path in (f"/v1/files/{id}", f"/v1/files/{id}/content"):
            assert [server.call("GET", path, **key)[0] for key in (alice, bob, root)] == [200, 404, 200]
        assert server.call("DELETE", f"/v1/files/{id}", **bob)[0] == 404
        assert [len(server.call("GET", "/v1/files", **key)[1]["data"]) for key in (alice, bob, root)] == [1, 0, 1]
        assert server.call("DELETE", f"/v1/files/{id}", **root)[0] == 200


@pytest.mark.parametrize("training, expected", [("off", [403, 403]), ("admins", [403, 200]), ("all", [200, 200])])
def test_who_may_upload(tmp_path, training, expected):
    keys = tmp_path / "state" / "keys.json"
    clients = [bearer(add_key(keys, name, admin=name == "root")) for name in ("alice", "root")]
    with serving(tmp_path, strategy="A", training=training) as server:
        answers = [upload(server, **key) for key in clients]
        assert [status for status, *_ in answers] == expected
        assert all(body["error"]["code"] == "forbidden" for status, body, _ in answers if status == 403)


@pytest.mark.slow
def test_a_lost_connection_leaves_nothing_behind(tmp_path):
    with live(tmp_path, strategy="A") as server:
        with socket.create_connection(("127.0.0.1", server.port)) as link:
            head = "POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; boundary=b\r\n"
            link.sendall(head.encode() + b"content-length: 100000\r\n\r\n" + form()[:-20] + b"x" * 5000)
            wait_until(lambda: len(left(server)) == 1)  # the temporary file
        wait_until(lambda: left(server) == [])
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)
        with contextlib.closing(connection):  # without a length, in chunks
            pieces = [form()[at : at + 100] for at in range(0, len(form()), 100)]
            connection.request(
                "POST", "/v1/files", iter(pieces), {"content-type": "multipart/form-data; boundary=b"},
                encode_chunked=True,
            )  # fmt: skip
            assert connection.getresponse().status == 200
        assert len(left(server)) == 2
