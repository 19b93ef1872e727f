"""The decompositions of tiny models go to one temporary cache for the whole run, never to the user's."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def svf_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("svd-cache")


@pytest.fixture(autouse=True)
def _own_cache(request, svf_cache, monkeypatch):
    if not request.node.get_closest_marker("real"):
        monkeypatch.setenv("SIGMIX_CACHE", str(svf_cache))
