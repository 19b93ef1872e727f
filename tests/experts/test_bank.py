"""A bank is a folder of experts that load on first use."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers_experts import adapted
from helpers_tiny import build_tiny

from sigmix.errors import ExpertError, OutputError, UnknownNameError
from sigmix.experts import bank as module
from sigmix.experts.bank import Bank
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix

pytestmark = pytest.mark.usefixtures("cache")
Z = {"layers.0.q": torch.tensor([0.5, 1.5])}


def simple(name: str, **meta) -> Expert:
    return Expert(name, Z, meta)


@pytest.fixture
def folder(tmp_path):
    for name, domain in (("sums", "arithmetic"), ("products", "arithmetic"), ("reading", None)):
        simple(name, **({"domain": domain} if domain else {})).save_pretrained(tmp_path / "bank" / name)
    return tmp_path / "bank"


def test_names_lookup_and_iteration(folder):
    bank = Bank(folder)
    assert bank.names() == list(bank) == ["products", "reading", "sums"]
    assert len(bank) == 3
    assert "sums" in bank
    assert "nothing" not in bank
    assert 3 not in bank
    assert bank["sums"] == simple("sums", domain="arithmetic")
    assert bank["sums"] is bank["sums"]
    assert bank.get("nothing") is None
    assert bank.get("nothing", 3) == 3
    with pytest.raises(KeyError):
        bank["nothing"]
    assert [expert.name for expert in bank.values()] == bank.names()
    assert "products, reading, sums" in repr(bank)


def test_looking_at_names_loads_nothing(folder):
    (folder / "sums" / "adapter_model.safetensors").write_bytes(b"")
    bank = Bank(folder)
    assert "sums" in bank
    assert bank == bank
    assert bank["reading"].name == "reading"
    with pytest.raises(ExpertError, match="adapter_model.safetensors"):
        bank["sums"]


def test_only_adapter_folders_count(folder):
    (folder / "notes").mkdir()
    (folder / "notes" / "README.md").write_text("x")
    (folder / "adapter_config.json").write_text("{}")
    shutil.copytree(folder / "sums", folder / ".sums.old")  # what an interrupted save may leave
    assert Bank(folder).names() == ["products", "reading", "sums"]


def test_an_unknown_name_lists_the_nearest(folder):
    with pytest.raises(UnknownNameError, match="'sum'.* sums -> .*sigmix experts list"):
        Bank(folder)["sum"]


def test_no_folder(tmp_path):
    with pytest.raises(ExpertError, match="none"):
        Bank(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(ExpertError, match="file"):
        Bank(tmp_path / "file", create=True)


def test_an_empty_bank(tmp_path):
    bank = Bank(tmp_path / "new", create=True)
    assert bank.names() == []
    assert len(bank) == 0
    assert Mix.base().z(bank, {"a": 3})["a"].tolist() == [1, 1, 1]
    with pytest.raises(UnknownNameError, match="'a'"):
        bank["a"]


def test_adding(folder):
    bank = Bank(folder)
    expert = simple("code", domain="code")
    assert bank.add(expert) == folder / "code"
    assert bank["code"] is expert
    assert Bank(folder)["code"] == expert
    assert bank.names() == sorted(bank.names())
    with pytest.raises(OutputError, match="'code'"):
        bank.add(expert)
    bank.add(expert.with_meta(domain="python"), replace=True)
    assert Bank(folder)["code"].meta["domain"] == bank["code"].meta["domain"] == "python"


def test_adding_to_a_new_folder_makes_it(tmp_path):
    bank = Bank(tmp_path / "new", create=True)
    bank.add(simple("code"))
    assert Bank(tmp_path / "new").names() == ["code"]


def test_adding_replaces_where_the_expert_lies_whatever_its_folder_is_called(folder):
    (folder / "sums").rename(folder / "sums-v1")
    bank = Bank(folder)
    assert bank.path("sums") == folder / "sums-v1"
    bank.add(simple("sums", domain="new"), replace=True)
    assert Bank(folder)["sums"].meta["domain"] == "new"


def test_refresh_sees_what_others_changed(folder):
    bank = Bank(folder)
    assert bank["sums"].meta["domain"] == "arithmetic"
    simple("sums", domain="other").save_pretrained(folder / "sums")
    simple("more").save_pretrained(folder / "more")
    assert bank["sums"].meta["domain"] == "arithmetic"
    bank.refresh()
    assert bank["sums"].meta["domain"] == "other"
    assert "more" in bank


def test_two_experts_of_one_name(folder):
    shutil.copytree(folder / "sums", folder / "copy")
    with pytest.raises(ExpertError, match="'sums'.*copy and sums"):
        Bank(folder)


def test_an_adapter_that_peft_saved_is_named_after_its_folder(tmp_path):
    adapted(build_tiny()).save_pretrained(tmp_path / "Run 3")
    bank = Bank(tmp_path)
    assert bank.names() == ["run-3"]
    assert not bank["run-3"].verified


def test_bundled_is_found_in_the_package_or_in_the_checkout(tmp_path, monkeypatch):
    package = tmp_path / "site" / "sigmix"
    (package / "experts").mkdir(parents=True)
    monkeypatch.setattr(module, "__file__", str(package / "experts" / "bank.py"))
    simple("a").save_pretrained(tmp_path / "site" / "experts" / "a")
    with pytest.raises(ExpertError, match="sigmix"):
        Bank.bundled()  # a folder of that name beside an installed package belongs to somebody else
    (tmp_path / "site" / "pyproject.toml").write_text("")
    assert Bank.bundled().names() == ["a"]
    simple("b").save_pretrained(package / "_experts" / "b")
    assert Bank.bundled().names() == ["b"]
