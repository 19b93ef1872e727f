"""Bases from the hub, which is replaced by a stand-in: what each of its refusals says."""

from __future__ import annotations

import errno
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from sigmix import hub
from sigmix.errors import BaseModelError
from sigmix.models import load_base


def hub_answers(monkeypatch, error):
    def answer(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)


def refused(kind, status):
    # a stand-in: the class of real responses depends on the version of huggingface_hub
    return kind("refused", response=Mock(status_code=status, headers={}))


def test_a_gated_model_says_where_to_accept_and_how_to_log_in(monkeypatch):
    hub_answers(monkeypatch, refused(hub_errors.GatedRepoError, 403))
    with pytest.raises(BaseModelError, match="gated.*https://huggingface.co/org/model, then run: hf auth login"):
        load_base("org/model")


def test_a_model_that_the_hub_does_not_have(monkeypatch, model_folder):
    hub_answers(monkeypatch, refused(hub_errors.RepositoryNotFoundError, 404))
    monkeypatch.chdir(model_folder.parent)
    with pytest.raises(BaseModelError, match="no public hub model 'tiny-lama'; nearest: tiny-llama"):
        load_base("tiny-lama")
    with pytest.raises(BaseModelError, match="did you mean 'smollm2-135m'"):
        load_base("smollm-135m")


def test_a_revision_that_the_hub_does_not_have(monkeypatch):
    hub_answers(monkeypatch, refused(hub_errors.RevisionNotFoundError, 404))
    with pytest.raises(BaseModelError, match="no revision 'v9'"):
        load_base("org/model", revision="v9")


def test_no_network_is_named(monkeypatch):
    hub_answers(monkeypatch, hub_errors.LocalEntryNotFoundError("no connection"))
    monkeypatch.setattr(hub, "offline", lambda: False)
    with pytest.raises(BaseModelError, match="cannot reach the hub for 'org/model'.*check the network"):
        load_base("org/model")


def test_offline_mode_asks_the_network_for_nothing(monkeypatch, tmp_path):
    asked = {}

    def answer(*_, **options):
        asked.update(options)
        raise hub_errors.LocalEntryNotFoundError("not cached")

    monkeypatch.setenv("SIGMIX_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    with pytest.raises(BaseModelError, match="offline mode is set.*unset SIGMIX_OFFLINE"):
        load_base("org/model")
    assert asked["local_files_only"] is True


def test_a_full_disk_under_the_hubs_cache_is_named(monkeypatch):
    hub_answers(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(BaseModelError, match="the disk is full.*HF_HOME"):
        load_base("org/model")


def test_a_cache_that_cannot_be_written_is_named(monkeypatch):
    hub_answers(monkeypatch, PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(BaseModelError, match="cannot be written to the hub's cache .*Permission denied.*HF_HOME"):
        load_base("org/model")


def test_a_hub_model_loads_from_its_snapshot(monkeypatch, model_folder):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(model_folder))
    model, _ = load_base("org/model")
    assert model.sigmix_base == {"name": "org/model", "source": str(model_folder), "kind": "hub"}
