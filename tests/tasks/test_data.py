"""Rows of a JSONL file: encodings, blank lines, errors that name file and line."""

import pytest

from sigmix.errors import DataError
from sigmix.tasks.data import local_rows


def test_blank_lines_count_but_are_no_rows(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf\n{"a": "\xc3\xa9"}\r\n\r\n{"a": 2}')
    rows = local_rows(file)
    assert [(row.get("a"), row.where) for row in rows] == [("é", f"{file}:2"), (2, f"{file}:4")]


def test_fields_are_checked(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1, "blank": " ", "none": null}\n')
    (row,) = local_rows(file)
    assert row.get("missing", "a", kind=int) == 1
    for names, kind in ((["a"], str), (["blank"], str), (["none"], object), (["missing"], object)):
        with pytest.raises(DataError, match=f"1: .*{names[0]}"):
            row.get(*names, kind=kind)


@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"a": "\xff"}', b'{"a": 1', b"", b"\n\n", b"[" * 100_000])
def test_unreadable_files_are_named(tmp_path, content):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jsonl"):
        local_rows(file)
    with pytest.raises(DataError, match="folder"):
        local_rows(tmp_path / "folder")
