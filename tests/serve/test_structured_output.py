"""Structured output and sampling options over HTTP: each request under its own, invalid ones named."""

from __future__ import annotations

import json
import re
import threading

import jsonschema
import pytest
from helpers_serve import BODY, CHAT, TIMEOUT
from helpers_tiny import build_tokenizer

from sigmix.engine.structured_output import StructuredOutput

TEXT = "/v1/completions"
SCHEMA = {
    "type": "object",
    "properties": {"id": {"type": "integer", "minimum": 0, "maximum": 99}, "tags": {
        "type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3}},
    "required": ["id", "tags"], "additionalProperties": False,
}  # fmt: skip
FORMAT = {"type": "json_schema", "json_schema": {"name": "item", "schema": SCHEMA, "strict": True}}
RANDOM = {"model": "math", "temperature": 1.0, "max_tokens": 150}

FIELDS = {
    "response_format": (FORMAT, StructuredOutput(json=SCHEMA)),
    "structured_outputs": ({"json": SCHEMA}, StructuredOutput(json=SCHEMA)),
    "structured_outputs regex": ({"regex": "[ab]{2,9}"}, StructuredOutput(regex="[ab]{2,9}")),
    "structured_outputs choice": ({"choice": ["yes", "no"]}, StructuredOutput(choice=["yes", "no"])),
    "structured_outputs grammar": ({"grammar": 'start: "x" /[0-9]+/'}, StructuredOutput(regex="x[0-9]+")),
    "guided_json": (json.dumps(SCHEMA), StructuredOutput(json=SCHEMA)),
    "guided_regex": ("[ab]{2,9}", StructuredOutput(regex="[ab]{2,9}")),
    "guided_choice": (["yes", "no"], StructuredOutput(choice=["yes", "no"])),
    "guided_grammar": ('root ::= "x" [0-9]+', StructuredOutput(regex="x[0-9]+")),
}


def texts(response) -> list[str]:
    return [choice["message"]["content"] if "message" in choice else choice["text"] for choice in response["choices"]]


@pytest.mark.parametrize("field", FIELDS)
def test_every_field(server, alone, field):
    value, output = FIELDS[field]
    body = {**RANDOM, field.split()[0]: value, "seed": 3}
    options = {"do_sample": True, "max_new_tokens": 150, "seeds": [3], "structured_output": output, "form": "factored"}
    status, found = server.chat(**body)
    assert status == 200, found
    (expected,) = alone.generate(["one two"], "math", **options)
    assert texts(found) == [expected.text]
    assert found["choices"][0]["finish_reason"] == expected.finish
    status, found, _ = server.call("POST", TEXT, {**body, "prompt": "one two"})
    (expected,) = alone.generate(["one two"], "math", chat=False, **options)
    assert texts(found) == [expected.text]


def test_json_schema_with_choices_and_streams(server):
    _, found = server.chat(**RANDOM, response_format=FORMAT, n=4, seed=1)
    for text in texts(found):
        jsonschema.validate(json.loads(text), SCHEMA)
    assert {choice["finish_reason"] for choice in found["choices"]} == {"stop"}
    assert len(set(texts(found))) == 4
    events = server.stream({**BODY, **RANDOM, "response_format": FORMAT, "n": 4, "seed": 1})
    _, found, _ = server.call("POST", CHAT, {**BODY, **RANDOM, "response_format": FORMAT, "n": 4, "seed": 1})
    streamed = [""] * 4
    for event in events:
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == texts(found)


def test_any_json_object(server):
    body = {**RANDOM, "response_format": {"type": "json_object"}, "n": 8, "logit_bias": {"98": 4}}  # }
    _, found = server.chat(**body)
    ended = [text for text, choice in zip(texts(found), found["choices"], strict=True)
             if choice["finish_reason"] == "stop"]  # fmt: skip
    assert ended
    assert all(isinstance(json.loads(text), dict) for text in ended)


def test_different_constraints_in_one_batch(server):
    bodies = [
        {"response_format": FORMAT, "model": "code"}, {"guided_regex": "[xy]{30}"}, {},
        {"guided_choice": ["no", "yes"]}, {"response_format": FORMAT, "model": "math:0.5", "top_k": 5},
        {"frequency_penalty": 1.5, "min_p": 0.01},
    ]  # fmt: skip
    bodies = [{**BODY, **RANDOM, "max_tokens": 60, "seed": row, **body} for row, body in enumerate(bodies)]
    expected = [texts(server.call("POST", CHAT, body)[1]) for body in bodies]
    found: dict[int, list[str]] = {}

    def send(row: int) -> None:
        found[row] = texts(server.call("POST", CHAT, bodies[row])[1])

    threads = [threading.Thread(target=send, args=[row]) for row in range(len(bodies))]
    with server.hold():
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert [found[row] for row in range(len(bodies))] == expected
    assert re.fullmatch("[xy]{30}", expected[1][0])


def test_cut_and_stopped(server):
    _, found = server.chat(**{**RANDOM, "max_tokens": 4}, response_format=FORMAT)
    assert found["choices"][0]["finish_reason"] == "length"
    _, found = server.chat(**RANDOM, guided_choice=["abcd"], stop="c", logprobs=True)
    assert (texts(found), found["choices"][0]["finish_reason"]) == (["ab"], "stop")


def test_text_is_no_constraint(server):
    assert texts(server.chat(response_format={"type": "text"})[1]) == texts(server.chat()[1])


@pytest.mark.parametrize(("fields", "param", "word"), [
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
     "response_format.json_schema.schema", "missing"),
    ({"response_format": {"type": "structural_tag"}}, "response_format.type", "json_object"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "text"}}}},
     "response_format", "text"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"uniqueItems": True}}}},
     "response_format", "uniqueItems"),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "unclosed"),
    ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern", ""),
    ({"guided_regex": "(a{1000}){1000}"}, "guided_regex", "too many"),
    ({"guided_choice": []}, "guided_choice", ""),
    ({"guided_choice": "a"}, "guided_choice", "list"),
    ({"guided_json": "{"}, "guided_json", ""),
    ({"guided_grammar": "start: b"}, "guided_grammar", "b"),
    ({"guided_regex": "a", "guided_json": {}}, "guided_regex", "guided_json"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "response_format"),
    ({"top_k": -2}, "top_k", "-1"), ({"top_k": 1.5}, "top_k", "integer"), ({"min_p": 1.1}, "min_p", "1"),
    ({"repetition_penalty": 0}, "repetition_penalty", "0"), ({"presence_penalty": 2.1}, "presence_penalty", "2"),
    ({"frequency_penalty": -3}, "frequency_penalty", "-2"), ({"frequency_penalty": "1"}, "frequency_penalty", "number"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "100"), ({"logit_bias": {"x": 1}}, "logit_bias", "'x'"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "'-1'"), ({"logit_bias": {"100": 1}}, "logit_bias", "token 100"),
    ({"logit_bias": {"50257": 1}}, "logit_bias", "token 50257"), ({"logit_bias": [5]}, "logit_bias", "object"),
])  # fmt: skip
def test_invalid_fields(server, fields, param, word):
    for path, body in ((CHAT, BODY), (TEXT, {"prompt": "one"})):
        for stream in (False, True):
            status, found, _ = server.call("POST", path, {**body, **fields, "stream": stream})
            assert (status, found["error"]["param"]) == (400, param), found
            assert word in found["error"]["message"]
            assert param in found["error"]["message"]


