"""Figures quoted in the READMEs are in the generated tables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLES = ROOT / "reproduction" / "tables"
EVIDENCE = re.compile(r"^## .*(evidence|results|paper hold|reproduc)", re.IGNORECASE)


def evidence(text: str) -> str:
    """Return the sections about the reproduction, without code and addresses."""
    parts = re.split(r"(?m)^(?=## )", text)
    found = "".join(part for part in parts if EVIDENCE.match(part))
    return re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|arXiv[ :][\d.]+", "", found, flags=re.DOTALL)


def quoted(text: str) -> set[str]:
    """Return the accuracies that a text quotes: numbers with one decimal, and counts such as "57 of 500"."""
    return set(re.findall(r"(?<![\d.])\d+\.\d(?!\d|\.\d)", text)) | set(re.findall(r"\b\d+ of \d+\b", text))


def missing(text: str, tables: str) -> list[str]:
    """Return the quoted figures that the tables lack; of "N of M" replies the tables may count N alone."""

    def found(figure: str) -> bool:
        counted = [figure, f"of {figure.split()[0]}"] if " of " in figure else [figure]
        return any(re.search(rf"(?<![\d.]){re.escape(one)}(?!\d|\.\d)", tables) for one in counted)

    return sorted(figure for figure in quoted(text) if not found(figure))


@pytest.fixture(scope="module")
def tables() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(TABLES.glob("*.md")))


def test_figures_of_the_projects_readme(tables):
    text = evidence((ROOT / "README.md").read_text(encoding="utf-8"))
    assert quoted(text), "the README has no section on the reproduction"
    assert missing(text, tables) == []


def test_figures_of_the_reproductions_readme(tables):
    text = (ROOT / "reproduction" / "README.md").read_text(encoding="utf-8")
    text = text.partition("## Method")[2].partition("## The bundled experts")[0]
    assert missing(text, tables) == []


def test_a_figure_that_no_table_has_is_found():
    assert missing("76.5 and 76.6, 3 of 9, arXiv 2501.06252", "| 76.5 [73.0, 79.9] | 13 of 9 |") == ["3 of 9", "76.6"]
