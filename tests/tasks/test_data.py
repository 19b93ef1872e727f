"""Rows of a JSONL file: encodings, blank lines, errors that name file and line."""

import pickle

import pytest

from sigmix.errors import DataError
from sigmix.tasks.data import Row, hub_tables, read_rows
from sigmix.tasks.graders import exact, json_only, math_equal, score_final, strict_number


def test_blank_lines_count_but_are_no_rows(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf\n{"a": "\xc3\xa9"}\r\n\r\n{"a": 2}')
    rows = list(read_rows(file))
    assert [(row.get("a"), row.where) for row in rows] == [("é", f"{file}:2"), (2, f"{file}:4")]


def test_fields_are_checked(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1, "blank": " ", "none": null}\n')
    (row,) = read_rows(file)
    assert row.get("missing", "a", kind=int) == 1
    for names, kind in ((["a"], str), (["blank"], str), (["none"], object), (["missing"], object)):
        with pytest.raises(DataError, match=f"1: .*{names[0]}"):
            row.get(*names, kind=kind)


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": Infinity}', '{"a": 1e999}'])
def test_numbers_that_are_not_finite_are_no_values(tmp_path, text):
    file = tmp_path / "a.jsonl"
    file.write_text(text)
    (row,) = read_rows(file)
    with pytest.raises(DataError, match=r"a\.jsonl:1: "):
        row.get("a", kind=float)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "latin-1"])
def test_other_encodings_are_named(tmp_path, encoding):
    file = tmp_path / "a.jsonl"
    file.write_bytes('{"a": "é, but mostly letters"}\n'.encode(encoding))
    with pytest.raises(DataError, match="UTF-8") as error:
        list(read_rows(file))
    assert ("UTF-16" in str(error.value)) == encoding.startswith("utf-16")


@pytest.mark.parametrize(
    ("grade", "gold"),
    [(strict_number, "$18"), (strict_number, "eighteen"), (strict_number, "1,5"), (strict_number, "nan"),
     (json_only, "{'a': 1}"), (json_only, ""), (score_final, "none"), (math_equal, " ")],
)  # fmt: skip
def test_gold_that_no_reply_can_match_is_refused(grade, gold):
    with pytest.raises(DataError, match=r"x\.jsonl:3: no reply can match"):
        Row({}, "x.jsonl:3").check_gold(gold, lambda reply: grade(reply, gold))


@pytest.mark.parametrize(
    ("grade", "gold"),
    [(strict_number, "1,234"), (exact, "Paris."), (exact, " ?"), (json_only, '{"a": [1, null]}'), (score_final, "$18"),
     (math_equal, r"\text{not possible}")],
)  # fmt: skip
def test_gold_that_matches_itself_is_accepted(grade, gold):
    Row({}, "x.jsonl:3").check_gold(gold, lambda reply: grade(reply, gold))


