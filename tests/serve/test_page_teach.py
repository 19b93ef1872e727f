"""The page "Teach" in a real browser: from a dropped file to a model beside the base."""

from __future__ import annotations

import json

import pytest
from helpers_fine_tuning import Gate, questions, rows, training, upload
from helpers_page import CONTRAST, NAMELESS, expect, needs_chromium, opened, ready
from helpers_serve import bearer, wait_until

from sigmix.serve.auth import add_key

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache"), needs_chromium]
JOBS = "/v1/fine_tuning/jobs"
SECONDS = 240_000  # milliseconds of a job
TABLE = "text,label\n" + "".join(f"one {n},{('two', 'four')[n % 2]}\n" for n in range(60)) + "one 0,two\none 1,two\n"
WIDE = """() => [...document.querySelectorAll("main *")]
    .filter((e) => e.getBoundingClientRect().right > window.innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))"""
HTML = "<img src=x onerror=\"document.body.dataset.hit='1'\">"


def csv_file(text: str = TABLE, name: str = "tickets.csv") -> dict:
    return {"name": name, "mimeType": "text/csv", "buffer": text.encode()}


def drop(page, text: str, name: str) -> None:
    """Drop a file on the page."""
    script = "([text, name]) => { const d = new DataTransfer(); d.items.add(new File([text], name)); return d; }"
    page.dispatch_event("#drop", "drop", {"dataTransfer": page.evaluate_handle(script, [text, name])})


def choose(page, **file) -> None:
    page.get_by_label("Choose a file").set_input_files(csv_file(**file))
    page.locator("#report").wait_for(timeout=SECONDS)


def button(page, name: str):
    return page.get_by_role("button", name=name, exact=True)


def points(page, curve: str) -> int:
    """Number of values of a curve."""
    line = page.locator(f"#{curve} polyline")
    return len(line.get_attribute("points").split()) if line.count() else 0


def facts(page) -> dict[str, str]:
    names, values = (page.locator(f"#facts {tag}").all_text_contents() for tag in ("dt", "dd"))
    return dict(zip(names, values, strict=True))


@pytest.fixture
def server(tmp_path):
    with training(tmp_path) as server:
        yield server


@pytest.fixture
def gate(tmp_path, monkeypatch):
    """Steps of a process in place of training."""
    return Gate(tmp_path, monkeypatch)


@pytest.fixture
def page(browser, gate, server):
    with opened(browser, server, "/#file") as found:
        ready(found)
        yield found


def test_from_a_dropped_file_to_a_model_that_is_discarded(browser, server):
    with opened(browser, server) as page:
        ready(page)
        page.get_by_role("link", name="Teach").click()
        expect(page.locator("#chat")).to_be_hidden()
        drop(page, TABLE, "tickets.csv")
        page.locator("#report").wait_for(timeout=SECONDS)
        read = facts(page)
        assert (read["Rows"], read["Duplicates"], read["Conflicts"]) == ("62, 60 distinct requests", "1", "1")
        assert "'text'" in read["Columns"]
        assert "'label'" in read["Columns"]
        assert read["Tokens"].endswith("context 256")
        assert "train" in read["Parts"]
        assert "tickets.csv:" in page.locator("#problems").text_content()
        assert page.locator("#labels .bar").all_text_contents() == ["two50 %", "four50 %"]
        assert page.evaluate(NAMELESS) == []

        page.get_by_label("Passes over the rows").fill("1")
        button(page, "Train").click()
        page.locator("#samples").wait_for(timeout=SECONDS)
        sample = page.locator("#replies tr").first.locator("td").all_text_contents()
        assert sample[0].startswith("one ")
        assert sample[1] in ("two", "four")
        assert sample[3] in ("right", "wrong")
        page.locator("#done").wait_for(timeout=SECONDS)
        job = server.call("GET", JOBS)[1]["data"][0]
        events = server.call("GET", f"{JOBS}/{job['id']}/events?limit=100")[1]["data"]
        losses = [event["data"]["train_loss"] for event in events if event["data"] and "train_loss" in event["data"]]
        assert points(page, "loss") == len(losses) == 3
        assert points(page, "accuracy") == 4  # before the first step and after each
        expect(page.locator("#job-state")).to_contain_text(job["sigmix"]["verdict"])
        mistakes = server.call("GET", f"{JOBS}/{job['id']}/mistakes?limit=100")[1]["data"]
        assert len(mistakes) == round((1 - job["sigmix"]["test"]["accuracy"]) * job["sigmix"]["test"]["n"])
        expect(page.locator("#mistake-rows tr")).to_have_count(min(20, len(mistakes)))
        shown = [row.locator("td").all_text_contents() for row in page.locator("#mistake-rows tr").all()]
        assert shown == [[row["prompt"], row["answer"], row["reply"], "wrong"] for row in mistakes[:20]]

        model = job["fine_tuned_model"]
        assert model.startswith("ft:tiny-llama:tickets:")
        page.get_by_label("A request").fill("one 1 two")
        button(page, "Answer with both").click()
        expect(button(page, "Answer with both")).to_be_enabled()
        shown = page.locator("#both .answer span").all_text_contents()
        wanted = [server.chat("one 1 two", model=name, max_tokens=64)[1] for name in ("base", model)]
        assert shown == [one["choices"][0]["message"]["content"] for one in wanted]

        page.on("dialog", lambda dialog: dialog.accept())
        button(page, "Discard").click()
        expect(page.locator("#reading")).to_contain_text("discarded")
        expect(page.locator("#jobs p")).to_have_text("discarded")  # after the files are deleted
        assert server.chat(model=model)[0] == 404
        assert server.call("GET", "/v1/files")[1]["data"] == []
        assert not (server.service.fine_tuning.folder / job["id"]).exists()


