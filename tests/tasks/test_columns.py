"""Columns of a user's rows: formats by their names, templates, conversations, and values that are refused."""

import datetime
import json

import pytest

from sigmix.errors import ConfigError, DataError
from sigmix.tasks.columns import Columns
from sigmix.tasks.data import Row


def read(data, **options):
    row = Row(data, "a.jsonl:3")
    return Columns.detect(row, **options).read(row)


def message(role, content, **more):
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("data", "prompt", "answer"),
    [
        ({"prompt": "a", "completion": "b"}, "a", "b"),
        ({"text": "a", "label": "b", "id": 7}, "a", "b"),
        ({"Text": " a ", "Label": "b\n"}, "a", "b"),
        ({"instruction": "a", "input": "", "output": "b"}, "a", "b"),
        ({"instruction": "a", "input": "c", "output": "b"}, "a\n\nc", "b"),
        ({"question": "a", "answer": 3}, "a", "3"),
        ({"question": "a", "answer": 2.50}, "a", "2.5"),
        ({"question": "a", "answer": True}, "a", "true"),
        ({"question": "a", "answer": {"k": ["é"]}}, "a", '{"k": ["é"]}'),
        ({"question": "a", "answer": datetime.date(2021, 3, 4)}, "a", "2021-03-04"),
        ({"input": "a", "target": "b"}, "a", "b"),
        ({"utterance": "a", "intent": "b"}, "a", "b"),
        ({"text": "a", "label": 1, "label_text": "b"}, "a", "b"),
        ({"prompt": [message("user", "a")], "completion": [message("assistant", "b")]}, "a", "b"),
        ({"messages": [message("user", "a"), message("assistant", "b")]}, "a", "b"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "a", "b"),
        ({"messages": [message("user", [{"type": "text", "text": "a"}]), message("assistant", "b")]}, "a", "b"),
    ],
)
def test_formats_are_known_by_their_columns(data, prompt, answer):
    row = read(data)
    assert (row.prompt, row.answer) == (prompt, answer)


def test_columns_and_templates_can_be_named():
    data = {"subject": "s", "body": "b", "queue": "q", "n": 1}
    row = read(data, template="{subject} ({n})\n{body} {{x}}", answer="queue")
    assert (row.prompt, row.answer) == ("s (1)\nb {x}", "q")
    assert read(data, prompt="subject", answer="n").answer == "1"
    assert read({"text": "a", "label": 1}, label_names=["no", "yes"]).answer == "yes"
    assert read({"text": "a", "label": "0"}, label_names=["no", "yes"]).answer == "no"
    with pytest.raises(DataError, match=r"a\.jsonl:3: label 2"):
        read({"text": "a", "label": 2}, label_names=["no", "yes"])
    with pytest.raises(DataError, match="'nothing'.*subject, body.*--prompt"):
        read(data, prompt="nothing", answer="queue")
    with pytest.raises(DataError, match="'nothing'"):
        read(data, template="{nothing}", answer="queue")
    with pytest.raises(DataError, match="a, b.*--prompt"):
        read({"a": "x", "b": "y"})
    with pytest.raises(ConfigError, match="column"):
        read(data, template="no field", answer="queue")
    with pytest.raises(ConfigError, match="--template"):
        read(data, template="{body}", prompt="body", answer="queue")


def test_turns_before_the_last_one_are_history():
    row = read({
        "messages": [message("system", "s"), message("user", "a"), message("assistant", "b"), message("user", "c"),
                     message("assistant", "d")]
    })  # fmt: skip
    assert (row.system, row.prompt, row.answer) == ("s", "c", "d")
    assert row.turns == [message("user", "a"), message("assistant", "b"), message("user", "c")]
    single = read({"prompt": "a", "completion": "b", "system": "s"})
    assert (single.turns, single.system) == ("a", "s")
    chat = {"messages": [message("user", "a"), message("assistant", " b ")]}
    items = [read({**chat, **more}).item for more in ({}, {"answer": "own"})]
    assert [item["answer"] for item in items] == ["b", "own"]  # for graders
    weightless = {"messages": [message("user", "a"), message("assistant", "b", weight=0)]}
    assert read(weightless) is None


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"prompt": " \n", "completion": "b"}, "'prompt' is empty"),
        ({"prompt": None, "completion": "b"}, "'prompt' is empty"),
        ({"prompt": {"a": 1}, "completion": "b"}, "'prompt' holds a dict"),
        ({"prompt": float("nan"), "completion": "b"}, "'prompt' holds a float"),
        ({"prompt": b"a", "completion": "b"}, "'prompt' holds a bytes"),
        ({"prompt": "a", "completion": []}, "'completion'"),
        ({"messages": []}, "list of messages"),
        ({"messages": ["a"]}, "list of messages"),
        ({"messages": [message("assistant", "b")]}, "user"),
        ({"messages": [message("user", "a"), message("assistant", " ")]}, "message 2 .* is empty"),
        ({"messages": [message("user", "a"), message("assistant", None, tool_calls=[{}])]}, "tools"),
        ({"messages": [message("user", "a"), message("tool", "b"), message("assistant", "c")]}, "'tool'"),
        ({"messages": [message("user", [{"type": "image_url"}]), message("assistant", "c")]}, "only text"),
        ({"messages": [message("user", "a"), message("system", "b"), message("assistant", "c")]}, "first"),
        ({"prompt": [message("user", "a")], "completion": [message("user", "b")]}, "assistant"),
    ],
)
def test_rows_that_cannot_be_learned_name_file_and_line(data, problem):
    with pytest.raises(DataError, match=rf"a\.jsonl:3: .*{problem}"):
        read(data)


def test_json_answers_keep_their_text():
    assert read({"text": "a", "label": json.dumps({"b": 1})}).answer == '{"b": 1}'
