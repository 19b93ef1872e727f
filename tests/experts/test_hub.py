"""Experts on a local stand-in for the hub: push, load, collections as banks, errors, tokens, public metadata."""

from __future__ import annotations

import json
import logging
import re
import traceback
from pathlib import Path

import pytest
import torch

from sigmix.errors import ConfigError, ExpertError, HubError, OutputError, SigmixError
from sigmix.experts import hub as module
from sigmix.experts.bank import Bank
from sigmix.experts.expert import Expert
from sigmix.experts.hub import public_metadata

pytest_plugins = ["helpers_hub"]
Z = {"layers.0.q": torch.tensor([0.5, 1.5]), "layers.1.q": torch.tensor([1.0, 0.25])}
META = {
    "base": {"name": "Qwen/Qwen3-0.6B", "dtype": "float32"}, "domain": "arithmetic", "license": "Apache-2.0",
    "task": "addition", "metrics": [{"name": "test accuracy", "value": 0.61, "n": 500, "interval": [0.57, 0.65]}],
}  # fmt: skip
OURS = {"adapter_config.json", "adapter_model.safetensors", "sigmix.json", "README.md"}
SLUG = "user/skills-0123456789abcdef01234567"
# not the client's own protocol log: it has all that a server sends, and a server may send back the token
LOGS = ("sigmix", "huggingface_hub", "httpx", "httpx2", "filelock")


def new_expert(name: str = "sums", **meta) -> Expert:
    return Expert(name, Z, {**META, **meta})


def files(tmp_path, name: str = "sums", **meta) -> dict[str, bytes]:
    folder = new_expert(name, **meta).save_pretrained(tmp_path / "made" / name)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def collection(hub, tmp_path):
    """Two experts of different people, their base, and a data set."""
    hub.add("alice/sums", files(tmp_path, "sums"))
    hub.add("bob/reading-v2", files(tmp_path, "reading", domain="reading"))
    hub.add("org/base", {"config.json": b"{}", "model.safetensors": b"large", "README.md": b"# base"})
    return hub.collect(SLUG, "org/base", "alice/sums", "dataset:alice/rows", "bob/reading-v2")


# --- pushing and loading


def test_what_is_pushed_is_loaded_again(hub):
    expert = new_expert()
    assert expert.push_to_hub("user/sums", token=hub.writer) == f"{hub.url}/user/sums"
    assert set(hub.files("user/sums")) == {".gitattributes", *OURS}
    again = Expert.from_pretrained("user/sums")
    assert again == expert
    assert again.digest == expert.digest
    assert again.origin == f"user/sums@{hub.repos['user/sums'].branches['main']}"
    assert expert.origin is None
    assert again.with_meta(domain="other").origin is None


def test_a_push_is_one_commit_and_none_if_nothing_changed(hub):
    new_expert().push_to_hub("user/sums", token=hub.writer)
    new_expert().push_to_hub("user/sums", token=hub.writer)
    assert hub.repos["user/sums"].messages == ["initial commit", "Expert sums"]
    new_expert(domain="numbers").push_to_hub("user/sums", token=hub.writer, commit_message="another domain")
    assert hub.repos["user/sums"].messages[2:] == ["another domain"]
    assert Expert.from_pretrained("user/sums").meta["domain"] == "numbers"


def test_branches_and_commits(hub):
    new_expert().push_to_hub("user/sums", token=hub.writer)
    first = hub.repos["user/sums"].branches["main"]
    new_expert(domain="numbers").push_to_hub("user/sums", token=hub.writer, revision="v2")
    assert Expert.from_pretrained("user/sums").meta["domain"] == "arithmetic"
    assert Expert.from_pretrained("user/sums", revision="v2").meta["domain"] == "numbers"
    new_expert(domain="later").push_to_hub("user/sums", token=hub.writer)
    assert Expert.from_pretrained("user/sums", revision=first).meta["domain"] == "arithmetic"
    with pytest.raises(HubError, match="'user/sums'.*v3.*user/sums/commits"):
        Expert.from_pretrained("user/sums", revision="v3")


def test_a_private_expert_is_seen_by_its_owner_only(hub, monkeypatch):
    new_expert().push_to_hub("user/sums", token=hub.writer, private=True)
    assert hub.repos["user/sums"].private
    with pytest.raises(HubError, match="'user/sums'.*run: hf auth login"):
        Expert.from_pretrained("user/sums")
    assert Expert.from_pretrained("user/sums", token=hub.reader) == new_expert()
    monkeypatch.setenv("HF_TOKEN", hub.reader)
    assert Expert.from_pretrained("user/sums") == new_expert()