def test_the_curve_grows_and_a_reload_picks_the_job_up(page, gate, server):
    choose(page)
    button(page, "Train").click()
    gate.open(0)
    expect(page.locator("#step")).to_have_text("step 1 of 4", timeout=SECONDS)
    wait_until(lambda: points(page, "loss") == 1)
    page.reload()
    expect(page.locator("#step")).to_have_text("step 1 of 4", timeout=SECONDS)
    gate.open(1)
    expect(page.locator("#step")).to_have_text("step 2 of 4", timeout=SECONDS)
    wait_until(lambda: points(page, "loss") == 2)
    assert "1.00 at step 2" in page.get_by_role("img", name="Training loss").get_attribute("aria-label")

    button(page, "Pause").click()
    expect(page.locator("#job-state")).to_contain_text("aused")
    button(page, "Resume").click()
    button(page, "Pause").wait_for()
    gate.open(2, 3)
    page.locator("#done").wait_for(timeout=SECONDS)
    wait_until(lambda: points(page, "loss") == 4)
    button(page, "Keep").click()
    expect(page.locator("#job")).to_be_hidden()
    (job,) = server.call("GET", JOBS)[1]["data"]
    page.get_by_role("link", name="Chat").click()
    assert page.get_by_label("Answer with").input_value() == job["fine_tuned_model"]
    page.get_by_label("Your message").fill("one")
    page.get_by_label("Your message").press("Enter")
    expect(page.locator(f"#bars [data-expert={job['sigmix']['expert']}]")).to_have_attribute("data-alpha", "1")
    page.get_by_role("link", name="Teach").click()
    page.get_by_role("button", name=f"Open {job['fine_tuned_model']}").click()
    page.locator("#done").wait_for()


def test_cancel_and_a_failure(page, gate, server):
    choose(page)
    button(page, "Train").click()
    button(page, "Cancel").click()
    expect(page.locator("#job-state")).to_contain_text("ancelled")
    expect(button(page, "Cancel")).to_be_hidden()
    gate.open("fail", 0, 1, 2, 3)
    choose(page)
    button(page, "Train").click()
    expect(page.locator("#job-state")).to_contain_text("the disk is full", timeout=SECONDS)
    assert server.call("GET", JOBS)[1]["data"][0]["status"] == "failed"


BAD = {
    "columns": ("a,b\n1,2\n", "bad.csv", "bad.csv: no known column of prompts among a, b"),
    "row": (TABLE + "one 99,\n", "tickets.csv", "tickets.csv:64"),
    "format": ("x", "tickets.exe", "must end in one of"),
    "empty": ("", "tickets.csv", "the file tickets.csv is empty"),
    "JSON": ('{"prompt": \n', "rows.jsonl", "rows.jsonl:1: not JSON"),
}


def test_a_bad_files_message_is_shown(page, server):
    alert = page.get_by_role("alert")
    for text, name, message in BAD.values():
        drop(page, text, name)
        expect(alert).to_contain_text(message, timeout=SECONDS)
        assert str(server.service.settings.state) not in alert.text_content()
        expect(page.get_by_label("Choose a file")).to_be_enabled()
        assert button(page, "Train").is_hidden()
    choose(page)  # another file takes its place
    assert not alert.is_visible()
    assert button(page, "Train").is_visible()
    files = lambda: [file["filename"] for file in server.call("GET", "/v1/files")[1]["data"]]  # noqa: E731
    wait_until(lambda: files() == ["tickets.csv"])
    page.reload()  # an upload that is not trained on is not kept
    wait_until(lambda: files() == [])


