"""Columns of labelled data: which of them hold prompt and answer, and rows as conversations."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sigmix.errors import ConfigError, DataError
from sigmix.tasks.data import Row

PROMPTS = (
    "prompt", "question", "instruction", "text", "input", "sentence", "query", "utterance", "request", "message",
    "document", "body", "content", "source", "review", "ticket", "email", "title",
)  # fmt: skip
ANSWERS = (
    "completion", "answer", "output", "response", "label_text", "label_name", "label", "labels", "intent", "category",
    "class", "target", "sentiment", "topic", "solution", "expected", "reply", "gold",
)  # fmt: skip
CHATS = ("messages", "conversations", "conversation")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "developer": "system", "model": "assistant"}
NAME_COLUMNS = "name them: --prompt COLUMN --answer COLUMN, or --template 'Text: {COLUMN}' --answer COLUMN"
_OUTER = re.compile(r"\A[\s\u200b\u2060\ufeff]+|[\s\u200b\u2060\ufeff]+\Z")  # blanks, also those without width
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


@dataclass(frozen=True)
class Labelled:
    """A row as a conversation that ends with the user, and its answer ("" if the file has none).

    Attributes:
        item: the row's columns, for graders; of a conversation also its last message, as "answer", unless there is such
            a column. where: file and line.
    """

    prompt: str
    answer: str
    system: str | None
    history: tuple[Mapping[str, str], ...]
    item: Mapping[str, Any]
    where: str

    @property
    def turns(self) -> str | list[Mapping[str, str]]:
        """The prompt, or all messages but the system's, see `Sample.turns`."""
        return [*self.history, {"role": "user", "content": self.prompt}] if self.history else self.prompt

    @property
    def text(self) -> str:
        """All texts of the conversation, a line each."""
        return "\n".join([self.system or "", *(turn["content"] for turn in self.history), self.prompt, self.answer])


@dataclass(frozen=True)
class Columns:
    """Mapping from a row's columns to prompt and answer.

    Attributes:
        prompt: column of the prompt, or of the messages if ``chat``; "" with a template.
        answer: column of the answer; None: the last message, or no answer.
        context: column that follows the prompt after a blank line, where it is not empty (instruction/input/output).
        system: column of a system turn. template: text with {column} in place of the prompt.
        label_names: names of numeric labels, from 0 on.
    """

    prompt: str
    answer: str | None
    chat: bool = False
    context: str | None = None
    system: str | None = None
    template: str | None = None
    label_names: tuple[str, ...] = ()

    @classmethod
    def detect(
        cls,
        row: Row,
        prompt: str | None = None,
        answer: str | None = None,
        template: str | None = None,
        label_names: Sequence[str] = (),
        needs_answer: bool = True,
    ) -> Columns:
        """Return the mapping for a file's first row; columns that are given are not guessed.

        Raises:
            DataError: no such column, or none that is known for prompts or answers.
        """
        names = {name.casefold(): name for name in row.data}
        system, label_names = names.get("system"), tuple(label_names)
        for column in (prompt, answer, *(template_fields(template) if template else ())):
            if column is not None and column not in row.data:
                raise _no_column(row, column)
        if prompt and template:
            raise ConfigError("--prompt and --template exclude each other", remedy="give one of them")
        first = next((names[name] for name in CHATS if isinstance(row.data.get(names.get(name, "")), list)), None)
        if prompt is None and template is None and answer is None and first is not None:
            return cls(first, None, chat=True, system=system, label_names=label_names)
        context = None
        if prompt is None and template is None:
            if {"instruction", "input"} <= names.keys() and answer != names["input"]:
                context = names["input"]
            prompt = _guess(row, names, PROMPTS, answer, "prompts")
        if answer is None and needs_answer:
            answer = _guess(row, names, ANSWERS, prompt, "answers")
        chat = prompt is not None and isinstance(row.data[prompt], list)
        return cls(prompt or "", answer, chat, context, system, template, label_names)

    def read(self, row: Row) -> Labelled | None:
        """Return a row's conversation; None for one that its file excludes from training (weight 0).

        Raises:
            DataError: an empty, nested or missing value, or messages that cannot be learned.
        """
        system = text_of(row, self.system, empty=True) if self.system else None
        answer = None if self.answer is None else self._answer(row)
        if self.chat:
            return _conversation(row, row.data.get(self.prompt), self.prompt, system, answer)
        if self.template is not None:
            prompt = fill(self.template, lambda name: text_of(row, name, empty=True))
            if not prompt.strip():
                raise row.bad("the prompt is empty")
        else:
            prompt = text_of(row, self.prompt)
        if self.context and (more := text_of(row, self.context, empty=True)):
            prompt = f"{prompt}\n\n{more}"
        return Labelled(prompt, answer or "", system or None, (), row.data, row.where)

    def _answer(self, row: Row) -> str:
        assert self.answer is not None
        value = row.data.get(self.answer)
        if isinstance(value, list) and value and isinstance(value[-1], dict) and "content" in value[-1]:
            if len(value) != 1 or value[0].get("role") != "assistant":
                raise row.bad(f"column {self.answer!r} must be one message of the assistant")
            value = value[0]["content"]
        if self.label_names:
            number = int(str(value)) if str(value).isdecimal() else -1
            if not 0 <= number < len(self.label_names):
                raise row.bad(f"label {value!r} is not a number from 0 to {len(self.label_names) - 1}")
            return self.label_names[number]
        if isinstance(value, (dict, list)) and value:
            return json.dumps(value, ensure_ascii=False)
        return text_of(replace(row, data={self.answer: value}), self.answer)

    def describe(self) -> str:
        """Return the mapping in words."""
        if self.chat and self.answer is None:
            return f"conversation in {self.prompt!r}, answer in its last message"
        source = f"template {self.template!r}" if self.template else f"prompt in {self.prompt!r}"
        source += f" with {self.context!r}" if self.context else ""
        source += f", system turn in {self.system!r}" if self.system else ""
        return source + (f", answer in {self.answer!r}" if self.answer else ", no answers")