def test_the_field_of_the_responses_api(server):
    text = {"format": {"type": "json_schema", "name": "a", "schema": {"type": "text"}}}
    status, found, _ = server.call("POST", "/v1/responses", {"input": "one", "text": text})
    assert (status, found["error"]["param"]) == (400, "text.format")


def test_a_constraint_without_a_continuation_fails_its_request_only(server):
    status, found = server.chat(guided_json={"const": "abé"})  # not in this vocabulary
    assert (status, found["error"]["code"]) == (400, "structured_output")
    assert server.chat(guided_choice=["yes"])[0] == 200


@pytest.mark.parametrize("fields", [
    {"top_k": 3}, {"min_p": 0.2}, {"repetition_penalty": 1.7}, {"presence_penalty": 1.9}, {"frequency_penalty": -1.5},
    {"logit_bias": {"5": -100.0, "20": 6}},
])  # fmt: skip
@pytest.mark.parametrize("temperature", [0, 1.2])
def test_sampling_options(server, alone, fields, temperature):
    sampling = {**fields, "logit_bias": {int(key): value for key, value in fields.get("logit_bias", {}).items()}}
    (expected,) = alone.generate(
        ["one two"], "math", do_sample=temperature > 0, temperature=temperature or 1.0, seeds=[4], max_new_tokens=24,
        form="factored", **sampling,
    )  # fmt: skip
    body = {"model": "math", "temperature": temperature, "seed": 4, "max_tokens": 24}
    assert texts(server.chat(**body, **fields)[1]) == [expected.text]
    if temperature or not {"top_k", "min_p"} & set(fields):
        assert texts(server.chat(**body)[1]) != [expected.text]


def test_a_bias_under_greedy_decoding(server):
    letter = build_tokenizer().convert_tokens_to_ids("q")
    _, found, _ = server.call("POST", TEXT, {"prompt": "one", "max_tokens": 5, "logit_bias": {str(letter): 100}})
    assert texts(found) == ["qqqqq"]
    neutral = {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "logit_bias": {}}
    assert texts(server.chat(**neutral)[1]) == texts(server.chat()[1])
