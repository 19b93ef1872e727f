"""Fixtures: tiny random models of many architectures, an offline tokenizer, and the real default model.

Tiny models are seeded, float32, on the CPU, and differ only in their architecture. Tests that need meaning ask for
`smollm` and carry the marker ``real``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers_tiny import build_tiny, build_tokenizer


@pytest.fixture(scope="session", autouse=True)
def same_dtype() -> Iterator[None]:
    """In a fresh cache the default dtype is float32, whatever else the machine does while it would be measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sigmix.models.loading._seconds", lambda dtype: 1.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_compiler() -> Iterator[None]:
    """Servers and benchmarks start no compiler; tests of compiled decode steps do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_COMPILE_DISABLE", "1")
        yield


@pytest.fixture
def tiny() -> Callable:
    """Factory: ``tiny("qwen3", seed=1, num_hidden_layers=3)`` -> model. Architectures: ``ARCHITECTURES``."""
    return build_tiny


@pytest.fixture
def tiny_llama():
    """A fresh random Llama: hidden 64, 2 layers, 4 heads on 2 key-value heads, vocabulary 256, tied, float32."""
    return build_tiny("llama")


@pytest.fixture
def tiny_tokenizer():
    """A fresh offline tokenizer; see `build_tokenizer`."""
    return build_tokenizer()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for one test; returns its path (not created)."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SIGMIX_CACHE", str(folder))
    return folder


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A complete model folder named ``tiny-llama`` in ``tmp_path``, with the tiny Llama and its tokenizer."""
    path = tmp_path / "tiny-llama"
    build_tiny().save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def smollm():
    """(model, tokenizer) of the embedded default, shared: tests must leave it as it was. Fetched on first use."""
    from sigmix.models.loading import load_base

    return load_base()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """``SIGMIX_SKIP_REAL=1`` skips the tests that need the real model."""
    if os.environ.get("SIGMIX_SKIP_REAL") == "1":
        for item in items:
            if item.get_closest_marker("real"):
                item.add_marker(pytest.mark.skip(reason="SIGMIX_SKIP_REAL=1"))


@pytest.fixture(autouse=True)
def _loggers() -> Iterator[None]:
    """Restores the loggers that `sigmix serve` changes, for the tests that run later in this process."""
    loggers = [logging.getLogger(name) for name in ("sigmix", "uvicorn", "uvicorn.error")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny models run on one thread: on a busy machine two threads spend their time waiting for each other."""
    torch.set_num_threads(THREADS if request.node.get_closest_marker("real") else 1)
    yield
    torch.set_num_threads(THREADS)
