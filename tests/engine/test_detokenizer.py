"""Incremental detokenizer with stop strings."""

from __future__ import annotations

import random

import pytest
from helpers_tiny import build_tokenizer

from sigmix.engine.detokenizer import Pieces


@pytest.mark.parametrize("stop", [(), ("ab",), ("b c", "c"), ("never",)])
def test_pieces_join_to_the_text(stop):
    tokenizer, draw = build_tokenizer(), random.Random(1)
    for _ in range(40):
        ids = [draw.randrange(4, 250) for _ in range(60)]
        pieces, shown = Pieces(tokenizer, stop), ""
        for number, token in enumerate(ids, 1):
            shown += pieces.add(token)
            whole = tokenizer.decode(ids[:number], skip_special_tokens=True)
            cuts = [whole.find(mark) for mark in stop if mark in whole]
            if cuts:
                assert pieces.stopped in stop
                assert shown == whole[: min(cuts)]
                break
            assert whole.startswith(shown)
        else:
            shown += pieces.end()
            assert shown == tokenizer.decode(ids, skip_special_tokens=True)


class ByteTokenizer:
    """Tokenizer with one token per byte."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(ids).decode("utf-8", "replace")


def test_no_partial_characters():
    text = "grün 🙂🙂 ende" * 5
    pieces = Pieces(ByteTokenizer())
    parts = [pieces.add(byte) for byte in text.encode()]
    assert "".join(parts) == text
    assert not any("�" in part for part in parts)
    broken = Pieces(ByteTokenizer())
    assert "".join(broken.add(byte) for byte in "🙂".encode()[:3]) + broken.end() == "�"
