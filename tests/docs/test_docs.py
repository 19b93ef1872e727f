"""Every command and every Python block in README.md and docs/ runs as it stands, or says why it is not run here."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from helpers_docs import REASONS, ROOT, Reader, blocks

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = ("bash", "sh", "console", "python")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def ids(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("page", [p for p in PAGES if any(b.kind in RUN and not b.why for b in blocks(p))], ids=ids)
def test_a_page_runs(page, tmp_path, smollm):
    if page.parent == ROOT:  # the README is read in a checkout
        shutil.copytree(ROOT / "experts", tmp_path / "experts")
    reader = Reader(tmp_path)
    try:
        for block in blocks(page):
            if block.why is None:
                reader.run(block)
    finally:
        reader.close()


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_what_is_not_run_has_a_reason(page):
    for block in blocks(page):
        where = f"{ids(page)}, line {block.line}: {block.why}"
        assert block.why is None or block.why.startswith(REASONS), where
        if block.why and block.why.startswith("tests/"):
            assert (ROOT / block.why.split()[0]).is_file(), where
    # a command in an indented block would be run by nobody
    outside = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"^ {4}(sigmix|python|pip|curl|accelerate|vllm) ", outside, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{ids(page)} links to {target}"
