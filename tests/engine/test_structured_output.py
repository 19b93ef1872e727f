"""Structured output: random text under a constraint matches it, each row by its own, whatever its batch mates do."""

from __future__ import annotations

import json
import re

import jsonschema
import llguidance
import pytest
from helpers_engine import expert
from helpers_tiny import build_tiny, build_tokenizer
from helpers_tokenizers import KINDS
from pydantic import BaseModel

from sigmix.engine import Engine
from sigmix.engine.structured_output import StructuredOutput
from sigmix.errors import ConfigError, StructuredOutputError
from sigmix.experts.bank import Bank

TEXT = {"type": "string", "maxLength": 6}
SCHEMAS = {
    "nested": {
        "type": "object",
        "properties": {"name": TEXT, "at": {"type": "object", "properties": {"x": {"type": "integer"}},
                                            "required": ["x"], "additionalProperties": False}},
        "required": ["name", "at"], "additionalProperties": False,
    },
    "optional": {"type": "object", "properties": dict.fromkeys("abc", TEXT), "additionalProperties": False},
    "enum": {"enum": ["red", 3, None, True, {"a": [1]}]},
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": "k"}], "items": False, "minItems": 2},
    "ref": {
        "$defs": {"point": {"type": "object", "properties": {"y": {"type": "integer", "minimum": -9, "maximum": 9}},
                            "required": ["y"], "additionalProperties": False}},
        "type": "array", "items": {"$ref": "#/$defs/point"}, "minItems": 1, "maxItems": 2,
    },
    "anyOf": {"anyOf": [{"type": "integer", "multipleOf": 5, "minimum": 0}, {"type": "null"}, {"const": "none"}]},
    "allOf": {"allOf": [{"type": "string", "minLength": 3}, {"maxLength": 5}]},
    "number": {"type": "number", "exclusiveMinimum": 0.5, "maximum": 2},
    "pattern": {"type": "string", "pattern": "^[A-F]{2}-\\d{3}$"},
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 2},
    "date": {"type": "string", "format": "date"},
}  # fmt: skip
OTHERS = {
    "regex": StructuredOutput(regex=r"[ab]{3}(-\d+)?"),
    "choice": StructuredOutput(choice=["yes", "yes.", "no (really?)", "a|b", "x\ny", '"']),
    "grammar": StructuredOutput(grammar='start: "sum " number (" + " number)*\nnumber: /[0-9]{1,3}/'),
    "gbnf": StructuredOutput(grammar='root ::= "sum " [0-9] [0-9]'),
}
OUTPUTS = {**{name: StructuredOutput(json=schema) for name, schema in SCHEMAS.items()}, **OTHERS}
PATTERNS = {
    "regex": r"[ab]{3}(-\d+)?", "choice": r"yes\.?|no \(really\?\)|a\|b|x\ny|\"", "gbnf": r"sum \d\d",
    "grammar": r"sum \d{1,3}( \+ \d{1,3})*",
}  # fmt: skip


def check(name: str, text: str) -> None:
    """Fail unless a text matches the constraint of a name in `OUTPUTS`."""
    if name in PATTERNS:
        assert re.fullmatch(PATTERNS[name], text)
    else:
        jsonschema.validate(json.loads(text), SCHEMAS[name], format_checker=jsonschema.FormatChecker())


@pytest.fixture(scope="module")
def engine():
    model = build_tiny(max_position_embeddings=1024)
    return Engine(model, build_tokenizer(), {"math": expert(model, "math", 1)})


def test_random_text_under_every_constraint_in_one_batch(engine):
    names = [name for name in OUTPUTS for _ in range(4)]
    mixes = ["math" if row % 2 else "base" for row in range(len(names))]
    found = engine.generate(
        ["one two"] * len(names), mixes, structured_output=[OUTPUTS[name] for name in names], do_sample=True,
        max_new_tokens=300,
    )  # fmt: skip
    ended = {name for name, one in zip(names, found, strict=True) if one.finish == "stop"}
    assert ended == set(OUTPUTS)
    for name, one in zip(names, found, strict=True):
        assert one.finish in ("stop", "length")
        if one.finish == "stop":
            check(name, one.text)
    assert len({one.text for one in found}) > len(names) / 2


def test_a_row_equals_itself_alone(engine):
    names = ["nested", None, "regex", "choice", "map", None, "grammar"]
    outputs = [OUTPUTS.get(name) for name in names]
    options = {"do_sample": True, "temperature": 1.3, "top_k": 60, "max_new_tokens": 60}
    together = engine.generate(["one"] * len(names), "math", structured_output=outputs, **options)
    for row, output in enumerate(outputs):
        (alone,) = engine.generate(["one"], "math", structured_output=output, seeds=[row], **options)
        assert alone.ids == together[row].ids
        streamed = engine.stream("one", "math", structured_output=output, seed=row, **options)
        assert "".join(streamed) == together[row].text
    free = engine.generate(["one"] * 2, "math", seeds=[1, 5], **options)
    assert [one.ids for one in free] == [together[1].ids, together[5].ids]


