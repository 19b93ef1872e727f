"""Decompositions of tiny models go to one temporary cache for the whole run, never to the user's."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def vision_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("vision-cache")


@pytest.fixture(autouse=True)
def _own_cache(vision_cache, monkeypatch):
    monkeypatch.setenv("SIGMIX_CACHE", str(vision_cache))
