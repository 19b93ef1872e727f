"""Atomic writes, locks and disk checks: a reader finds the old content, the new content, or nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os

import pytest
from safetensors import SafetensorError

from sigmix.errors import BaseModelError, DataError, OutputError
from sigmix.utils import io as files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_atomic_file_appears_whole_with_usual_permissions(tmp_path):
    target = tmp_path / "new" / "a.txt"
    with files.atomic_file(target) as temporary:
        temporary.write_text("one")
        assert not target.exists()
        assert temporary.parent == target.parent  # the same file system, so that the rename is atomic
    assert target.read_text() == "one"
    assert names(target.parent) == ["a.txt"]
    usual = tmp_path / "usual"
    usual.write_text("")
    assert target.stat().st_mode == usual.stat().st_mode


def test_an_error_while_writing_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(ValueError, match="half way"), files.atomic_file(target) as temporary:
        temporary.write_text("half")
        raise ValueError("half way")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_an_atomic_folder_replaces_the_old_one_whole(tmp_path):
    target = tmp_path / "expert"
    for content in ("one", "two"):
        with files.atomic_dir(target) as temporary:
            (temporary / content).write_text("")
    assert names(target) == ["two"]
    assert names(tmp_path) == ["expert"]


def test_an_error_while_filling_a_folder_keeps_the_old_one(tmp_path):
    target = tmp_path / "expert"
    with files.atomic_dir(target) as temporary:
        (temporary / "old").write_text("")
    with pytest.raises(KeyboardInterrupt), files.atomic_dir(target) as temporary:
        (temporary / "new").write_text("")
        raise KeyboardInterrupt
    assert names(target) == ["old"]
    assert names(tmp_path) == ["expert"]


@pytest.mark.parametrize(("code", "words"), [
    (errno.ENOSPC, "disk is full"),
    (errno.EDQUOT, "quota"),
    (errno.EROFS, "read-only"),
    (errno.EACCES, "permission"),
])  # fmt: skip
def test_refusals_of_the_system_name_the_file_the_reason_and_a_remedy(tmp_path, monkeypatch, code, words):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OutputError, match=words) as caught:
        files.write_text(tmp_path / "a.txt", "x")
    assert str(tmp_path / "a.txt") in str(caught.value)
    assert names(tmp_path) == []


def test_a_full_disk_that_safetensors_reports_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="disk is full"), files.writing(tmp_path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_errors_of_the_package_inside_a_write_are_not_converted(tmp_path):
    with pytest.raises(BaseModelError), files.atomic_file(tmp_path / "a"):
        raise BaseModelError("not the file that was expected")
    (tmp_path / "b").write_text("")
    with pytest.raises(OutputError, match="exists already"), files.atomic_dir(tmp_path / "b", new=True):
        pass


def test_a_device_or_pipe_is_never_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OutputError, match="pipe"):
        files.check_writable(pipe)
    with pytest.raises(OutputError, match="pipe"):
        files.write_text(pipe, "x")
    assert names(tmp_path) == ["pipe"]


def test_a_link_to_a_folder_is_replaced_and_the_folder_stays(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with files.atomic_dir(tmp_path / "link") as temporary:
        (temporary / "new").write_text("")
    assert names(tmp_path / "link") == ["new"]
    assert names(tmp_path) == ["link", "real"]
    assert names(tmp_path / "real") == []


def test_an_interrupted_replacement_is_restored(tmp_path):
    (tmp_path / ".expert.old").mkdir()
    files.restore_interrupted(tmp_path / "expert")
    assert names(tmp_path) == ["expert"]


def test_a_lock_is_exclusive_and_a_busy_one_can_be_given_up(tmp_path):
    def busy():
        raise OutputError("busy")

    with (
        files.file_lock(tmp_path / "lock"),
        pytest.raises(OutputError, match="busy"),
        files.file_lock(tmp_path / "lock", on_busy=busy),
    ):
        pass
    with files.file_lock(tmp_path / "lock", on_busy=busy):
        pass


def test_line_ends_are_written_as_they_are(tmp_path):
    files.write_text(tmp_path / "a", "1\r\n2\n")
    assert (tmp_path / "a").read_bytes() == b"1\r\n2\n"


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        files.write_text(tmp_path / "file" / "a.txt", "x")


def test_json_is_readable_and_refuses_nan(tmp_path):
    files.write_json(tmp_path / "a.json", {"é": [1, 2.5]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"é": [1, 2.5]}
    assert "é" in text
    assert text.endswith("\n")
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "b.json", float("nan"))
    assert names(tmp_path) == ["a.json"]


def test_sha256_is_that_of_the_bytes(tmp_path):
    content = os.urandom(3_000_000)
    (tmp_path / "a").write_bytes(content)
    assert files.sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_free_space_is_that_of_the_nearest_folder_that_exists(tmp_path, monkeypatch):
    seen = []
    real = files.shutil.disk_usage
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: seen.append(path) or real(path))
    assert files.free_bytes(tmp_path / "not" / "made" / "yet") > 0
    monkeypatch.chdir(tmp_path)
    assert files.free_bytes("not/made") > 0
    assert seen == [tmp_path, tmp_path]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_in_other_encodings_is_refused(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("hello\n".encode(encoding))
    with pytest.raises(DataError, match=r"a\.txt.*UTF-8"):
        files.read_text(tmp_path / "a.txt")
