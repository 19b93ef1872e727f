"""Streaming detokenizer: its pieces are the decoded text, up to the first stop string."""

from __future__ import annotations

import random

import pytest
from helpers_tiny import build_tokenizer

from sigmix.engine.detokenizer import StreamingDetokenizer


@pytest.mark.parametrize("stop_strings", [(), ("ab",), ("b c", "c"), ("never",)])
def test_pieces_are_the_text(stop_strings):
    tokenizer, draw = build_tokenizer(), random.Random(1)
    for _ in range(40):
        ids = [draw.randrange(4, 250) for _ in range(60)]
        detokenizer, shown = StreamingDetokenizer(tokenizer, stop_strings), ""
        for number, token in enumerate(ids, 1):
            shown += detokenizer.add(token)
            whole = tokenizer.decode(ids[:number], skip_special_tokens=True)
            cuts = [whole.find(stop) for stop in stop_strings if stop in whole]
            if cuts:
                assert detokenizer.stopped in stop_strings
                assert shown == detokenizer.text == whole[: min(cuts)]
                assert detokenizer.add(token) + detokenizer.flush() == ""
                break
            assert whole.startswith(shown)
        else:
            shown += detokenizer.flush()
            assert shown == tokenizer.decode(ids, skip_special_tokens=True)


class ByteTokenizer:
    """Tokens are bytes."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(ids).decode("utf-8", "replace")


def test_no_incomplete_characters():
    text = "grün 🙂🙂 ende" * 5
    detokenizer = StreamingDetokenizer(ByteTokenizer())
    parts = [detokenizer.add(byte) for byte in text.encode()]
    assert "".join(parts) == text
    assert not any("�" in part for part in parts)
    held = StreamingDetokenizer(ByteTokenizer(), ["ün🙂"])  # the beginning of a stop string, then part of a character
    assert [held.add(byte) for byte in "grün🙂".encode()] == ["g", "r", *[""] * 7]
    assert (held.text, held.stopped) == ("gr", "ün🙂")
    broken = StreamingDetokenizer(ByteTokenizer())
    assert "".join(broken.add(byte) for byte in "🙂".encode()[:3]) + broken.flush() == "�"
