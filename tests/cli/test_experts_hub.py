"""`sigmix experts push | pull`, and collections where a bank is asked for; the hub is a local stand-in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sigmix

pytest_plugins = ["helpers_cli", "helpers_hub"]
SLUG = "user/skills-0123456789abcdef01234567"


@pytest.fixture
def online(run, hub, home, tmp_path, monkeypatch):
    """Run with the stand-in, as its user, on a copy of the cache."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", hub.writer)
    shutil.copytree(home.cache, tmp_path / "sigmix-cache")
    monkeypatch.setenv("SIGMIX_CACHE", str(tmp_path / "sigmix-cache"))

    def call(*arguments):
        done = run(*arguments)
        assert hub.writer not in done.out + "".join(done.err)
        return done

    return call


def test_push_and_pull(online, hub, home, tmp_path):
    figures = online("experts", "push", "arithmetic", "user/sums", "--bank", home.bank, "--json").json
    assert figures["url"] == f"{hub.url}/user/sums"
    assert figures["revision"] == hub.repos["user/sums"].branches["main"]
    assert figures["changed"]
    assert "unchanged" in online("experts", "push", home.bank / "arithmetic", "user/sums").out
    rows = online("experts", "pull", "user/sums", "--out", tmp_path / "sums", "--json").json["experts"]
    assert rows == [
        {"name": "arithmetic", "repo": "user/sums", "revision": figures["revision"], "path": str(tmp_path / "sums")}
    ]
    assert str(home.base) not in (tmp_path / "sums" / "sigmix.json").read_text()
    assert online("experts", "verify", tmp_path / "sums", "--base", home.base, "--json").json["ok"]
    shown = online("experts", "show", "user/sums", "--json").json
    assert shown["origin"] == f"user/sums@{figures['revision']}"
    assert online("experts", "verify", "user/sums", "--base", home.base, "--json").json["verified"]
    assert online("experts", "diff", "user/sums", home.bank / "arithmetic", "--json").json["identical"]


def test_a_private_branch(online, hub, home):
    online("experts", "push", "reading", "user/words", "--bank", home.bank, "--private", "--revision", "v2")
    assert hub.repos["user/words"].private
    assert set(hub.files("user/words")) == {".gitattributes"}
    assert "sigmix.json" in hub.files("user/words", "v2")


def test_a_collection_is_a_bank_everywhere(online, hub, home, tmp_path, monkeypatch):
    for name in ("arithmetic", "reading"):
        online("experts", "push", name, f"user/{name}", "--bank", home.bank)
    hub.collect(SLUG, "user/arithmetic", "user/reading")
    listed = online("experts", "list", "--bank", SLUG, "--json").json
    assert listed["bank"] == SLUG
    assert [row["name"] for row in listed["experts"]] == ["arithmetic", "reading"]
    ask = ("generate", "hi", "--mix", "arithmetic:.5+reading:.5", "--base", home.base, "--max-new-tokens", 4, "--json")
    there, here = (online(*ask, "--bank", bank).json for bank in (SLUG, home.bank))
    assert there == here
    assert len(online("cache", "list", "--kind", "banks", "--json").json["entries"]) == 1
    monkeypatch.chdir(tmp_path)
    rows = online("experts", "pull", SLUG, "--json").json
    assert rows["out"] == SLUG.split("/")[1]
    pulled = tmp_path / rows["out"]
    assert {path.name for path in pulled.iterdir()} == {"arithmetic", "reading"}
    assert [row["name"] for row in online("experts", "list", "--bank", pulled, "--json").json["experts"]] == [
        "arithmetic", "reading",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["push", "arithmetic", "sums"], "'sums'"),
        (["push", "arithmetc", "user/sums"], "nearest: arithmetic"),
        (["push", "arithmetic", "somebody/sums"], "'somebody/sums'"),
        (["push", "arithmetic"], "Missing argument"),
        (["pull", "user/nothing"], "'user/nothing'"),
        (["pull", "nothing"], "'nothing'"),
        (["pull", SLUG], "user/skills-0123456789abcdef01234567"),
        (["pull", SLUG, "--revision", "v2"], "is a collection, which has no revisions"),
        (["show", "user/nothing"], "'user/nothing'"),
        (["verify", "user/nothing", "--seal", "--base", "x"], "sigmix experts pull user/nothing"),
        (["list", "--bank", SLUG], "user/skills-0123456789abcdef01234567"),
    ],
)
def test_bad_input(online, hub, home, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    bank = [] if arguments[0] == "pull" or "--bank" in arguments else ["--bank", home.bank]
    done = online("experts", *arguments, *bank)
    assert done.code == 2
    assert len(done.err) == 1
    assert expected in done.err[0]
    assert "Traceback" not in done.err[0]
    assert not list(tmp_path.glob("[!.hns]*"))  # nothing was written beside the caches


def test_pull_replaces_nothing(online, hub, home, tmp_path):
    online("experts", "push", "arithmetic", "user/sums", "--bank", home.bank)
    (tmp_path / "mine").mkdir()
    done = online("experts", "pull", "user/sums", "--out", tmp_path / "mine")
    assert (done.code, len(done.err)) == (2, 1)
    assert "mine" in done.err[0]
    assert not list((tmp_path / "mine").iterdir())


@pytest.mark.slow
def test_the_hub_is_that_of_the_environment(hub, home, tmp_path):
    """As a user runs it: another process, and nothing set but the environment."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": hub.writer, "HF_HUB_DISABLE_XET": "1",
        "SIGMIX_CACHE": str(home.cache), "PYTHONPATH": str(Path(sigmix.__file__).parents[1]),
    }  # fmt: skip
    command = [sys.executable, "-m", "sigmix", "experts", "push", str(home.bank / "arithmetic"), "user/sums"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"arithmetic is at {hub.url}/user/sums" in done.stdout
    assert "sigmix.json" in hub.files("user/sums")
    assert hub.writer not in done.stdout + done.stderr
