"""Tool calls in the text of a reply, in the formats of known chat templates."""

from __future__ import annotations

import json
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

from sigmix.errors import ConfigError

LONGEST_LITERAL = 6
"""Characters of the longest JSON token outside of a string that is invalid while incomplete, such as ``fals``."""


@dataclass(frozen=True)
class ToolCall:
    """Call of a function; ``arguments`` is the text of a JSON object."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: secrets.token_hex(5)[:9])  # nine characters, as Mistral's templates require


class NotACall(Exception):
    """The text is not a tool call, however it goes on."""


class ToolCallParser(ABC):
    """Incremental parser of one reply.

    Text outside of calls is returned as soon as it cannot be the beginning of a call; malformed calls are text.
    Whitespace beside calls is dropped.

    Args:
        tools: function tools of the request.
        parallel: keep all calls; False: the first one.

    Attributes:
        markers: texts that begin or divide calls; tokenizers have some of them as special tokens.
        calls: found so far.
    """

    markers: ClassVar[tuple[str, ...]] = ()
    """Texts that begin or divide calls; tokenizers have some of them as special tokens."""

    def __init__(self, tools: Sequence[Mapping[str, Any]] = (), parallel: bool = True) -> None:
        self.parallel = parallel
        self.functions = {tool["function"]["name"]: tool["function"] for tool in tools}
        self.calls: list[ToolCall] = []
        self._buffer = ""

    def feed(self, text: str, final: bool = False) -> str:
        """Append text of the reply; return its new text outside of calls, and add new calls to ``calls``.

        Args:
            final: the reply ends here.
        """
        self._buffer += text
        content = ""
        while self._buffer:
            outside = self._buffer[: self.start(self._buffer, final)].rstrip()
            content, self._buffer = content + outside, self._buffer[len(outside) :]
            body = self._buffer.lstrip()
            if not body:
                break
            try:
                end = self.parse(body, final)
                if end is None and final:
                    raise NotACall
            except NotACall:
                skipped = len(self._buffer) - len(body) + 1
                content, self._buffer = content + self._buffer[:skipped], self._buffer[skipped:]
                continue
            if end is None:
                break
            self._buffer = body[end:]
        if final and not self.calls:
            content += self._buffer
        return content

    def start(self, text: str, final: bool) -> int:
        """Return the position at which a call may begin, or the length of the text."""
        marker = self.markers[0]
        if (place := text.find(marker)) >= 0:
            return place
        partial = (n for n in range(len(marker) - 1, 0, -1) if not final and text.endswith(marker[:n]))
        return len(text) - next(partial, 0)

    @abstractmethod
    def parse(self, body: str, final: bool) -> int | None:
        """Add the calls at the beginning of a text; return where they end, or None if more text is needed.

        Raises:
            NotACall: the text does not begin with a call.
        """

    def add(self, value: Any) -> None:
        """Add a call, or a list of them, from JSON.

        Raises:
            NotACall: not a call.
        """
        calls = []
        for call in value if isinstance(value, list) else [value]:
            call = call.get("function", call) if isinstance(call, dict) else {}
            call = call if isinstance(call, dict) else {}
            arguments = call.get("arguments", call.get("parameters", {}))
            if isinstance(arguments, str):
                arguments, _ = decode(arguments, 0) or (None, 0)
            if not isinstance(arguments, dict) or not isinstance(name := call.get("name"), str) or not name:
                raise NotACall
            calls.append(ToolCall(name, json.dumps(arguments, ensure_ascii=False)))
        self.calls += calls
        if not self.parallel:
            del self.calls[1:]


class HermesParser(ToolCallParser):
    """``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, as in Hermes, Qwen2.5 and Qwen3."""

    markers = ("<tool_call>", "</tool_call>")

    def parse(self, body: str, final: bool) -> int | None:
        if not body.startswith(self.markers[0]):
            return None
        decoded = decode(body, len(self.markers[0]))
        if decoded is None:
            return None
        value, end = decoded
        rest = body[end:].lstrip()
        closed = rest.startswith(self.markers[1])
        if not closed and not self.markers[1].startswith(rest):
            raise NotACall
        if not closed and not final:
            return None
        self.add(value)
        return len(body) - len(rest) + len(self.markers[1]) if closed else len(body)  # a reply may end without the tag


class QwenCoderParser(ToolCallParser):
    """``<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>``, as in Qwen3-Coder."""

    markers = ("<tool_call>", "</tool_call>")
    call = re.compile(r"<tool_call>\s*<function=([^>\n]+)>(.*?)</function>\s*</tool_call>", re.DOTALL)
    parameter = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)

    def parse(self, body: str, final: bool) -> int | None:
        match = self.call.match(body)
        if match is None:
            if self.markers[1] in body:
                raise NotACall
            return None
        name, inner = match.groups()
        if self.parameter.sub("", inner).strip():
            raise NotACall
        schema = self.functions.get(name, {}).get("parameters", {}).get("properties", {})
        arguments = {key: self.value(text, schema.get(key)) for key, text in self.parameter.findall(inner)}
        self.add({"name": name, "arguments": arguments})
        return match.end()

    @staticmethod
    def value(text: str, schema: Any) -> Any:
        """Return a parameter's value: JSON if its schema names types, but no string, and the text is valid."""
        schemas = [schema, *schema.get("anyOf", [])] if isinstance(schema, dict) else []
        types = {str(one["type"]) for one in schemas if isinstance(one, dict) and "type" in one}
        if types and not any("string" in type for type in types):
            try:
                return json.loads(text)
            except ValueError:
                pass
        return text