@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"a": "\xff"}', b'{"a": 1', b"", b"\n\n", b"[" * 100_000])
def test_unreadable_files_are_named(tmp_path, content):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jsonl"):
        list(read_rows(file))
    with pytest.raises(DataError, match="folder"):
        list(read_rows(tmp_path / "folder"))


def write(folder, name, text):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        ("a.csv", 'text,label\r\n"a ""q""\r\nb",007\r\n\r\nNA,None\r\n', [("a.csv:2", 'a "q"\r\nb', "007"),
                                                                         ("a.csv:5", "NA", "None")]),
        ("a.csv", "text;label\na,b;c\n", [("a.csv:2", "a,b", "c")]),
        ("a.csv", b"\xef\xbb\xbftext,label\na,b\n", [("a.csv:2", "a", "b")]),
        ("a.csv", "text|label\na,b|c\n", [("a.csv:2", "a,b", "c")]),
        ("a.csv", 'sep=;\r\ntext;label\r\na,b;"3,5"\r\nc;d\r\n', [("a.csv:3", "a,b", "3,5"), ("a.csv:4", "c", "d")]),
        ("a.tsv", 'text\tlabel\na, b\tc\n', [("a.tsv:2", "a, b", "c")]),
        ("a.json", '[\n {"text": "a",\n "label": "2021-03-04"}\n]', [("a.json: element 1", "a", "2021-03-04")]),
        ("a.jsonl", '\n[{"text": "a", "label": "b"}]', [("a.jsonl: element 1", "a", "b")]),
        ("a.json", '{"text": "a\u2028", "label": "b"}\r\n{"text": "c", "label": "d"}',
         [("a.json:1", "a\u2028", "b"), ("a.json:2", "c", "d")]),
    ],
)  # fmt: skip
def test_formats_keep_the_text_as_it_is(tmp_path, name, text, rows):
    file = write(tmp_path, name, text)
    found = [(row.where.removeprefix(f"{tmp_path}/"), *row.data.values()) for row in read_rows(file)]
    assert found == rows


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.csv", "text,label\na,b,c\n", r"a\.csv:2: 3 fields, expected 2"),
        ("a.csv", 'text,label\n"a\nb",c\nd\n', r"a\.csv:4: 1 fields"),
        ("a.csv", 'text,label\na,b\n"a,b\nc', r"a\.csv:3: not CSV"),
        ("a.csv", "text,text\na,b\n", r"a\.csv:1: two columns are named 'text'"),
        ("a.csv", "text,label\n", "no rows"),
        ("a.csv", "", "no rows"),
        ("a.csv", "text,label\na,é\n".encode("latin-1"), r"a\.csv:2: expected UTF-8"),
        ("a.csv", "text,label\na,b\n".encode("utf-16"), "UTF-16"),
        ("a.json", '[{"text": "a"},\n {"text": }]', r"a\.json:2: not JSON"),
        ("a.json", '[{"text": "a"}, 3]', "element 2: expected a JSON object"),
        ("a.json", '{\n "text": "a"\n}', r"a\.json:1: not JSON"),
        ("a.jsonl", "[" * 100_000, "nested too deeply|not JSON"),
        ("a.csv", "text,label\na,b\n".encode("utf-16-le"), "UTF-16"),
        ("a.csv", b"PK\x03\x04" + bytes(60), r"a\.csv: .*zip"),
        ("a.jsonl", b"\x1f\x8b" + bytes(60), r"a\.jsonl: .*gzip"),
        ("a.json", b"\x93NUMPY" + bytes(60), r"a\.json: .*NumPy"),
        ("a.csv", b"PAR1" + bytes(60), r"a\.csv: .*Parquet"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b', r"a\.jsonl:2: not JSON"),
        ("a.npy", b"\x93NUMPY", r"a\.npy: .*run code"),
        ("a.parquet", pickle.dumps({"a": 1}), r"a\.parquet cannot be read as Parquet"),
        ("a.pkl", b"\x80\x04", r"a\.pkl: .*run code"),
        ("a.xlsx", b"PK", "unknown format '.xlsx'"),
        ("a.parquet", b"PAR1 not really PAR1", r"a\.parquet cannot be read as Parquet"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, text, problem):
    with pytest.raises(DataError, match=problem):
        list(read_rows(write(tmp_path, name, text)))


def test_a_parquet_file(tmp_path, capfd):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"text": ["a", "b"], "label": ["007", "NA"]}), tmp_path / "a.parquet")
    rows = list(read_rows(tmp_path / "a.parquet"))
    assert [dict(row.data) for row in rows] == [{"text": "a", "label": "007"}, {"text": "b", "label": "NA"}]
    assert "a.parquet row 2" in rows[1].where
    with pytest.raises(DataError, match=r"b\.parquet"):
        list(read_rows(tmp_path / "b.parquet"))
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"c\.parquet has no rows"):
        list(read_rows(tmp_path / "c.parquet"))
    nested = pa.table({"prompt": [{"text": "a"}], "completion": [["b"]]})
    parquet.write_table(nested, tmp_path / "d.parquet")
    (row,) = list(read_rows(tmp_path / "d.parquet"))
    assert row.data == {"prompt": {"text": "a"}, "completion": ["b"]}  # refused by `Columns`, which names the row
    assert capfd.readouterr().err == ""


def test_a_data_set_on_the_hub_names_its_labels(monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features).to_iterable_dataset()

    def load(name, config, streaming):
        assert (name, config, streaming) == ("user/set", "main", True)
        return {"train": table}

    monkeypatch.setattr(datasets, "load_dataset", load)
    ((split, rows),) = hub_tables("user/set:main")
    assert (split, [row.data["label"] for row in rows]) == ("train", ["yes", "no"])

    def refuse(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match="user/set.*offline.*folder"):
        list(hub_tables("user/set"))