def test_nothing_private_is_pushed_to_a_public_model(hub):
    new_expert().push_to_hub("user/sums", token=hub.writer)
    with pytest.raises(OutputError, match="'user/sums'.*public"):
        new_expert(domain="secret").push_to_hub("user/sums", token=hub.writer, private=True)
    assert not any(b"secret" in content for content in hub.files("user/sums").values())


@pytest.mark.parametrize(
    "there, names",
    [
        ({"model.safetensors": b"x", "README.md": b"# mine"}, "model.safetensors"),
        ({"adapter_config.json": b'{"peft_type": "LORA"}', "README.md": b"# mine"}, "another adapter"),
    ],
)
def test_a_model_that_is_something_else_is_left_alone(hub, there, names):
    hub.add("user/model", there)
    with pytest.raises(OutputError, match=f"'user/model'.*{names}"):
        new_expert().push_to_hub("user/model", token=hub.writer)
    assert hub.files("user/model")["README.md"] == b"# mine"


def test_what_is_refused_leaves_no_branch(hub):
    hub.add("user/model", {"pytorch_model.bin": b"x"})
    with pytest.raises(OutputError, match="pytorch_model.bin"):
        new_expert().push_to_hub("user/model", token=hub.writer, revision="v2")
    assert set(hub.repos["user/model"].branches) == {"main"}


@pytest.mark.parametrize("revision", [None, "v2"])
def test_a_commit_in_between_is_not_overwritten(hub, monkeypatch, revision):
    new_expert().push_to_hub("user/sums", token=hub.writer)
    new_expert().push_to_hub("user/sums", token=hub.writer, revision=revision)
    checked = module._check_files

    def late(repo, there):
        checked(repo, there)
        hub.repos[repo].commit({"README.md": b"# theirs"}, revision or "main")

    monkeypatch.setattr(module, "_check_files", late)
    with pytest.raises(HubError, match="'user/sums'.* -> run it again"):
        new_expert(domain="numbers").push_to_hub("user/sums", token=hub.writer, revision=revision)
    assert hub.files("user/sums", revision or "main")["README.md"] == b"# theirs"


def test_no_path_of_this_machine_is_pushed(hub, tmp_path):
    home = f"{Path.home()}/my data"
    expert = new_expert(
        base={"name": "/srv/alice/models/tiny", "dtype": "float32", "fingerprint": "ab" * 32},
        task="/srv/alice/tasks/mine.py:riddles?rows=/srv/alice/rows.jsonl",
        description="Rows of ~/alice/rows.jsonl; see https://example.org/a/b and x/y.",
        training={"out": [home, "C:\\Users\\alice\\run"], "schedule": "cosine"},
    )
    expert.push_to_hub("user/sums", token=hub.writer)
    for file, content in hub.files("user/sums").items():
        for private in (b"/srv", b"alice", home.encode(), b"C:"):
            assert private not in content, file
    again = Expert.from_pretrained("user/sums")
    assert again.meta["base"] == {"name": "tiny", "dtype": "float32", "fingerprint": "ab" * 32}
    assert again.meta["task"] == "mine.py:riddles?rows=rows.jsonl"
    assert again.meta["description"] == "Rows of rows.jsonl; see https://example.org/a/b and x/y."
    assert again.digest == expert.digest
    assert b"base_model:" not in hub.files("user/sums")["README.md"]


def test_the_pushed_card_loads_the_expert_from_where_it_is(hub):
    new_expert().push_to_hub("user/sums", token=hub.writer)
    assert 'bank=Bank("user/sums")' in hub.files("user/sums")["README.md"].decode()
    assert Bank("user/sums")["sums"] == new_expert()


# --- what a name means