class LlamaParser(ToolCallParser):
    """``{"name": …, "parameters": {…}}``, as in Llama 3: bare or after ``<|python_tag|>``; ``;`` divides several.

    A bare object is a call if its name is that of a tool.
    """

    markers = ("<|python_tag|>",)
    keys = ('{"name":', '{"type":"function"', '{"parameters":', '{"arguments":', '{"function":')

    def start(self, text: str, final: bool) -> int:
        starts = [super().start(text, final)]
        for match in re.finditer("{", text):
            head = "".join(text[match.start() : match.start() + 64].split())
            if any(head.startswith(key) or key.startswith(head) for key in self.keys):
                starts.append(match.start())
                break
        return min(starts)

    def parse(self, body: str, final: bool) -> int | None:
        tag = self.markers[0]
        if tag.startswith(body) and body != tag:
            return None
        tagged = body.startswith(tag)
        decoded = decode(body, len(tag) if tagged else 0)
        if decoded is None:
            return None
        value, end = decoded
        rest = body[end:].lstrip()
        if not rest and not final:  # a divider may follow
            return None
        if not tagged and (not isinstance(value, dict) or self._name(value) not in self.functions):
            raise NotACall
        self.add(value)
        return len(body) - len(rest) + 1 if rest.startswith(";") else end

    @staticmethod
    def _name(value: Mapping[str, Any]) -> Any:
        inner = value.get("function")
        return inner.get("name") if isinstance(inner, dict) else value.get("name")


class MistralParser(ToolCallParser):
    """``[TOOL_CALLS][{"name": …, "arguments": {…}}]``, or ``[TOOL_CALLS]NAME[ARGS]{…}`` of later versions."""

    markers = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
    head = re.compile(r"\[TOOL_CALLS\]\s*(?:([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*)?(?=[\[{])")

    def parse(self, body: str, final: bool) -> int | None:
        match = self.head.match(body)
        decoded = decode(body, match.end()) if match else None
        if match is None or decoded is None:
            return None
        value, end = decoded
        self.add({"name": match[1], "arguments": value} if match[1] else value)
        return end


class JsonParser(ToolCallParser):
    """``[{"name": …, "parameters": {…}}]`` and nothing else, as the grammar of a required call has it."""

    def start(self, text: str, final: bool) -> int:
        return 0 if text.lstrip().startswith("[") else len(text)

    def parse(self, body: str, final: bool) -> int | None:
        decoded = decode(body, 0)
        if decoded is None:
            return None
        self.add(decoded[0])
        return decoded[1]


def required_calls(functions: Iterable[Mapping[str, Any]], parallel: bool) -> dict[str, Any]:
    """Return the JSON schema of the replies that `JsonParser` reads: calls of these functions.

    Arguments beside the declared ones are excluded unless a function's schema permits them.
    """
    calls: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for function in functions:
        schema = {"type": "object", **function["parameters"]}
        for key in DEFINITIONS:  # references to them begin at the root
            definitions[key] = {**definitions.get(key, {}), **schema.pop(key, {})}
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
        properties = {"name": {"const": function["name"]}, "parameters": schema}
        calls.append({
            "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
        })  # fmt: skip
    limits = {"minItems": 1} if parallel else {"minItems": 1, "maxItems": 1}
    return {"type": "array", "items": {"anyOf": calls}, **limits, **definitions, "x-guidance": COMPACT}


COMPACT = {"whitespace_flexible": False, "whitespace_pattern": "", "item_separator": ", ", "key_separator": ": "}
"""JSON in one line, as in the training data of models."""

DEFINITIONS = ("$defs", "definitions")  # keys of a JSON schema's definitions

FORMATS: Sequence[tuple[str, type[ToolCallParser]]] = (
    (r"\[TOOL_CALLS\]", MistralParser),
    (r"<function=", QwenCoderParser),
    (r'<tool_call>(\\n|\s)*\{+\\?"(name|arguments)', HermesParser),
    (r'\{\\?"name\\?": [^{}]*"parameters\\?":', LlamaParser),
)
"""Patterns in the text of a chat template, and the format of its tool calls."""


def tool_call_parser(template: str | None) -> type[ToolCallParser]:
    """Return the parser for the tool calls of a chat template.

    Raises:
        ConfigError: the format is not known.
    """
    for pattern, parser in FORMATS:
        if re.search(pattern, template or ""):
            return parser
    raise ConfigError(
        "the format of tool calls in the model's chat template is not known",
        remedy="use a base model with tool calls as in Hermes, Qwen, Llama 3 or Mistral, or leave out tools",
    )


def _no_constant(name: str) -> NoReturn:
    raise NotACall  # NaN and Infinity are not JSON


DECODER = json.JSONDecoder(strict=False, parse_constant=_no_constant)


def decode(text: str, start: int) -> tuple[Any, int] | None:
    """Return a JSON value in a text after optional whitespace, and its end; None if it may be incomplete.

    Raises:
        NotACall: not JSON.
    """
    start = len(text) - len(text[start:].lstrip())
    try:
        return DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        incomplete = error.msg.startswith("Unterminated string") or error.pos >= len(text) - LONGEST_LITERAL
        if not incomplete:
            raise NotACall from error
        return None
    except RecursionError as error:
        raise NotACall from error
