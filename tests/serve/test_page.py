"""The playground in a real browser."""

from __future__ import annotations

import re

import pytest
from helpers_engine import expert
from helpers_page import CONTRAST, NAMELESS, TIMEOUT, expect, needs_chromium, opened, ready
from helpers_serve import NAMES, bank, gate_steps, live, wait_until
from helpers_tiny import build_tiny, build_tokenizer

from sigmix.engine import Engine

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache"), needs_chromium]


@pytest.fixture
def server(tmp_path):
    with live(tmp_path, expert_folders=[tmp_path / "experts"], strategy="A") as server:
        server.folder = tmp_path / "experts"
        server.folder.mkdir()
        yield server


@pytest.fixture
def page(browser, server):
    with opened(browser, server) as found:
        ready(found)
        yield found


@pytest.fixture
def alone():
    return Engine(build_tiny(), build_tokenizer(), bank())


def idle(page) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def send(page, question: str) -> None:
    page.get_by_label("Your message").fill(question)
    page.get_by_label("Your message").press("Enter")


def ask(page, question: str) -> None:
    send(page, question)
    idle(page)


def replies(page) -> list[str]:
    return page.locator("#log li:last-child .answer span").all_text_contents()


def shares(page) -> dict[str, float]:
    bars = page.locator("#bars .bar")
    return {
        bars.nth(i).get_attribute("data-expert"): float(bars.nth(i).get_attribute("data-alpha"))
        for i in range(bars.count())
    }


def test_type_stream_and_see_the_mix(page, alone, monkeypatch):
    page.get_by_label("Answer with").select_option("math")
    page.get_by_label("Longest answer").fill("24")
    (whole,) = alone.generate(["one two three"], "math", max_new_tokens=24)
    permits = gate_steps(monkeypatch)
    send(page, "one two three")
    for count in range(1, 5):  # streamed: every step's text is shown before the next step
        permits.release()
        shown = alone.tokenizer.decode(whole.ids[:count])
        expect(page.locator("#log li:last-child .answer span")).to_have_text(shown)
    permits.release(1000)
    idle(page)
    assert replies(page) == [whole.text]
    assert shares(page) == {"math": 1.0, "code": 0.0, "word": 0.0}
    assert page.locator("#reason").text_content().startswith("math: ")
    ask(page, "four")
    turns = [
        {"role": "user", "content": "one two three"}, {"role": "assistant", "content": whole.text},
        {"role": "user", "content": "four"},
    ]  # fmt: skip
    ids = alone.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True)
    ids = list(ids["input_ids"] if hasattr(ids, "keys") else ids)
    assert replies(page) == [alone.generate([ids], "math", max_new_tokens=24)[0].text]


def test_auto_shows_its_reason(page):
    ask(page, "one two")
    assert re.match(r"(math|code|word|base): .{10,}", page.locator("#reason").text_content())
    assert set(shares(page)) == set(NAMES)


def test_sliders_mix_by_hand(page, alone):
    slider = page.get_by_label("math", exact=True)
    slider.focus()
    for _ in range(10):
        slider.press("ArrowRight")
    page.get_by_label("code", exact=True).press("End")
    assert page.locator("#by-hand").text_content() == "math:0.5+code:1.5"
    assert page.get_by_label("Answer with").input_value() == "by hand"
    page.get_by_label("beside the base").check()
    page.get_by_label("Longest answer").fill("8")
    ask(page, "one two")
    wanted = [alone.generate(["one two"], mix, max_new_tokens=8)[0].text for mix in ("base", "math:0.5+code:1.5")]
    assert replies(page) == wanted
    assert shares(page) == {"math": 0.5, "code": 1.5, "word": 0.0}
    page.get_by_label("Save it as").fill("mine")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_label("Answer with")).to_have_value("mine")
    ask(page, "one two")
    assert replies(page)[-1] == alone.generate(["one two"], "math:0.5+code:1.5", max_new_tokens=8)[0].text


def test_load_and_unload_an_expert(page, server):
    expert(build_tiny(), "fresh", 9).save_pretrained(server.folder / "fresh")
    page.get_by_label("Load an expert from").fill("fresh")
    page.get_by_role("button", name="Load", exact=True).click()
    page.locator("#bank strong", has_text="fresh").wait_for()
    assert "fresh" in page.locator("#model option").all_text_contents()
    assert page.get_by_label("fresh", exact=True).count() == 1
    page.get_by_role("button", name="Unload fresh").click()
    page.locator("#bank strong", has_text="fresh").wait_for(state="detached")


def test_errors_are_shown_well(page, server):
    alert = page.get_by_role("alert")
    page.get_by_label("Load an expert from").fill("../etc")
    page.get_by_role("button", name="Load", exact=True).click()
    alert.wait_for()
    assert "../etc" in alert.text_content()
    ask(page, "x " * 400)
    assert "context" in alert.text_content()
    ask(page, "one")
    assert not alert.is_visible()
    assert replies(page)[0]
    server.service.scheduler.close(0)
    ask(page, "one")
    assert "shutting down" in alert.text_content()


def test_layers_of_a_saved_mix(page, server):
    server.call("POST", "/v1/mixes", {"name": "layered", "mix": {"weights": {"math": [1.0, 0.25]}}})
    page.reload()
    page.get_by_role("button", name="α by layer").click()
    picture = page.get_by_role("img", name=re.compile("math"))
    assert picture.get_attribute("aria-label") == "math: 1.00, 0.25"
    assert picture.locator("i").count() == 2


def test_feedback(page):
    page.get_by_label("Answer with").select_option("math")
    ask(page, "one")
    page.get_by_role("button", name="Yes").click()
    expect(page.locator("#feedback-done")).to_contain_text("Noted")
    page.get_by_role("button", name="No", exact=True).click()
    page.get_by_role("alert").wait_for()


def test_stop(page, server, monkeypatch):
    page.get_by_label("Longest answer").fill("200")
    permits = gate_steps(monkeypatch)  # the answer does not end by itself
    send(page, "one")
    page.locator("#bars .bar").first.wait_for()
    page.get_by_role("button", name="Stop").click()
    idle(page)
    assert page.locator("#error").is_hidden()
    page.get_by_text("(stopped)").wait_for()
    wait_until(lambda: server.service.scheduler._cancelled)
    permits.release()
    wait_until(lambda: not server.service.scheduler.running())


def test_a_key_is_required(browser, tmp_path):
    from sigmix.serve.auth import add_key

    key = add_key(tmp_path / "state" / "keys.json", "me")
    with live(tmp_path) as server:
        found = browser.new_page()
        found.set_default_timeout(TIMEOUT)
        found.goto(server.url)
        found.get_by_role("alert").wait_for()
        assert "API key" in found.get_by_role("alert").text_content()
        found.get_by_label("API key").fill(key)
        found.get_by_label("API key").press("Enter")
        ready(found)
        assert not found.get_by_role("alert").is_visible()
        found.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_names_contrast_and_keyboard(browser, server, scheme):
    context = browser.new_context(color_scheme=scheme, viewport={"width": 390, "height": 800})
    page = context.new_page()
    page.set_default_timeout(TIMEOUT)
    page.goto(server.url)
    ready(page)
    ask(page, "one")
    assert page.evaluate(NAMELESS) == []
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # no horizontal scrolling
    # every control can be reached with the keyboard, and focus is visible
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):  # wrapped around
            continue
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        outlined = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outlined != "none"
    assert {"question", "model", "compare", "tokens", "send", "new", "alpha-math", "mix-name", "path", "key"} <= reached
    context.close()