@pytest.mark.parametrize("options", [
    {}, {"do_sample": True, "temperature": 2.0, "top_p": 0.01}, {"do_sample": True, "top_k": 1},
    {"do_sample": True, "min_p": 1.0}, {"repetition_penalty": 3.0, "presence_penalty": 2.0},
    {"logit_bias": {70: 100.0, 71: 100.0, 2: 100.0}},
])  # fmt: skip
def test_sampling_options_choose_among_the_allowed_tokens(engine, options):
    names = ["ref", "enum", "pattern", "choice"]
    found = engine.generate(
        ["one"] * 4, structured_output=[OUTPUTS[name] for name in names], max_new_tokens=200, **options
    )
    for name, one in zip(names, found, strict=True):
        assert one.finish == "stop"
        check(name, one.text)


def test_log_probabilities_are_the_models_own(engine):
    (one,) = engine.generate(["one"], structured_output=OUTPUTS["pattern"], max_new_tokens=20)
    assert one.logprobs == pytest.approx(engine.score(["one"], [one.ids])[0], abs=1e-4)
    assert min(one.logprobs) < -1


def test_the_end(engine):
    (cut,) = engine.generate(["one"], structured_output=OUTPUTS["nested"], max_new_tokens=5)
    assert (cut.finish, len(cut.ids)) == ("length", 5)
    # the end token is allowed where the constraint is satisfied, and only there
    end = {"logit_bias": {2: 100.0}}
    (ended,) = engine.generate(["one"], structured_output=StructuredOutput(regex="a{2,9}"), **end)
    assert (ended.text, ended.finish, ended.ids[-1]) == ("aa", "stop", 2)
    # nothing can follow: no end token is needed
    (complete,) = engine.generate(["one"], structured_output=StructuredOutput(regex="a{2}"))
    assert (complete.text, complete.finish, len(complete.ids)) == ("aa", "stop", 2)
    (stopped,) = engine.generate(["one"], structured_output=StructuredOutput(choice=["abcd"]), stop_strings=["c"])
    assert (stopped.text, stopped.finish) == ("ab", "stop")


def test_several_completions_of_one_prompt(engine):
    found = engine.generate(
        ["one", "two"], structured_output=[OUTPUTS["number"], OUTPUTS["choice"]], num_return_sequences=8,
        do_sample=True, max_new_tokens=100,
    )  # fmt: skip
    assert len(found) == 16
    for one in found[:8]:
        check("number", one.text)
    for one in found[8:]:
        check("choice", one.text)
    assert len({one.text for one in found[:8]}) > 1 < len({one.text for one in found[8:]})


def test_tokens_beyond_the_tokenizer_are_not_chosen(engine):
    assert engine.model.config.vocab_size == 256 > len(engine.tokenizer)
    (one,) = engine.generate(["one"], structured_output=StructuredOutput(regex="[^x]{40}"), do_sample=True)
    assert len(one.text) == 40
    assert max(one.ids) < len(engine.tokenizer)


def test_whitespace_is_bounded(engine):
    spaces = {"logit_bias": {4: 100.0, 5: 100.0}}
    (one,) = engine.generate(["one"], structured_output=StructuredOutput(json_object=True), max_new_tokens=80, **spaces)
    assert json.loads(one.text) is not None or one.finish == "length"
    assert not re.search(r"\s{24}", one.text)


class Person(BaseModel):
    age: int
    tags: list[bool]


def test_a_schema_as_text_and_as_a_pydantic_model(engine):
    for schema in (Person, json.dumps(Person.model_json_schema())):
        (one,) = engine.generate(
            ["one"], structured_output=StructuredOutput(json=schema), do_sample=True, max_new_tokens=400, seeds=[3]
        )
        assert one.finish == "stop"
        Person.model_validate_json(one.text)


