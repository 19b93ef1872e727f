"""What an expert's metadata says to the world: no path of anybody's machine, and addresses as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from sigmix.experts.hub import public_metadata


def shown(text: str) -> str:
    return public_metadata({"training": {"out": [text]}})["training"]["out"][0]


@pytest.mark.parametrize(
    "text, left",
    [
        ("/home/alice/x", "x"),
        ("/home/alice/x/", "x"),
        ("C:/Users/alice/x", "x"),
        ("C:\\Users\\alice\\x", "x"),
        ("C:\\\\Users\\\\alice\\\\x", "x"),  # as JSON in text writes it
        ("file:///home/alice/x", "x"),
        ("file:///C:/Users/alice/x", "x"),
        ("file://srv/alice/x", "x"),
        ("sqlite:////home/alice/x.db", "x.db"),
        ("out:/home/alice/x", "out:x"),
        ("--out=/home/alice/x, then", "--out=x, then"),
        ("git@host:/home/alice/x", "git@host:x"),
        ("../../home/alice/x", "x"),
        ("runs/../../alice/x", "x"),
        ("./alice/x", "x"),
        ("~/alice/x", "x"),
        ("\\\\srv\\alice\\x", "x"),
        ("\\\\\\\\srv\\\\alice\\\\x", "x"),
        ("/home/alice", "~"),
        ("/Users/alice/", "~"),
        ("C:\\Users\\alice", "~"),
        ("file:///home/alice", "~"),
        ("../../home/alice", "~"),
        ("in /home/alice and /home/alice/x", "in ~ and x"),
    ],
)
def test_a_path_is_cut_to_its_last_part(text, left):
    assert shown(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "https://host/a/b", "see https://example.org/a/b and x/y.", "http://host:8000/home/alice", "https://[::1]/a/b",
        "https://host/a/../b?x=/c/d", "s3://bucket/a/b", "Qwen/Qwen3-0.6B", "a/b", "rg:chain_sum?n=3", "and/or", "1/2",
        "file.py:riddles", "a: b", "~",
    ],
)  # fmt: skip
def test_addresses_and_names_stay(text):
    assert shown(text) == text


def test_ones_own_home_wherever_it_is(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/srv/people/alice"))
    assert shown("/srv/people/alice") == "~"
    assert shown("in /srv/people/alice/") == "in ~"
    monkeypatch.setattr(Path, "home", lambda: Path("/home/alice smith"))
    assert shown("/home/alice smith/data/x") == "x"
    assert shown("/home/alice smith") == "~"
    monkeypatch.setattr(Path, "home", lambda: Path("/srv/people/alice"))
    assert public_metadata({"base": {"name": "/srv/people/alice", "dtype": "float32"}})["base"]["name"] == "~"
    assert public_metadata({"base": {"name": "/srv/people/alice/tiny"}})["base"]["name"] == "tiny"
