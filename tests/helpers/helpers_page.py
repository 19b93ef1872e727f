"""Chromium, driven by Playwright, on the pages of a server. Skipped where there is no Chromium.

``CHROMIUM`` names one that is not on the path.
"""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
TIMEOUT = 120_000  # milliseconds
expect = sync_api.expect
expect.set_options(timeout=TIMEOUT)
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@contextmanager
def opened(browser, server, path="/", **context):
    """A page of a server; it must send no request elsewhere and log no error."""
    context = browser.new_context(**context)
    found = context.new_page()
    elsewhere, errors = [], []
    found.on("request", lambda request: None if request.url.startswith(server.url) else elsewhere.append(request.url))
    found.on("pageerror", lambda error: errors.append(str(error)))
    found.set_default_timeout(TIMEOUT)
    found.goto(server.url + path)
    yield found
    context.close()
    assert elsewhere == []
    assert errors == []


# the page's content security policy forbids injected scripts, so tests wait for visible text
def ready(page) -> None:
    expect(page.locator("#status")).to_contain_text("ready")


NAMELESS = """() => [...document.querySelectorAll(
    "input, button, select, textarea, meter, progress, table, [role=img], ol, section")]
    .filter((e) => !(e.labels?.length || e.getAttribute("aria-label") || e.getAttribute("aria-labelledby")
                     || (e.tagName === "BUTTON" && e.textContent.trim())))
    .map((e) => e.outerHTML)"""
CONTRAST = """() => {
    const lum = (text) => { const c = text.match(/[\\d.]+/g).slice(0, 3).map(Number).map((v) => v / 255)
        .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]; };
    const back = (e) => { for (let x = e; x; x = x.parentElement) { const b = getComputedStyle(x).backgroundColor;
        if (!b.includes("rgba(0, 0, 0, 0)") && b !== "transparent") return b; } return "rgb(255, 255, 255)"; };
    return [...document.querySelectorAll(
        "h1, h2, h3, h4, p, a, label, button, span, code, strong, option, dt, dd, th, td")]
        .filter((e) => e.textContent.trim() && e.offsetParent && !e.disabled)
        .map((e) => { const a = lum(getComputedStyle(e).color), b = lum(back(e));
            return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML.slice(0, 80)]; })
        .filter(([ratio]) => ratio < 4.5);
}"""
