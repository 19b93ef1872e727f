"""Detokenizer: bytes of tokens, streamed text, stop strings and offsets, for every kind of tokenizer."""

from __future__ import annotations

import random

import pytest
from helpers_tiny import build_tokenizer
from helpers_tokenizers import KINDS, byte_level, gemma, metaspace, sentencepiece, wordpiece
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from sigmix.engine.detokenizer import StreamingDetokenizer, TokenDecoder, text_offsets, token_decoder, token_text


def stream(tokenizer, ids, stop_strings=(), prompt_ids=()):
    """Pieces of a text, and the detokenizer at its end."""
    detokenizer = StreamingDetokenizer(tokenizer, stop_strings, prompt_ids)
    pieces = []
    for token in ids:
        pieces.append(detokenizer.add(token))
        if detokenizer.stopped is not None:
            break
    return [*pieces, detokenizer.flush()], detokenizer


def ids_of(tokenizer, *tokens):
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_the_tokenizers(kind):
    tokenizer, draw = KINDS[kind](), random.Random(1)
    decoder = token_decoder(tokenizer)
    ids = [id for id in range(len(tokenizer)) if "bytes" not in token_text(decoder.token_bytes(id))]
    for _ in range(200):
        row = draw.choices(ids, k=draw.randrange(1, 12))
        pieces, detokenizer = stream(tokenizer, row)
        expected = tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "".join(pieces) == detokenizer.text == decoder.decode(row) == expected


@pytest.mark.parametrize("make", [byte_level, sentencepiece, gemma])
def test_no_incomplete_characters(make):
    tokenizer = make()
    text = "grün 🙂🙂 用户 \N{REPLACEMENT CHARACTER} ende"
    decoder = token_decoder(tokenizer)
    single = {decoder.token_bytes(id): id for id in range(len(tokenizer)) if len(decoder.token_bytes(id)) == 1}
    pieces, detokenizer = stream(tokenizer, [single[bytes([byte])] for byte in text.encode()])
    assert "".join(pieces) == detokenizer.text == text
    assert set(pieces) == {*text, ""}
    cut, _ = stream(tokenizer, [single[bytes([byte])] for byte in "a🙂".encode()[:-1]])
    assert cut == ["a", "", "", "", "\N{REPLACEMENT CHARACTER}"]


def test_spaces_after_words():
    backend = Tokenizer(models.BPE({"lo": 0, "w</w>": 1, "tide</w>": 2}, [], end_of_word_suffix="</w>"))
    backend.decoder = decoders.BPEDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert stream(tokenizer, [0, 1, 2])[0] == ["lo", "w ", "tide ", ""]
    assert tokenizer.decode([0, 1, 2]) == "low tide"


def test_broken_characters_keep_their_neighbours():
    ids = ids_of(sentencepiece(), "<0xE2>", "<0x82>", "<0xAC>", "<0xE2>", "b")
    assert "".join(stream(sentencepiece(), ids)[0]) == token_decoder(sentencepiece()).decode(ids) == "€\ufffdb"


@pytest.mark.parametrize(("make", "space"), [(sentencepiece, " "), (gemma, " "), (metaspace, " "), (wordpiece, " ")])
def test_a_continuation_keeps_its_space(make, space):
    tokenizer = make()
    prompt, answer = ids_of(tokenizer, "▁capital", "▁is"), ids_of(tokenizer, "▁Paris", "▁now")
    if make is wordpiece:
        prompt, answer = ids_of(tokenizer, "capital", "is"), ids_of(tokenizer, "paris", ".")
    whole = token_decoder(tokenizer).decode([*prompt, *answer])
    _, detokenizer = stream(tokenizer, answer, prompt_ids=prompt)
    assert token_decoder(tokenizer).decode(prompt) + detokenizer.text == whole
    assert detokenizer.text.startswith(space)
    start = [tokenizer.eos_token_id]  # special tokens alone: the text begins here
    assert stream(tokenizer, answer, prompt_ids=start)[1].text == token_decoder(tokenizer).decode(answer)


# ---------------------------------------------------------------- bytes and offsets


def test_bytes_of_tokens():
    for make, token, data in [
        (byte_level, "Ã", b"\xc3"), (byte_level, "Ġ", b" "), (byte_level, "<|im_end|>", b"<|im_end|>"),
        (sentencepiece, "▁Paris", b" Paris"), (sentencepiece, "<0xE2>", b"\xe2"), (sentencepiece, "<0x41>", b"A"),
        (sentencepiece, "é", b"\xc3\xa9"), (sentencepiece, "▁▁", b"  "), (sentencepiece, "</s>", b"</s>"),
        (sentencepiece, "\N{REPLACEMENT CHARACTER}", b"\xef\xbf\xbd"), (gemma, "▁Paris", b" Paris"),
        (metaspace, "▁Paris", b" Paris"), (wordpiece, "##ian", b"ian"), (wordpiece, "paris", b" paris"),
    ]:  # fmt: skip
        tokenizer = make()
        assert TokenDecoder(tokenizer).token_bytes(tokenizer.convert_tokens_to_ids(token)) == data, (make, token)
    assert TokenDecoder(byte_level()).token_bytes(9999) == b""  # of a padded embedding
    assert [token_text(data) for data in (b" a", b"\xe2\x82", "é".encode())] == [" a", "bytes:\\xe2\\x82", "é"]


