"""The commit that figures name is the checkout's own."""

from __future__ import annotations

import subprocess

from sigmix.evals import accuracy as run


def git(folder, *words):
    command = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.org", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_only_a_checkout_that_tracks_the_code_has_a_commit(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    (tmp_path / "run.py").write_text("")
    (tmp_path / "other.py").write_text("")
    git(tmp_path, "add", "other.py")
    git(tmp_path, "commit", "-qm", "other")
    monkeypatch.setattr(run, "__file__", str(tmp_path / "run.py"))
    assert run.commit() is None  # installed inside somebody else's repository
    git(tmp_path, "add", "run.py")
    git(tmp_path, "commit", "-qm", "run")
    assert run.commit() == git(tmp_path, "rev-parse", "--short", "HEAD")
    (tmp_path / "run.py").write_text("changed")
    assert run.commit().endswith("+")
