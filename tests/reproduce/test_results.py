"""What results/ and the README say is what the stored items give."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sigmix.reproduce.page import FILE, fill, page
from sigmix.reproduce.scale import SCALES
from sigmix.reproduce.store import Store

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
PAPER = RESULTS / "README.md"
DONE = [name for name in ("laptop", "gpu") if (RESULTS / name / FILE).exists()]


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """Tables computed anew, by scale."""
    return {name: page(Store(RESULTS / name), SCALES[name]) for name in DONE}


@pytest.mark.parametrize("name", DONE)
def test_tables_follow_from_the_items(name, pages):
    assert (RESULTS / name / FILE).read_text(encoding="utf-8") == pages[name]


def test_the_papers_tables_follow_from_the_items():
    text = PAPER.read_text(encoding="utf-8")
    assert "<!-- laptop:table1 -->" in text
    for name in DONE:
        assert fill(text, Store(RESULTS / name), SCALES[name]) == text


def prose(text: str) -> str:
    """A text without its filled tables, code and addresses."""
    text = re.sub(r"<!-- ([\w.]+:[\w.]+) -->.*?<!-- /\1 -->", "", text, flags=re.DOTALL)
    text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    return re.sub(r"\(http[^)]*\)|arXiv [\d.]+", "", text)


@pytest.mark.parametrize("file", [PAPER, ROOT / "README.md"])
def test_figures_in_prose_are_in_the_tables(file, pages):
    text = file.read_text(encoding="utf-8")
    if file != PAPER:
        (text,) = re.findall(r"<!-- evidence -->(.*?)<!-- /evidence -->", text, re.DOTALL)
    figures = set(re.findall(r"\d+\.\d+", prose(text)))
    assert figures
    known = set(re.findall(r"\d+\.\d+", "\n".join(pages.values())))
    assert figures <= known, f"not in any table: {sorted(figures - known)}"