def test_offsets_are_characters_of_the_text():
    tokenizer = byte_level()
    text, special = "aé🙂!", tokenizer.convert_tokens_to_ids("<|im_start|>")
    ids = tokenizer(text)["input_ids"]
    detokenizer, offsets = StreamingDetokenizer(tokenizer), []
    for token in [*ids[:3], special, *ids[3:]]:
        detokenizer.add(token)
        offsets.append(detokenizer.offset)
    assert offsets == [0, 1, 1, 2, 2, 2, 2, 2, 3]
    broken = [*tokenizer("é")["input_ids"][:1], *tokenizer("!")["input_ids"]]
    detokenizer = StreamingDetokenizer(tokenizer)
    assert [(detokenizer.add(token), detokenizer.offset) for token in broken] == [("", 0), ("\ufffd!", 1)]


# ---------------------------------------------------------------- stop strings


@pytest.mark.parametrize("stop_strings", [(), ("ab",), ("b c", "c"), ("never",)])
def test_pieces_are_the_text_up_to_a_stop_string(stop_strings):
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


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("ok\n用户：next", ["用户："], "ok\n"),  # characters of several tokens
        ("costs a€ more", ["a€"], "costs "),
        ("5 °C warm", [" °C"], "5"),
        ("b“q", ["b“"], ""),
        ("a🙂🙃", ["🙃"], "a🙂"),  # with a common first byte
        ("x\N{REPLACEMENT CHARACTER}y", ["\N{REPLACEMENT CHARACTER}y"], "x"),
        ("x END y", ["END"], "x "),
        ("END y", ["END"], ""),
        ("x EN", ["END"], "x EN"),  # never complete
        ("aab", ["ab"], "a"),
        ("abcd", ["abc", "ab"], ""),
        ("xabcd", ["bc", "abc"], "x"),  # complete together: the longest
        ("xabcd", ["abc", "b"], "xa"),  # the first to be complete, whatever the tokens
        ("ab<|im_start|>cd", ["<|im_start|>"], "ab"),  # special tokens
        ("<|im_start|>cd", ["<|im_start|>"], ""),
        ("ok</answer><|im_end|>x", ["</answer><|im_end|>"], "ok"),
        ("ok</answer>?<|im_end|>x", ["</answer><|im_end|>"], "ok</answer>?x"),
        ("ok<|im_start|>user\n", ["<|im_start|>user"], "ok"),
        ("ok<|im_start|>use!", ["<|im_start|>user"], "okuse!"),
        ("a€<|im_end|><|im_start|>é", ["€<|im_end|><|im_start|>é"], "a"),
        ("a<|im_end|>bc", ["ab"], ""),  # the text, without special tokens, has it
        ("a<|im_end|>b", ["im_end"], "ab"),  # but it does not have this
    ],
)
def test_stop_strings(text, stops, expected):
    tokenizer = byte_level()
    pieces, detokenizer = stream(tokenizer, tokenizer(text)["input_ids"], stops)
    assert "".join(pieces) == detokenizer.text == expected
    assert (detokenizer.stopped is None) == (expected == text.replace("<|im_end|>", "").replace("<|im_start|>", ""))


@pytest.mark.parametrize(
    ("tokens", "stop", "expected"),
    [
        (["▁Paris", "▁now"], " now", " Paris"),
        (["▁Paris", "▁now"], "is now", " Par"),
        (["▁Paris", "▁now"], " Paris", ""),
        (["▁Paris", "▁now"], "ri", " Pa"),  # inside a token: nothing after it
        (["▁Paris", "▁", "b"], " b", " Paris"),
        (["▁Paris", "<0xE2>", "<0x82>", "<0xAC>", "b"], "€", " Paris"),
        (["▁Paris", "<0xE2>", "<0x82>", "<0xAC>", "b"], "s€b", " Pari"),
        (["▁Paris", "</s>", "▁now"], "</s>", " Paris"),
        (["▁Paris", "\n", "b"], "\nb", " Paris"),
    ],
)
def test_stop_strings_of_sentencepiece(tokens, stop, expected):
    tokenizer = sentencepiece()
    pieces, detokenizer = stream(tokenizer, ids_of(tokenizer, *tokens), [stop], ids_of(tokenizer, "▁is"))
    assert "".join(pieces) == detokenizer.text == expected
    assert detokenizer.stopped == stop


def test_an_end_token_completes_a_stop_string():
    tokenizer = byte_level()
    *ids, end = tokenizer("ok</a><|im_end|>")["input_ids"]
    detokenizer = StreamingDetokenizer(tokenizer, ["</a><|im_end|>"])
    pieces = [detokenizer.add(token) for token in ids] + [detokenizer.add(end, end=True), detokenizer.flush()]
    assert "".join(pieces) == detokenizer.text == "ok"
    ordinary = StreamingDetokenizer(tokenizer)  # an end token that the tokenizer has as an ordinary one
    assert ordinary.add(ids[0]) + ordinary.add(ids[1], end=True) + ordinary.flush() == "o"


def test_a_broken_character_at_the_end_completes_a_stop_string():
    tokenizer = byte_level()
    pieces, detokenizer = stream(tokenizer, tokenizer("a€")["input_ids"][:-1], ["\N{REPLACEMENT CHARACTER}"])
    assert "".join(pieces) == detokenizer.text == "a"


def test_offsets_in_a_prompt():
    tokenizer = sentencepiece()
    ids = ids_of(tokenizer, "<s>", "▁The", "▁capital", "<|im_end|>", "▁is")
    for text, expected in [
        ("The capital<|im_end|> is", [0, 0, 3, 11, 21]),  # the tokenizer added <s>
        ("<s> The capital<|im_end|> is", [0, 3, 7, 15, 25]),
        ("The capital is", [0, 0, 3, 11, 11]),
    ]:
        assert list(text_offsets(tokenizer, ids, text)) == expected
