"""Rows of a JSONL file: encodings, blank lines, errors that name file and line."""

import pytest

from sigmix.errors import DataError
from sigmix.tasks.data import Row, local_rows
from sigmix.tasks.graders import exact, json_only, math_equal, score_final, strict_number


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


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": Infinity}', '{"a": 1e999}'])
def test_numbers_that_are_not_finite_are_no_values(tmp_path, text):
    file = tmp_path / "a.jsonl"
    file.write_text(text)
    (row,) = local_rows(file)
    with pytest.raises(DataError, match=r"a\.jsonl:1: "):
        row.get("a", kind=float)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "latin-1"])
def test_other_encodings_are_named(tmp_path, encoding):
    file = tmp_path / "a.jsonl"
    file.write_bytes('{"a": "é, but mostly letters"}\n'.encode(encoding))
    with pytest.raises(DataError, match="UTF-8") as error:
        local_rows(file)
    assert ("UTF-16" in str(error.value)) == encoding.startswith("utf-16")


@pytest.mark.parametrize(
    ("grade", "gold"),
    [(strict_number, "$18"), (strict_number, "eighteen"), (strict_number, "1,5"), (strict_number, "nan"),
     (exact, "."), (exact, " ?"), (json_only, "{'a': 1}"), (json_only, ""), (score_final, "none"), (math_equal, " ")],
)  # fmt: skip
def test_gold_that_no_reply_can_match_is_refused(grade, gold):
    with pytest.raises(DataError, match=r"x\.jsonl:3: no reply can match"):
        Row({}, "x.jsonl:3").check_gold(gold, lambda reply: grade(reply, gold))


@pytest.mark.parametrize(
    ("grade", "gold"),
    [(strict_number, "1,234"), (exact, "Paris."), (json_only, '{"a": [1, null]}'), (score_final, "$18"),
     (math_equal, r"\text{not possible}")],
)  # fmt: skip
def test_gold_that_matches_itself_is_accepted(grade, gold):
    Row({}, "x.jsonl:3").check_gold(gold, lambda reply: grade(reply, gold))


@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"a": "\xff"}', b'{"a": 1', b"", b"\n\n", b"[" * 100_000])
def test_unreadable_files_are_named(tmp_path, content):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jsonl"):
        local_rows(file)
    with pytest.raises(DataError, match="folder"):
        local_rows(tmp_path / "folder")
