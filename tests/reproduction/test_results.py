"""What results/ and the README say is what the stored items give."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from reproduction.page import FILE, fill, page
from reproduction.scale import SCALES
from reproduction.store import Store

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
PAPER = RESULTS / "README.md"
SCALE_NAMES = ["laptop", "gpu"]


@pytest.mark.parametrize("name", SCALE_NAMES)
def test_tables_follow_from_the_items(name):
    text = (RESULTS / name / FILE).read_text(encoding="utf-8")
    assert text == page(Store(RESULTS / name), SCALES[name])


def evidence(file: Path) -> str:
    """The part of a text that is about the reproduction."""
    text = file.read_text(encoding="utf-8")
    if file == PAPER:
        return text
    (found,) = re.findall(r"<!-- evidence -->(.*?)<!-- /evidence -->", text, re.DOTALL)
    return found


def readings():
    """The script that counts replies."""
    spec = importlib.util.spec_from_file_location("readings", RESULTS / "readings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", [PAPER, ROOT / "README.md"], ids=["results", "project"])
def test_figures_and_tables_in_texts_follow_from_the_items(file):
    text = evidence(file)
    assert "<!-- laptop=" in text
    for name in SCALE_NAMES:
        assert fill(text, Store(RESULTS / name), SCALES[name]) == text
    assert readings().fill(text) == text
    rest = re.sub(r"<!-- (\w+:[\w.]+) -->.*?<!-- /\1 -->", "", text, flags=re.DOTALL)
    rest = re.sub(r"<!-- \w+=.+? -->[^<]*<!-- = -->", "", rest)
    rest = re.sub(r"```.*?```|`[^`]*`|\(http[^)]*\)|arXiv [\d.]+", "", rest, flags=re.DOTALL)
    assert re.findall(r"\d+\.\d+", rest) == []  # every figure is a marked one, so it was filled in
