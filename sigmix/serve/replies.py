"""OpenAI's objects from what the batcher tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sigmix.adapt import Decision
from sigmix.serve.jobs import Token


@dataclass
class Choice:
    """One answer, collected."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str = ""


def about(decision: Decision, waited: float) -> dict[str, Any]:
    """The ``sigmix`` object of a reply: what was decided and why."""
    evidence = dict(decision.evidence)
    return {
        "mix": decision.mix.id, **decision.mix.to_json(), "label": decision.label, "reason": decision.reason,
        "scores": evidence.pop("probabilities", None), "evidence": evidence, "pass1_tokens": decision.tokens,
        "pass1_seconds": round(decision.seconds, 4), "waited_seconds": round(waited, 4),
    }  # fmt: skip


def usage(read: int, written: int) -> dict[str, int]:
    """The ``usage`` object; pass one's tokens are not in it, they stand in ``sigmix``."""
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


class Form:
    """What chat and plain completions have in common.

    Args:
        id: of the reply. model: as it was asked for. created: time of the request. fingerprint: of the base.
        text_of: a token's text.
    """

    prefix = object = chunk = ""

    def __init__(self, id: str, model: str, created: int, fingerprint: str, text_of: Any) -> None:
        self.head: dict[str, Any] = {"id": id, "created": created, "model": model, "system_fingerprint": fingerprint}
        self.text_of = text_of

    def whole(self, choices: Sequence[dict[str, Any]], counts: dict[str, int], sigmix: Any) -> dict[str, Any]:
        """A reply that is not streamed."""
        return {**self.head, "object": self.object, "choices": list(choices), "usage": counts, "sigmix": sigmix}

    def part(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """One event of a stream."""
        return {**self.head, "object": self.chunk, "choices": list(choices), **more}


class ChatForm(Form):
    """chat.completion and chat.completion.chunk."""

    prefix, object, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, found: Choice, logprobs: bool) -> dict[str, Any]:
        """A whole answer."""
        told = {"content": [self.told(token) for token in found.tokens], "refusal": None} if logprobs else None
        message = {"role": "assistant", "content": found.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": told, "finish_reason": found.finish}

    def first(self, index: int) -> dict[str, Any]:
        """What a streamed answer begins with."""
        return self.delta(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, text: str, tokens: Sequence[Token], logprobs: bool, _: int) -> dict[str, Any]:
        """More of a streamed answer."""
        told = {"content": [self.told(token) for token in tokens], "refusal": None} if logprobs else None
        return {**self.delta(index, {"content": text}), "logprobs": told}

    def last(self, index: int, finish: str) -> dict[str, Any]:
        """What a streamed answer ends with."""
        return self.delta(index, {}, finish)

    @staticmethod
    def delta(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        """A choice of a chunk."""
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}

    def told(self, token: Token) -> dict[str, Any]:
        """A token with its log-probability and the most probable ones."""
        best = [self._one(id, logprob) for id, logprob in token.best]
        return {**self._one(token.id, token.logprob), "top_logprobs": best}

    def _one(self, id: int, logprob: float) -> dict[str, Any]:
        text = self.text_of(id)
        known = None if "�" in text else list(text.encode())  # a part of a character has no text of its own
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": known}


class PlainForm(Form):
    """text_completion."""

    prefix, object, chunk = "cmpl-", "text_completion", "text_completion"

    def choice(self, index: int, found: Choice, logprobs: bool) -> dict[str, Any]:
        """A whole answer."""
        told = self.told(found.tokens, 0) if logprobs else None
        return {"index": index, "text": found.text, "logprobs": told, "finish_reason": found.finish}

    def first(self, index: int) -> None:
        """Nothing."""

    def piece(self, index: int, text: str, tokens: Sequence[Token], logprobs: bool, offset: int) -> dict[str, Any]:
        """More of a streamed answer."""
        told = self.told(tokens, offset) if logprobs else None
        return {"index": index, "text": text, "logprobs": told, "finish_reason": None}

    def last(self, index: int, finish: str) -> dict[str, Any]:
        """What a streamed answer ends with."""
        return {"index": index, "text": "", "logprobs": None, "finish_reason": finish}

    def told(self, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        """Log-probabilities in the old format."""
        texts = [self.text_of(token.id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        best = [{self.text_of(id): max(logprob, -9999.0) for id, logprob in token.best} for token in tokens]
        return {
            "tokens": texts, "token_logprobs": [max(token.logprob, -9999.0) for token in tokens],
            "top_logprobs": best if any(best) else None, "text_offset": offsets,
        }  # fmt: skip