def template_fields(template: str) -> list[str]:
    """Return the columns of a template: "Ticket: {text}" -> ["text"]; {{ and }} are braces.

    Raises:
        ConfigError: there are none.
    """
    fields = [match[1] for match in _FIELD.finditer(template) if match[1]]
    if not fields:
        raise ConfigError(f"the template {template!r} has no {{column}}", remedy="for example: 'Ticket: {text}'")
    return fields


def fill(template: str, value: Callable[[str], str]) -> str:
    """Return a template with ``value(column)`` in place of each {column}."""
    return _FIELD.sub(lambda match: match[0][0] if match[1] is None else value(match[1]), template)


def text_of(row: Row, column: str, empty: bool = False) -> str:
    """Return a column's value as text: strings as they are but without outer blanks, numbers and dates as written.

    Raises:
        DataError: the value is missing, blank (unless ``empty``), a list or an object.
    """
    value = row.data.get(column)
    if isinstance(value, bool):
        value = json.dumps(value)
    elif isinstance(value, (int, decimal.Decimal)) or (isinstance(value, float) and math.isfinite(value)):
        value = str(value)
    elif isinstance(value, (datetime.date, datetime.time)):
        value = value.isoformat()
    text = "" if value is None else _OUTER.sub("", value) if isinstance(value, str) else None
    if text is None:
        raise row.bad(f"column {column!r} holds a {type(value).__name__}, not text")
    if not text and not empty:
        raise DataError(
            f"{row.where}: column {column!r} is empty", remedy="fill it in, or leave such rows out with --skip-invalid"
        )
    return text


def _no_column(row: Row, column: str) -> DataError:
    return DataError(f"{row.file} has no column {column!r}; it has {', '.join(row.data)}", remedy=NAME_COLUMNS)


def _guess(row: Row, names: Mapping[str, str], candidates: Sequence[str], taken: str | None, role: str) -> str:
    column = next((names[name] for name in candidates if name in names and names[name] != taken), None)
    if column is None:
        raise DataError(f"{row.file}: no known column of {role} among {', '.join(row.data)}", remedy=NAME_COLUMNS)
    return column


def _conversation(row: Row, value: Any, column: str, system: str | None, answer: str | None) -> Labelled | None:
    """Return the conversation of OpenAI's or ShareGPT's messages; ``answer`` is given if it is in another column."""
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise row.bad(f"column {column!r} must be a list of messages")
    turns = []
    for number, message in enumerate(value, 1):
        place = f"message {number} of {column!r}"
        role = message.get("role", message.get("from"))
        role = ROLES.get(str(role), role)
        if role not in ("system", "user", "assistant") or message.get("tool_calls") or message.get("function_call"):
            raise row.bad(f"{place} is of role {role!r} or calls tools, which an expert is not trained on")
        content = message.get("content", message.get("value"))
        if isinstance(content, list):
            if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
                raise row.bad(f"{place} has a part that is not text; only text is supported")
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str) or not _OUTER.sub("", content):
            raise row.bad(f"{place} is empty")
        if role == "system":
            if number > 1:
                raise row.bad(f"{place} is a system message, which must be the first")
            system = content
            continue
        turns.append({"role": role, "content": _OUTER.sub("", content)})
    if answer is None and turns and turns[-1]["role"] == "assistant":
        answer = turns.pop()["content"]
        if value[-1].get("weight") == 0:
            return None
    elif answer is None:
        answer = ""
    if not turns or turns[-1]["role"] != "user":
        raise row.bad(f"the conversation in {column!r} must have a user's message before the assistant's answer")
    item = {"answer": answer, **row.data} if answer else row.data
    return Labelled(turns[-1]["content"], answer, system, tuple(turns[:-1]), item, row.where)
