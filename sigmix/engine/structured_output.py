"""Structured output: answers constrained by a JSON schema, a regular expression, a list of choices or a grammar.

A constraint is compiled by llguidance to a matcher of tokens, which yields the set of allowed tokens at each step.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from sigmix.engine.detokenizer import token_decoder
from sigmix.errors import StructuredOutputError
from sigmix.utils.optional import optional

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

WHITESPACE = r" |\n{1,2}[ \t]{0,20}"
"""Whitespace between JSON tokens, as in llama.cpp; unbounded, small models repeat it until the length limit."""

MAX_CHARACTERS = 1 << 17
"""Size of a constraint."""

MAX_ITEMS = 20_000
"""Alternatives of a grammar at one position, such as optional properties."""

CACHED_GRAMMARS = 64
"""Compiled constraints that an engine keeps."""

STACK_BYTES = 256 << 20
"""Stack for compilation: llguidance recurses along chains of references, and an overflow would end the process."""

_compiling = threading.Lock()  # one at a time, so that large constraints leave the other cores to decoding


@dataclass(frozen=True)
class StructuredOutput:
    """Constraint on the text of an answer; exactly one of the fields is set, named as in vLLM.

    Attributes:
        json: JSON schema: an object, its text, or a pydantic model.
        json_object: any JSON object.
        regex: regular expression of the whole answer, in the syntax of Rust's crate ``regex``.
        choice: the possible answers.
        grammar: context-free grammar in llguidance's variant of Lark, or in GBNF.

    Raises:
        StructuredOutputError: no field, or several.
    """

    json: Mapping[str, Any] | str | type | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [one.name for one in fields(self) if getattr(self, one.name) not in (None, False)]
        if len(given) != 1:
            raise StructuredOutputError(
                f"a structured output has one constraint, not {' and '.join(given) or 'none'}",
                remedy=f"give one of {', '.join(one.name for one in fields(self))}",
            )

    @cached_property
    def serialized(self) -> str:
        """The constraint in llguidance's format.

        Raises:
            StructuredOutputError: a constraint of the wrong type, too large, or llguidance is not installed.
        """
        guidance = _llguidance()
        try:
            if self.json_object:
                text = _json_grammar({"type": "object"})
            elif self.json is not None:
                text = _json_grammar(_schema(self.json))
            elif self.choice is not None:
                text = guidance.grammar_from("regex", _alternatives(self.choice))
            elif self.regex is not None:
                text = guidance.grammar_from("regex", self.regex)
            else:
                text = guidance.grammar_from("grammar", self.grammar)
        except (ValueError, TypeError, RecursionError) as error:
            raise StructuredOutputError(f"invalid {self.kind}: {_reason(error)}") from error
        if len(text) > MAX_CHARACTERS:
            raise StructuredOutputError(f"the {self.kind} has {len(text)} characters, more than {MAX_CHARACTERS}")
        return text

    @property
    def kind(self) -> str:
        """Name of the kind of constraint, for messages."""
        if self.json is not None or self.json_object:
            return "JSON schema"
        return "choice" if self.choice is not None else "regex" if self.regex is not None else "grammar"


class GrammarCompiler:
    """Compiler of structured outputs for a tokenizer, with a cache of the last ones; for any number of threads.

    Args:
        eos_token_ids: tokens that end a complete answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = _grammar_tokenizer(tokenizer, eos_token_ids)
        self._cached = lru_cache(CACHED_GRAMMARS)(lambda grammar: _with_large_stack(lambda: self._compile(grammar)))

    def compile(self, output: StructuredOutput) -> LLMatcher:
        """Return a matcher at the beginning of an answer, for one sequence.

        Raises:
            StructuredOutputError: an invalid, unsupported or too large constraint, with the library's reason.
        """
        matcher, problem = self._cached(output.serialized)
        if problem:
            raise StructuredOutputError(f"invalid {output.kind}: {problem}")
        return matcher.deep_copy()

    def _compile(self, grammar: str) -> tuple[LLMatcher, str]:
        """Return a matcher and the reason why it cannot be used, or ""."""
        guidance = _llguidance()
        limits = guidance.LLParserLimits(max_items_in_row=MAX_ITEMS, verbose_errors=False)
        matcher = guidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            # Large constraints exceed the limits at the first token only. This also computes what its copies share.
            first = matcher.deep_copy()
            allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            if not matcher.is_error() and first.consume_token(int(allowed.argmax())):
                first.compute_bitmask()
            matcher = first if first.is_error() else matcher
        return matcher, _reason(matcher.get_error()) if matcher.is_error() else ""


