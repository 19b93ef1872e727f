"""What the hub refuses is one clear line, and the token that was sent stands nowhere."""

from __future__ import annotations

import logging
import traceback

import pytest
import torch

from sigmix.errors import ConfigError, HubError, SigmixError
from sigmix.experts.bank import Bank
from sigmix.experts.expert import Expert

pytest_plugins = ["helpers_hub"]
SLUG = "user/skills-0123456789abcdef01234567"
# not the client's own protocol log: it has all that a server sends, and a server may send back the token
LOGS = ("sigmix", "huggingface_hub", "httpx", "httpx2", "filelock")


def made() -> Expert:
    return Expert("sums", {"layers.0.q": torch.tensor([0.5, 1.5])}, {"domain": "arithmetic"})


@pytest.fixture
def watched(hub, tmp_path, caplog, capfd):
    """Run something with a token; give its result or its error, after looking for the token everywhere."""
    for name in LOGS:
        caplog.set_level(logging.DEBUG, logger=name)

    def call(work, *tokens):
        try:
            result = work()
        except SigmixError as error:
            result = error
        words = f"{result} {result!r} {vars(result) if hasattr(result, '__dict__') else ''}"
        if isinstance(result, SigmixError):
            words += "".join(traceback.format_exception(result))  # the chain of causes too
            assert "\n" not in str(result)
            assert result.remedy
        words += caplog.text + "".join(capfd.readouterr())
        seen = [path for path in tmp_path.rglob("*") if path.is_file()]
        for token in tokens:
            assert token not in words
            assert not [path for path in seen if token.encode() in path.read_bytes() or token in str(path)]
            pushed = [files for repo in hub.repos.values() for files in repo.commits.values()]
            assert not any(token.encode() in content for files in pushed for content in files.values())
        return result

    return call


def test_what_works_leaves_no_token_behind(hub, watched):
    token = hub.writer
    watched(lambda: made().push_to_hub("user/sums", token=token, private=True), token)
    expert = watched(lambda: Expert.from_pretrained("user/sums", token=token), token)
    assert expert == made()
    hub.collect(SLUG, "user/sums")
    assert watched(lambda: Bank.from_hub(SLUG, token=token), token).names() == ["sums"]


@pytest.mark.parametrize(
    "place, status, remedy",
    [
        ("repos/create", 401, "run: hf auth login"),
        ("repos/create", 403, "run: hf auth login, with a token from .*settings/tokens"),
        ("repos/create", 404, "check the name"),
        ("validate-yaml", 400, "run it again"),
        ("commit", 409, "run it again"),
        ("commit", 500, "run it again"),
        ("lfs/objects", 403, "run: hf auth login"),
        ("PUT /lfs", 403, "run: hf auth login"),
    ],
)
def test_refused_pushes(hub, watched, place, status, remedy):
    for echo in (False, True):  # a bad proxy may send back what it was sent
        hub.failures.clear()
        hub.fail(place, status, echo)
        error = watched(lambda: made().push_to_hub("user/sums", token=hub.writer), hub.writer)
        assert isinstance(error, HubError)
        with pytest.raises(HubError, match=f"'user/sums'.* -> .*{remedy}"):
            raise error
    repo = hub.repos.get("user/sums")
    assert repo is None or set(repo.commits[repo.at("main")]) == {".gitattributes"}


@pytest.mark.parametrize(
    "status, remedy",
    [
        (401, "run: hf auth login"),
        (403, "run: hf auth login"),
        (404, "check the name"),
        (429, "run it again in a few minutes"),
        (500, "run it again"),
    ],
)
def test_refused_loads(hub, watched, status, remedy):
    hub.fail("api/models", status, echo=True)
    error = watched(lambda: Expert.from_pretrained("user/sums", token=hub.reader), hub.reader)
    assert isinstance(error, HubError)
    with pytest.raises(HubError, match=f"'user/sums'.* -> .*{remedy}"):
        raise error


def test_no_hub_at_all(hub, watched):
    hub.close()
    for work in (
        lambda: made().push_to_hub("user/sums", token=hub.writer),
        lambda: Expert.from_pretrained("user/sums", token=hub.writer),
        lambda: Bank.from_hub(SLUG, token=hub.writer),
    ):
        error = watched(work, hub.writer)
        assert isinstance(error, HubError)


def test_who_may_what(hub, watched):
    error = watched(lambda: made().push_to_hub("user/sums", token=hub.reader), hub.reader)
    assert "hf auth login" in error.remedy
    error = watched(lambda: made().push_to_hub("somebody/sums", token=hub.writer), hub.writer)
    assert "'somebody/sums'" in error.message
    assert "hf auth login" in error.remedy
    unknown = hub.writer.upper()
    error = watched(lambda: made().push_to_hub("user/sums", token=unknown), unknown)
    assert "hf auth login" in error.remedy
    error = watched(lambda: made().push_to_hub("user/sums"))
    assert "hf auth login" in error.remedy
    assert not hub.repos


@pytest.mark.parametrize("token", ["hf_secret\nSecretToo", "hf_secret tail", "hf_secrét", "hf_secret\x00"])
def test_a_token_that_cannot_be_one_is_refused_unseen(hub, watched, monkeypatch, token):
    for work in (
        lambda: made().push_to_hub("user/sums", token=token),
        lambda: Expert.from_pretrained("user/sums", token=token),
        lambda: Bank.from_hub(SLUG, token=token),
    ):
        error = watched(work, token, "secr")
        assert isinstance(error, ConfigError)
        assert "hf auth login" in error.remedy
    assert not hub.requests


def test_a_token_with_a_line_end_from_a_file_is_fine(hub, watched):
    watched(lambda: made().push_to_hub("user/sums", token=hub.writer + "\n"), hub.writer)
    assert "user/sums" in hub.repos


def test_no_token_is_sent_where_the_library_is_told_not_to(hub, monkeypatch):
    from huggingface_hub import constants

    made().push_to_hub("user/sums", token=hub.writer, private=True)
    monkeypatch.setenv("HF_TOKEN", hub.reader)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    with pytest.raises(HubError, match="'user/sums'"):
        Expert.from_pretrained("user/sums")


@pytest.mark.parametrize("work", ["push", "load"])
def test_an_error_that_is_not_the_hubs_is_told_without_the_token(hub, watched, monkeypatch, work):
    def echo(*_, **__):
        raise ZeroDivisionError(f"the proxy was sent Bearer {hub.writer}")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", echo)
    monkeypatch.setattr("huggingface_hub.snapshot_download", echo)
    tasks = {
        "push": lambda: made().push_to_hub("user/sums", token=hub.writer),
        "load": lambda: Expert.from_pretrained("user/sums", token=hub.writer),
    }
    error = watched(tasks[work], hub.writer)
    assert isinstance(error, HubError)
    assert "sent Bearer <token>" in str(error)