def test_a_file_over_the_limit(browser, tmp_path):
    with training(tmp_path, max_file_bytes=1 << 20) as server, opened(browser, server, "/#file") as page:
        for size in (2 << 20, 40 << 20):
            page.evaluate("size => { window.large = new File([new Uint8Array(size)], 'rows.jsonl'); }", size)
            data = page.evaluate_handle("() => { const d = new DataTransfer(); d.items.add(window.large); return d; }")
            page.dispatch_event("#drop", "drop", {"dataTransfer": data})
            expect(page.get_by_role("alert")).to_contain_text("is larger than", timeout=SECONDS)


def test_a_file_that_cannot_be_trained_on_is_shown_with_the_reason(page):
    choose(page, text="text,label\n" + "".join(f"one {n},two\n" for n in range(30)))
    assert "all answers are 'two'" in page.locator("#problems").text_content()
    assert button(page, "Train").is_hidden()


def test_columns_are_given_by_name(page, server):
    text = TABLE.replace("text,label", "Betreff,--Team")
    page.get_by_label("Choose a file").set_input_files(csv_file(text))
    expect(page.get_by_role("alert")).to_contain_text("Betreff, --Team", timeout=SECONDS)
    page.get_by_label("Column of the requests").fill("Betreff")
    page.get_by_label("Column of the answers").fill("--Team")
    button(page, "Read again").click()
    page.locator("#report").wait_for(timeout=SECONDS)
    assert not page.get_by_role("alert").is_visible()
    assert "'--Team'" in facts(page)["Columns"]
    button(page, "Train").click()
    page.locator("#job").wait_for(timeout=SECONDS)
    (job,) = server.service.fine_tuning.jobs.all(None)
    assert job.value["options"][-2:] == ["--prompt=Betreff", "--answer=--Team"]


def test_content_of_a_file_is_text(page, gate, server):
    lines = [{"messages": [{"role": "system", "content": HTML}, {"role": "user", "content": f"{HTML} {n}"},
                           {"role": "assistant", "content": f"{HTML}{n % 2}"}]} for n in range(60)]  # fmt: skip
    drop(page, "\n".join(map(json.dumps, lines)), "<img src=x onerror=alert(1)>.jsonl")
    page.locator("#report").wait_for(timeout=SECONDS)
    assert HTML in page.locator("#examples").text_content()
    assert HTML in page.locator("#labels").text_content()
    assert "<img src=x onerror=alert(1)>.jsonl" in facts(page)["File"]
    button(page, "Train").click()
    gate.open(0, 1, 2, 3)
    page.locator("#done").wait_for(timeout=SECONDS)
    assert page.get_by_label("System turn").input_value() == HTML
    assert page.locator("img").count() == 0
    assert page.locator("body").get_attribute("data-hit") is None


def test_mistakes_and_the_verdict_are_shown(page, gate):
    gate.write_mistakes(*((f"{HTML} {n}", "two", "a\n" * (n == 0) + "four", "0.0", "") for n in range(24)),
                        ("half", "two", "tw", 0.5, ""), ("odd", "two", "", "", "the grader failed"))  # fmt: skip
    gate.open(0, 1, 2, 3)
    choose(page)
    button(page, "Train").click()
    expect(page.locator("#job-state")).to_contain_text("Do not use this expert: base is as good.", timeout=SECONDS)
    expect(page.locator("#job-state")).to_be_visible()
    table = page.get_by_role("table", name="Mistakes on the held-out rows").locator("tbody tr")
    expect(table).to_have_count(20)
    assert table.first.locator("td").all_text_contents() == [f"{HTML} 0", "two", "a\nfour", "wrong"]
    button(page, "More mistakes").click()
    expect(table).to_have_count(26)
    expect(button(page, "More mistakes")).to_be_hidden()
    marks = [row.locator("td").last.text_content() for row in table.all()[-2:]]
    assert marks == ["50 %", "?"]
    assert page.locator("#mistakes img").count() == 0
    assert page.locator("body").get_attribute("data-hit") is None