def test_a_folder_that_exists_wins(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new_expert(domain="local").save_pretrained(tmp_path / "user" / "sums")
    hub.add("user/sums", files(tmp_path))
    assert Expert.from_pretrained("user/sums").meta["domain"] == "local"
    assert Bank("user").names() == ["sums"]
    assert not hub.requests
    with pytest.raises(ConfigError, match="'user/sums'.*'v2'"):
        Expert.from_pretrained("user/sums", revision="v2")


def test_a_name_that_is_neither_folder_nor_model(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new_expert().save_pretrained(tmp_path / "bank" / "sums")
    with pytest.raises(HubError, match="'bank/sum'.*nearest: bank/sums"):
        Expert.from_pretrained("bank/sum")
    for name in ("sums", "a/b/c", "./bank/sum", "../x", "user/", "user/..", "", "user/sums\n", "usér/sums"):
        with pytest.raises((ExpertError, HubError)) as caught:
            Expert.from_pretrained(name)
        assert caught.value.remedy
    asked = [path for _, path, _ in hub.requests if "/models/" in path]
    assert {path.removesuffix("/revision/main") for path in asked} == {"/api/models/bank/sum"}


@pytest.mark.parametrize("repo", ["sums", "a/b/c", "/user/sums", "user/", "", "user/sums?x"])
def test_a_name_that_nothing_can_be_pushed_to(hub, repo):
    with pytest.raises(ConfigError, match=re.escape(repr(repo))):
        new_expert().push_to_hub(repo, token=hub.writer)
    assert not hub.requests


# --- what is fetched


def test_only_an_experts_own_files_are_fetched(hub, tmp_path):
    others = ("adapter_model.bin", "training_args.bin", "run.py", "checkpoint/adapter_config.json")
    hub.add("user/sums", {**files(tmp_path), **dict.fromkeys(others, b"x")})
    Expert.from_pretrained("user/sums")
    asked = {path.split("/")[-1] for _, path, _ in hub.requests if "/resolve/" in path}
    assert asked == OURS


def test_models_that_are_no_experts(hub, tmp_path):
    hub.add("org/base", {"config.json": b"{}", "model.safetensors": b"large", "README.md": b"# base"})
    with pytest.raises(ExpertError, match="'org/base'.*adapter_config.json"):
        Expert.from_pretrained("org/base")
    hub.add("org/lora", {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"large"})
    with pytest.raises(ExpertError, match="'org/lora'.*LORA.*SVF"):
        Expert.from_pretrained("org/lora")
    assert not [path for _, path, _ in hub.requests if path.endswith(".safetensors")]
    pickled = files(tmp_path)
    pickled["adapter_model.bin"] = pickled.pop("adapter_model.safetensors")
    hub.add("org/pickled", pickled)
    with pytest.raises(ExpertError, match="'org/pickled'.*adapter_model.safetensors"):
        Expert.from_pretrained("org/pickled")


def test_what_is_wrong_with_the_files_is_said_of_the_model(hub, tmp_path):
    broken = files(tmp_path)
    hub.add("user/cut", {**broken, "adapter_model.safetensors": broken["adapter_model.safetensors"][:40]})
    with pytest.raises(ExpertError, match="'user/cut': .*adapter_model.safetensors"):
        Expert.from_pretrained("user/cut")
    edited = broken["sigmix.json"].replace(b'"z_sha256": "', b'"z_sha256": "0')
    hub.add("user/edited", {**broken, "sigmix.json": edited})
    with pytest.raises(ExpertError, match="'user/edited': .*checksum"):
        Expert.from_pretrained("user/edited")


def test_an_adapter_that_peft_saved_is_named_after_the_model(hub, tmp_path):
    plain = files(tmp_path)
    del plain["sigmix.json"]
    hub.add("user/My_Run.3", plain)
    expert = Expert.from_pretrained("user/My_Run.3")
    assert expert.name == "my_run.3"
    assert not expert.verified
    assert Bank("user/My_Run.3").names() == ["my_run.3"]


# --- without the hub


def test_offline_the_cache_is_used(hub, monkeypatch):
    new_expert().push_to_hub("user/sums", token=hub.writer)
    Expert.from_pretrained("user/sums")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = len(hub.requests)
    assert Expert.from_pretrained("user/sums") == new_expert()
    with pytest.raises(HubError, match="'user/other'.*unset SIGMIX_OFFLINE and HF_HUB_OFFLINE"):
        Expert.from_pretrained("user/other")
    with pytest.raises(HubError, match="'user/sums'.*unset SIGMIX_OFFLINE and HF_HUB_OFFLINE"):
        new_expert().push_to_hub("user/sums", token=hub.writer)
    assert len(hub.requests) == before


def test_without_a_network_the_cache_is_used(hub):
    new_expert().push_to_hub("user/sums", token=hub.writer)
    Expert.from_pretrained("user/sums")
    hub.close()
    assert Expert.from_pretrained("user/sums") == new_expert()
    with pytest.raises(HubError, match="'user/other'.*check the network"):
        Expert.from_pretrained("user/other")


# --- banks


@pytest.mark.parametrize("opened", [Bank, Bank.from_hub])
def test_a_bank_over_a_collection(hub, collection, tmp_path, opened):
    bank = opened(collection)
    assert bank.names() == ["reading", "sums"]
    assert bank["sums"] == new_expert("sums")
    assert bank["sums"].origin == f"alice/sums@{hub.repos['alice/sums'].branches['main']}"
    assert {name: bank[name].meta["domain"] for name in bank} == {"sums": "arithmetic", "reading": "reading"}
    assert collection in repr(bank)
    assert Bank(bank.folder).names() == bank.names()  # as whoever needs a folder sees it
    assert not [path for _, path, _ in hub.requests if path.endswith("model.safetensors") and "org/base" in path]
    with pytest.raises(OutputError, match=f"{collection}.*'new'"):
        bank.add(new_expert("new"))


def test_a_gated_base_in_a_collection_is_left_out_like_any_other(hub, collection, tmp_path):
    hub.repos["org/base"].gated = True
    assert Bank(collection).names() == ["reading", "sums"]
    with pytest.raises(ExpertError, match="'org/base'"):
        Expert.from_pretrained("org/base")
    hub.add("dora/more", files(tmp_path, "more")).gated = True  # it is an expert, and not left out in silence
    hub.collect(collection, "org/base", "alice/sums", "dora/more")
    with pytest.raises(HubError, match="'dora/more'.*accept its terms"):
        Bank(collection)


def test_a_file_that_no_expert_has_is_not_fetched(hub, tmp_path, monkeypatch):
    hub.add("alice/sums", files(tmp_path, "sums"))
    monkeypatch.setattr(module, "MAX_BYTES", 5)
    with pytest.raises(ExpertError, match="'alice/sums'.* GB.* -> .*hf download"):
        Expert.from_pretrained("alice/sums")
    assert not [path for _, path, _ in hub.requests if "/resolve/" in path]


def test_a_bank_stays_what_it_was_and_a_new_one_is_what_the_collection_is_now(hub, collection, tmp_path):
    old = Bank(collection)
    hub.repos["alice/sums"].commit(files(tmp_path, "sums", domain="later"))
    hub.add("carol/more", files(tmp_path, "more"))
    hub.collect(collection, "alice/sums", "carol/more")
    old.refresh()
    assert old.names() == ["reading", "sums"]
    assert old["sums"].meta["domain"] == "arithmetic"
    new = Bank(collection)
    assert new.names() == ["more", "sums"]
    assert new["sums"].meta["domain"] == "later"


def test_a_bank_of_models_by_name(hub, collection, monkeypatch):
    bank = Bank.from_hub(["bob/reading-v2", "alice/sums", "bob/reading-v2"])
    assert bank.names() == ["reading", "sums"]
    with pytest.raises(OutputError, match="bob/reading-v2, alice/sums"):
        bank.add(new_expert("new"))
    monkeypatch.setenv("SIGMIX_OFFLINE", "1")
    assert Bank.from_hub(["alice/sums", "bob/reading-v2"]).names() == ["reading", "sums"]
    monkeypatch.delenv("SIGMIX_OFFLINE")
    with pytest.raises(ExpertError, match="'org/base'"):
        Bank.from_hub(["alice/sums", "org/base"])
    with pytest.raises(ConfigError, match="user/dates"):
        Bank.from_hub([])


@pytest.mark.parametrize("away", ["offline", "no network", "status 500"])
def test_without_the_hub_a_collection_is_what_it_was_last(hub, collection, monkeypatch, away):
    Bank(collection)
    if away == "offline":
        monkeypatch.setenv("SIGMIX_OFFLINE", "1")
    elif away == "no network":
        hub.close()
    else:
        hub.fail(".", 500)
    assert Bank(collection)["sums"] == new_expert("sums")
    with pytest.raises(HubError, match=collection[:-1] + "0"):
        Bank(collection[:-1] + "0")


def test_collections_that_cannot_be_a_bank(hub, collection, tmp_path):
    hub.add("carol/sums", files(tmp_path, "sums", domain="other"))
    hub.collect(SLUG, "alice/sums", "carol/sums")
    with pytest.raises(ExpertError, match="'sums': alice/sums and carol/sums -> .*from_hub"):
        Bank(SLUG)
    hub.collect(SLUG, "org/base")
    with pytest.raises(ExpertError, match="hf collections add-item"):
        Bank(SLUG)
    with pytest.raises(HubError, match=f"{SLUG[:-1]}0"):
        Bank(SLUG[:-1] + "0")
    hub.add("dora/sums", files(tmp_path)).gated = True
    hub.collect(SLUG, "dora/sums")
    with pytest.raises(HubError, match=f"'dora/sums'.*accept its terms at {hub.url}/dora/sums"):
        Bank(SLUG)
    with pytest.raises(ConfigError, match="'skills'"):
        Bank.from_hub("skills")


def test_a_bank_notes_where_its_experts_are_from(hub, collection):
    bank = Bank(collection)
    noted = json.loads((bank.folder / ".sigmix-hub.json").read_text())
    assert noted["source"] == collection
    assert noted["experts"]["reading"]["repo"] == "bob/reading-v2"


# --- refusals and tokens


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
    watched(lambda: new_expert().push_to_hub("user/sums", token=token, private=True), token)
    expert = watched(lambda: Expert.from_pretrained("user/sums", token=token), token)
    assert expert == new_expert()
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
        error = watched(lambda: new_expert().push_to_hub("user/sums", token=hub.writer), hub.writer)
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
        lambda: new_expert().push_to_hub("user/sums", token=hub.writer),
        lambda: Expert.from_pretrained("user/sums", token=hub.writer),
        lambda: Bank.from_hub(SLUG, token=hub.writer),
    ):
        error = watched(work, hub.writer)
        assert isinstance(error, HubError)


def test_who_may_what(hub, watched):
    error = watched(lambda: new_expert().push_to_hub("user/sums", token=hub.reader), hub.reader)
    assert "hf auth login" in error.remedy
    error = watched(lambda: new_expert().push_to_hub("somebody/sums", token=hub.writer), hub.writer)
    assert "'somebody/sums'" in error.message
    assert "hf auth login" in error.remedy
    unknown = hub.writer.upper()
    error = watched(lambda: new_expert().push_to_hub("user/sums", token=unknown), unknown)
    assert "hf auth login" in error.remedy
    error = watched(lambda: new_expert().push_to_hub("user/sums"))
    assert "hf auth login" in error.remedy
    assert not hub.repos


@pytest.mark.parametrize("token", ["hf_secret\nSecretToo", "hf_secret tail", "hf_secrét", "hf_secret\x00"])
def test_a_token_that_cannot_be_one_is_refused_unseen(hub, watched, monkeypatch, token):
    for work in (
        lambda: new_expert().push_to_hub("user/sums", token=token),
        lambda: Expert.from_pretrained("user/sums", token=token),
        lambda: Bank.from_hub(SLUG, token=token),
    ):
        error = watched(work, token, "secr")
        assert isinstance(error, ConfigError)
        assert "hf auth login" in error.remedy
    assert not hub.requests


def test_a_token_with_a_line_end_from_a_file_is_fine(hub, watched):
    watched(lambda: new_expert().push_to_hub("user/sums", token=hub.writer + "\n"), hub.writer)
    assert "user/sums" in hub.repos


def test_no_token_is_sent_where_implicit_tokens_are_disabled(hub, monkeypatch):
    from huggingface_hub import constants

    new_expert().push_to_hub("user/sums", token=hub.writer, private=True)
    monkeypatch.setenv("HF_TOKEN", hub.reader)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    with pytest.raises(HubError, match="'user/sums'"):
        Expert.from_pretrained("user/sums")


@pytest.mark.parametrize("work", ["push", "load"])
def test_an_error_that_is_not_the_hubs_hides_the_token(hub, watched, monkeypatch, work):
    def echo(*_, **__):
        raise ZeroDivisionError(f"the proxy was sent Bearer {hub.writer}")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", echo)
    monkeypatch.setattr("huggingface_hub.snapshot_download", echo)
    tasks = {
        "push": lambda: new_expert().push_to_hub("user/sums", token=hub.writer),
        "load": lambda: Expert.from_pretrained("user/sums", token=hub.writer),
    }
    error = watched(tasks[work], hub.writer)
    assert isinstance(error, HubError)
    assert "sent Bearer <token>" in str(error)


# --- public metadata


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
