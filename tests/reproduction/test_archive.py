"""Archives of raw results, and the tables in the repository that are computed from them."""

from __future__ import annotations

import json

import pytest
from helpers_reproduce import put

from reproduction.archive import RESULTS, manifest, pack, read_archive, unpack, verify
from reproduction.page import page
from reproduction.report import Report
from reproduction.scale import SCALES
from reproduction.stages.table1 import Table1
from reproduction.store import Store
from reproduction.studies import adaptation_page, experts_page, replies_page
from sigmix.errors import DataError, OutputError

LAPTOP = SCALES["laptop"]
TABLES = RESULTS.parent / "tables"
FACTS = {"command": "python -m reproduction", "seed": 0, "commit": ["1a2b3c4"]}


def table(name: str) -> str:
    return (TABLES / name).read_text(encoding="utf-8")


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


@pytest.fixture
def folder(tmp_path):
    put(Store(tmp_path / "a" / "out"), "addition", "base", [True, False])
    return tmp_path / "a" / "out"


def test_the_same_files_give_the_same_archive(folder, tmp_path):
    first = pack(folder, tmp_path / "x.tar.xz", FACTS)
    (folder / "cells" / "addition" / "base.jsonl").touch()
    second = pack(folder, tmp_path / "y.tar.xz", FACTS)
    assert first["sha256"] == second["sha256"]
    assert (first["files"], first["rows"], first["command"]) == (2, 6, FACTS["command"])
    assert [entry["study"] for entry in manifest(tmp_path)] == ["x", "y"]
    pack(folder, tmp_path / "x.tar.xz", FACTS)
    assert len(manifest(tmp_path)) == 2
    verify(tmp_path)


def test_unpacking_restores_the_files(folder, tmp_path):
    pack(folder, tmp_path / "x.tar.xz", FACTS)
    unpack(tmp_path / "x.tar.xz", tmp_path / "again")
    restored = {path.relative_to(tmp_path / "again").as_posix() for path in (tmp_path / "again").rglob("*.jsonl")}
    assert restored == set(read_archive(tmp_path / "x.tar.xz")) == {"cells/addition/base.jsonl", "tasks/addition.jsonl"}
    with pytest.raises(OutputError):
        unpack(tmp_path / "x.tar.xz", tmp_path / "again")


def test_a_differing_missing_or_unlisted_archive_is_named(folder, tmp_path):
    pack(folder, tmp_path / "x.tar.xz", FACTS)
    content = (tmp_path / "x.tar.xz").read_bytes()
    (tmp_path / "x.tar.xz").write_bytes(content[:-1])
    for check in (lambda: verify(tmp_path), lambda: read_archive(tmp_path / "x.tar.xz")):
        with pytest.raises(DataError, match=r"x\.tar\.xz"):
            check()
    (tmp_path / "x.tar.xz").rename(tmp_path / "z.tar.xz")
    with pytest.raises(DataError, match=r"x\.tar\.xz, z\.tar\.xz"):
        verify(tmp_path)


def test_a_store_reads_an_archive_and_unpacks_it_before_a_write(folder, tmp_path):
    pack(folder, tmp_path / "out.tar.xz", FACTS)
    store = Store(tmp_path / "out")
    assert store.cell("addition", "base") == Store(folder).cell("addition", "base")
    assert store.cells("addition") == ["base"]
    assert store.has("addition", "base")
    assert not store.has("addition", "other")
    assert not store.folder.exists()
    store.write_fact("spectra", {"seconds": 2.0})
    assert store.cells("addition") == ["base"]
    assert Store(tmp_path / "out").seconds() == store.seconds() == 2.0


# ---------------------------------------------------------------------- the repository's own


def test_archives_have_the_checksums_of_the_manifest():
    verify()
    for entry in manifest():
        assert {"study", "command", "seed", "commit", "files", "rows"} <= set(entry)
        assert entry["bytes"] < 4 << 20


def test_tables_of_the_studies_follow_from_their_items():
    files = {study: read_archive(RESULTS / f"{study}.tar.xz") for study in ("adaptation", "dispatch")}
    assert lines(adaptation_page(files["adaptation"], files["dispatch"])) == lines(table("adaptation.md"))
    entry = next(one for one in manifest() if one["study"] == "adaptation")
    assert len(files["adaptation"]) == entry["files"]
    summary = json.loads(files["adaptation"]["subtraction/summary.json"])
    assert (summary["seed"], summary["n"]) == (0, 300)


def test_a_table_of_the_reproduction_follows_from_its_items():
    store = Store(RESULTS / "laptop")
    assert set(lines(Table1().tables(Report(store, LAPTOP)))) <= set(lines(table("laptop.md")))
    assert lines(replies_page(store)) == lines(table("replies.md"))


@pytest.mark.slow
def test_every_table_follows_from_the_items():
    assert page(Store(RESULTS / "laptop"), LAPTOP) == table("laptop.md")
    assert lines(experts_page(read_archive(RESULTS / "experts.tar.xz"))) == lines(table("experts.md"))