@pytest.mark.parametrize(("output", "message"), [
    ({"json": {"type": "strin"}}, "JSON schema.*strin"),
    ({"json": {"not": {}}}, "JSON schema.*not"),
    ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    ({"json": {"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True}}, "uniqueItems"),
    ({"json": {"type": "string", "format": "iban"}}, "iban"),
    ({"json": {"$ref": "#/$defs/a"}}, "/[$]defs/a"),
    ({"json": {"$ref": "https://example.com/a.json"}}, "example.com"),
    ({"json": {"type": "integer", "minimum": 3, "maximum": 1}}, "minimum"),
    ({"json": "{"}, "JSON schema"),
    ({"json": [1]}, "JSON schema"),
    ({"json": {"enum": []}}, "JSON schema"),
    ({"regex": "(a"}, "regex.*unclosed"),
    ({"regex": r"(?=a)a"}, "regex.*look-ahead"),
    ({"regex": "(a{1000}){1000}"}, "regex.*too many"),
    ({"regex": "a" * 200_000}, "regex.*200"),
    ({"choice": []}, "choice"),
    ({"choice": [1]}, "choice"),
    ({"grammar": "start: other"}, "grammar.*other"),
    ({}, "not none"),
    ({"regex": "a", "choice": ["a"]}, "regex and choice"),
])  # fmt: skip
def test_invalid_constraints(engine, output, message):
    with pytest.raises(StructuredOutputError, match=message):
        engine.generate(["one"], structured_output=StructuredOutput(**output))


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "gemma"])
def test_tokenizers(kind):
    tokenizer = KINDS[kind]()
    engine = Engine(build_tiny(vocab_size=len(tokenizer) + 7), tokenizer, {})
    patterns = ["( The| capital| a){2,3}b?", "(The|capital)( is Paris){1,2}", "é{1,3}", " {3}", "日|本", "[0-9]{3}\n?"]
    found = engine.generate(
        [[5, 6]] * len(patterns), structured_output=[StructuredOutput(regex=pattern) for pattern in patterns],
        num_return_sequences=4, do_sample=True, temperature=2.0, chat=True,
    )  # fmt: skip
    for row, one in enumerate(found):
        assert one.finish == "stop"
        assert re.fullmatch(patterns[row // 4], one.text)


def test_a_vocabulary_without_bytes():
    tokenizer = KINDS["metaspace"]()  # T5's: some words and no bytes
    engine = Engine(build_tiny(vocab_size=len(tokenizer)), tokenizer, {})
    words, no_words = StructuredOutput(regex="( The| capital){2}"), StructuredOutput(regex="The")
    found = engine.generate(
        [[5]] * 8, structured_output=words, do_sample=True, temperature=2.0, keep_errors=True, chat=False
    )
    # "▁" is the beginning of a match, but "The" is not a token
    assert {one.finish for one in found} == {"stop", "error"}
    for one in found:
        assert one.finish == "error" or re.fullmatch("( The| capital){2}", one.text)
    with pytest.raises(StructuredOutputError, match="vocabulary"):
        engine.generate([[5]], structured_output=no_words)


def test_long_chains_of_references(engine):
    # on a common stack the library's recursion would end the process
    count = 4000
    names = {f"{i:x}": {"$ref": f"#/$defs/{i + 1:x}"} for i in range(count)}
    schema = {"$defs": {**names, f"{count:x}": {"enum": ["end"]}}, "$ref": "#/$defs/0"}
    rules = "\n".join(f"a{i}: a{i + 1}" for i in range(count))
    outputs = [StructuredOutput(json=schema), StructuredOutput(grammar=f'start: a0\n{rules}\na{count}: "end"')]
    assert [one.text for one in engine.generate(["one"] * 2, structured_output=outputs)] == ['"end"', "end"]


def test_one_constraint_for_each_prompt(engine):
    with pytest.raises(ConfigError, match="1 structured outputs for 2 prompts"):
        engine.generate(["one", "two"], structured_output=[None])


def test_a_constraint_that_fails_ends_its_row_only(engine):
    # é is not in this vocabulary
    outputs = [StructuredOutput(json={"const": "abé"}), OUTPUTS["choice"], None]
    broken, good, free = engine.generate(["one"] * 3, structured_output=outputs, keep_errors=True, max_new_tokens=9)
    assert (broken.finish, type(broken.error)) == ("error", StructuredOutputError)
    assert good.text == engine.generate(["one"], structured_output=outputs[1], max_new_tokens=9)[0].text
    assert free.ids == engine.generate(["one"], max_new_tokens=9)[0].ids
    with pytest.raises(StructuredOutputError, match="structured output"):
        engine.generate(["one"], structured_output=outputs[0])


def test_constraints_are_compiled_once(engine, monkeypatch):
    limits, compiled = llguidance.LLParserLimits, []
    monkeypatch.setattr(llguidance, "LLParserLimits", lambda **options: compiled.append(1) or limits(**options))
    first, second = (engine.compile_grammar(StructuredOutput(regex="once[0-9]")) for _ in range(2))
    assert len(compiled) == 1
    assert first.consume_token(engine.tokenizer.encode("o")[0])  # the matchers are independent
    assert first.compute_bitmask() != second.compute_bitmask()
    engine.compile_grammar(StructuredOutput(regex="once[0-8]"))
    assert len(compiled) == 2


COMPLETE = 4  # of the first seven answers below end before the token limit


@pytest.mark.slow
@pytest.mark.real
def test_the_real_model_under_mixtures(smollm):
    engine = Engine(*smollm, Bank.bundled())
    names = ["nested", "ref", "regex", "map", "pattern", "choice", "grammar"]
    outputs = [*(OUTPUTS[name] for name in names), StructuredOutput(choice=["日本", "naïve 😀"]), None]
    mixes = ["sums:0.7+dates:0.3", "base", "sums"] * 3
    found = engine.generate(
        ["Answer."] * 9, mixes, structured_output=outputs, do_sample=True, temperature=1.5, max_new_tokens=60
    )
    for name, one in zip(names, found, strict=False):
        if one.finish == "stop":
            check(name, one.text)
    assert sum(one.finish == "stop" for one in found[:7]) >= COMPLETE
    assert found[7].text in ("日本", "naïve 😀")