def constrain(logits: torch.Tensor, matchers: Mapping[int, LLMatcher]) -> None:
    """Set the logits [N, V] of tokens that a matcher does not allow to -inf, in place.

    Args:
        matchers: {row: its matcher}. Tokens beyond the tokenizer's vocabulary are not allowed.
    """
    masks = [np.frombuffer(one.compute_bitmask(), np.uint8) for one in matchers.values()]
    packed = torch.from_numpy(np.stack(masks)).to(logits.device)
    bits = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = ((packed[:, :, None] >> bits) & 1).bool().flatten(1)
    allowed = torch.nn.functional.pad(allowed, (0, logits.shape[-1] - allowed.shape[-1]))  # or cut
    rows = list(matchers)
    logits[rows] = logits[rows].masked_fill(~allowed, float("-inf"))


def matcher_error(matcher: LLMatcher) -> StructuredOutputError:
    """Return the error of a matcher that failed during decoding."""
    return StructuredOutputError(f"the structured output cannot be continued: {_reason(matcher.get_error())}")


def _with_large_stack(function: Callable[[], T]) -> T:
    """Call a function in a thread with a stack of `STACK_BYTES`."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # a panic of Rust is not an Exception
            future.set_exception(error if isinstance(error, Exception) else StructuredOutputError(str(error)))

    with _compiling:
        before = threading.stack_size(STACK_BYTES)
        try:
            threading.Thread(target=run, name="sigmix-grammar", daemon=True).start()
        finally:
            threading.stack_size(before)
        return future.result()


def _llguidance() -> Any:
    return optional("llguidance", "'sigmix[structured-output]'", "structured output", StructuredOutputError)


def _json_grammar(schema: Any) -> str:
    return str(
        _llguidance().LLMatcher.grammar_from_json_schema(
            json.dumps(schema), defaults={"whitespace_pattern": WHITESPACE}, overrides={"lenient": False}
        )
    )


def _schema(schema: Any) -> Any:
    if isinstance(schema, str):
        return json.loads(schema)
    return schema.model_json_schema() if hasattr(schema, "model_json_schema") else schema


def _alternatives(choices: Sequence[str]) -> str:
    if isinstance(choices, str) or not choices or not all(isinstance(one, str) for one in choices):
        raise ValueError("it must be a list of one or more strings")
    return "|".join(re.sub(r"([\\.+*?()|\[\]{}^$#&\-~/])", r"\\\1", one) for one in choices)


def _grammar_tokenizer(tokenizer: Any, eos_token_ids: Sequence[int]) -> Any:
    """Return llguidance's form of a tokenizer."""
    _llguidance()
    from llguidance import LLTokenizer, TokenizerWrapper
    from llguidance.hf import from_tokenizer

    ends: Any = list(eos_token_ids) or None
    try:
        return from_tokenizer(tokenizer, eos_token=ends)
    except ValueError:  # neither byte-level nor with byte fallback, or without the library tokenizers
        return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, eos_token_ids)), eos_token=ends)


class _Vocabulary:
    """Bytes of a tokenizer's tokens, with the attributes that llguidance reads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int]) -> None:
        self.bos_token_id = None
        self.eos_token_id = next(iter(eos_token_ids), None)
        decoder = token_decoder(tokenizer)
        self.special_token_ids = sorted(decoder.special.union(eos_token_ids))
        self.tokens = [decoder.token_bytes(id) for id in range(len(tokenizer))]
        self._ids = {data: id for id, data in enumerate(self.tokens) if id not in decoder.special}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes) -> list[int]:
        """Split text into the longest tokens; the tokenizer itself could add a space or <unk>."""
        ids: list[int] = []
        while text:
            sizes = range(min(len(text), self._longest), 0, -1)
            size = next((size for size in sizes if text[:size] in self._ids), 0)
            if not size:
                break
            ids.append(self._ids[text[:size]])
            text = text[size:]
        return ids


def _reason(error: object) -> str:
    """Return the reason in a message of llguidance, which shows the place in the lines around it."""
    text = str(error).strip()
    if text.startswith("NoExtensionBias"):
        return "no token of this model's vocabulary continues it"
    match = re.search(r"^error: (.+)$", text, re.MULTILINE)
    return match[1] if match else text.split("\n")[0]
