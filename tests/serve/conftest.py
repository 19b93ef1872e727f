"""In-process server that the tests of a module share."""

from __future__ import annotations

import pytest
from helpers_serve import bank, serving
from helpers_tiny import build_tiny, build_tokenizer

from sigmix.engine import Engine


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGMIX_CACHE", str(folder / "cache"))
        with serving(folder, expert_folders=[folder / "experts"], max_new_tokens=64, strategy="A") as client:
            client.folder = folder / "experts"
            client.folder.mkdir()
            yield client


@pytest.fixture(scope="module")
def browser():
    from helpers_page import CHROMIUM, QUIET, TIMEOUT, sync_api

    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET, timeout=TIMEOUT)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def alone():
    return Engine(build_tiny(), build_tokenizer(), bank())