def test_a_grader_of_ones_own(page, server):
    page.get_by_label("Choose a file").set_input_files(csv_file(TABLE.replace("label", "my label")))
    expect(page.get_by_role("alert")).to_contain_text("my label", timeout=SECONDS)
    page.get_by_label("Column of the answers").fill("my label")
    button(page, "Read again").click()
    expect(button(page, "Train")).to_be_visible(timeout=SECONDS)
    grader = page.get_by_label("Grader", exact=True)
    text, error = page.get_by_label("Grader as a JSON object"), page.locator("#grader-error")
    expect(text).to_be_hidden()
    grader.select_option("text_similarity")
    assert json.loads(text.input_value())["evaluation_metric"] == "fuzzy_match"
    grader.select_option("string_check")
    given = json.loads(text.input_value())
    assert (given["reference"], given["operation"]) == ("{{item['my label']}}", "eq")
    bad = {**given, "operation": "is"}, {**given, "reference": "{{item}}"}, {"type": "score_model"}, {"type": HTML}, 3
    for value in (*map(json.dumps, bad), '{"type": ', "null", ""):
        text.fill(value)
        text.blur()
        expect(error).to_contain_text("grader")
        message = error.text_content()
        for name in ("Train", "Read again"):
            if button(page, name).is_visible():
                button(page, name).click()
                expect(button(page, "Read again")).to_be_enabled(timeout=SECONDS)
                expect(error).to_have_text(message)
        assert not page.locator("#teach-error").is_visible()
    assert server.call("GET", JOBS)[1]["data"] == []
    text.fill(json.dumps(given))
    text.blur()
    expect(error).to_be_hidden()
    button(page, "Read again").click()
    expect(button(page, "Train")).to_be_visible(timeout=SECONDS)
    assert facts(page)["Grader"] == "string_check (given)"
    assert page.locator("img").count() == 0
    button(page, "Train").click()
    page.locator("#job").wait_for(timeout=SECONDS)
    (job,) = server.call("GET", JOBS)[1]["data"]
    assert job["method"]["type"] == "reinforcement"
    assert job["method"]["reinforcement"]["grader"] == given
    assert "--answer=my label" in server.service.fine_tuning.jobs.get(job["id"], None).value["options"]


def test_rows_without_answers_are_graded(page, server):
    drop(page, questions(field="gold").decode(), "questions.jsonl")
    expect(page.get_by_role("alert")).to_contain_text("does not end with the assistant", timeout=SECONDS)
    page.get_by_label("Grader", exact=True).select_option("string_check")
    button(page, "Read again").click()
    expect(page.locator("#problems")).to_contain_text("questions.jsonl:", timeout=SECONDS)
    assert "item.answer" in page.locator("#problems").text_content()
    assert button(page, "Train").is_hidden()
    text = page.get_by_label("Grader as a JSON object")
    text.fill(text.input_value().replace("item.answer", "item.gold"))
    button(page, "Read again").click()
    expect(button(page, "Train")).to_be_visible(timeout=SECONDS)
    button(page, "Train").click()
    page.locator("#job").wait_for(timeout=SECONDS)
    choose(page)  # the grader is that of one file
    assert page.get_by_label("Grader", exact=True).input_value() == ""
    assert facts(page)["Grader"].startswith("label")


def test_a_key_that_may_not_train_sees_why(browser, tmp_path, gate):
    keys = tmp_path / "state" / "keys.json"
    user, root = add_key(keys, "user"), add_key(keys, "root", admin=True)
    with training(tmp_path) as server, opened(browser, server, "/#file") as page:
        expect(page.locator("#closed")).to_contain_text("API key")
        for key, message in ((user, "administrator's key"), (root, None)):
            page.get_by_label("API key").fill(key)
            page.get_by_label("API key").press("Enter")
            if message:
                expect(page.locator("#closed")).to_contain_text(message)
                expect(page.get_by_label("Choose a file")).to_be_hidden()
        expect(page.locator("#closed")).to_be_hidden()
        choose(page)
        (file,) = server.call("GET", "/v1/files", **bearer(root))[1]["data"]
        for path in (f"/v1/files/{file['id']}/summary", JOBS):
            assert server.call("GET", path, **bearer(user))[0] == 403
        button(page, "Train").click()
        page.locator("#job").wait_for(timeout=SECONDS)


def test_a_server_that_restarts_is_reached_again(browser, tmp_path, gate):
    with training(tmp_path) as server:
        port = server.port
        with opened(browser, server, "/#file") as page:
            choose(page)
            button(page, "Train").click()
            gate.open(0)
            expect(page.locator("#step")).to_have_text("step 1 of 4", timeout=SECONDS)
            server.stop()
            expect(page.get_by_role("alert")).to_contain_text("cannot be reached", timeout=SECONDS)
            gate.open(1, 2, 3)
            with training(tmp_path, port=port):
                page.locator("#done").wait_for(timeout=SECONDS)
                assert not page.get_by_role("alert").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_names_contrast_and_keyboard(browser, server, gate, scheme):
    gate.open(0, 1, 2, 3)
    upload(server, rows())
    screen = {"width": 390, "height": 800}
    with opened(browser, server, "/#file", color_scheme=scheme, viewport=screen) as page:
        ready(page)
        choose(page)
        reached = set()
        for step in range(2):
            for _ in range(40):
                page.keyboard.press("Tab")
                reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert page.evaluate("document.activeElement === document.body") or outline != "none"
            assert page.evaluate(NAMELESS) == []
            assert page.evaluate(CONTRAST) == []
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            if step == 0:
                page.get_by_label("Passes over the rows").press("Enter")
                page.locator("#done").wait_for(timeout=SECONDS)
        assert {"Chat", "Teach", "file", "prompt-column", "answer-column", "grader", "suffix", "epochs", "request",
                "answer", "keep", "discard", "key"} <= reached  # fmt: skip
