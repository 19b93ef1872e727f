"""A server that the tests of a module share."""

from __future__ import annotations

import pytest
from helpers_serve import bank, live
from helpers_tiny import build_tiny, build_tokenizer

from sigmix.engine import Engine


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGMIX_CACHE", str(folder / "cache"))
        with live(folder, expert_folders=[folder / "experts"], max_new_tokens=64, policy="A") as made:
            made.folder = folder / "experts"
            made.folder.mkdir()
            yield made


@pytest.fixture(scope="module")
def alone(server):
    return Engine(build_tiny(), build_tokenizer(), bank())
