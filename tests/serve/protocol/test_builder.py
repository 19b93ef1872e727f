"""Text and log-probabilities of tokens in responses: spaces, split characters, special tokens, stop strings."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from helpers_scripted import scripted_llama
from helpers_serve import Client
from helpers_tokenizers import byte_level, gemma, metaspace, sentencepiece, wordpiece

from sigmix.serve.service import Service
from sigmix.serve.settings import load_settings

PATH = "/v1/completions"
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@contextmanager
def replying(folder, tokenizer, last, reply):
    """In-process server of a model that writes ``reply`` after the token ``last``."""
    ids = tokenizer.convert_tokens_to_ids([last, *reply, tokenizer.eos_token])
    model = scripted_llama(len(tokenizer), ids)
    settings = load_settings(None, state=folder / "state", shutdown_timeout=5.0, port=0)
    client = Client(Service(model, tokenizer, {}, settings, {}))
    with client.http:
        yield client


def complete(server, **body):
    """The choice of a text completion, equal whole and streamed."""
    options = {"model": "base", "max_tokens": 16, **body}
    status, found, _ = server.call("POST", PATH, options)
    assert status == 200, found
    (choice,) = found["choices"]
    parts = [part for event in server.stream(options, PATH) for part in event["choices"]]
    assert "".join(part["text"] for part in parts) == choice["text"]
    assert parts[-1]["finish_reason"] == choice["finish_reason"]
    if choice["logprobs"]:
        scores = [part["logprobs"] for part in parts if part["logprobs"]]
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [one for part in scores for one in part[key] or ()] == (choice["logprobs"][key] or [])
    return choice


CAPITAL = ["▁The", "▁capital", "▁is"]


@pytest.mark.parametrize("make", [sentencepiece, gemma, metaspace])
def test_a_completion_continues_its_prompt(tmp_path, make):
    tokenizer = make()
    prompt = tokenizer.convert_tokens_to_ids(CAPITAL)
    with replying(tmp_path, tokenizer, "▁is", ["▁Paris", "▁now"]) as server:
        choice = complete(server, prompt=prompt, logprobs=2)
        assert choice["text"] == " Paris now"
        assert choice["logprobs"]["tokens"] == [" Paris", " now", "</s>"]
        assert choice["logprobs"]["text_offset"] == [0, 6, 10]
        echoed = complete(server, prompt=prompt, logprobs=0, echo=True)
        first = " The" if make is gemma else "The"
        assert echoed["text"] == first + " capital is Paris now"
        start = len(first)
        assert echoed["logprobs"]["text_offset"][:5] == [0, start, start + 8, start + 11, start + 17]
        for stop, text in [
            (" now", " Paris"),
            ("aris n", " P"),
            (" Paris", ""),
            ("Paris", " "),
            ("s now</s>", " Pari"),
        ]:
            assert complete(server, prompt=prompt, stop=stop)["text"] == text, stop


def test_a_chat_reply_is_a_text_of_its_own(tmp_path):
    tokenizer = sentencepiece(TEMPLATE)
    with replying(tmp_path, tokenizer, "▁is", ["▁Paris", "▁now"]) as server:
        _, found = server.chat("The capital is", model="base", logprobs=True)
        assert found["choices"][0]["message"]["content"] == "Paris now"
        tokens = found["choices"][0]["logprobs"]["content"]
        assert [token["token"] for token in tokens] == [" Paris", " now", "</s>"]
        engine = server.service.engine
        assert engine.generate(["The capital is"])[0].text == "".join(engine.stream("The capital is")) == "Paris now"
        assert engine.generate(["The capital is"], chat=False)[0].text == " Paris now"
        turns = [{"role": "user", "content": "The"}, {"role": "assistant", "content": " capital is"}]
        body = {"messages": turns, "model": "base", "continue_final_message": True, "add_generation_prompt": False}
        assert server.call("POST", "/v1/chat/completions", body)[1]["choices"][0]["message"]["content"] == " Paris now"


def test_words_and_their_parts(tmp_path):
    tokenizer = wordpiece()
    with replying(tmp_path, tokenizer, "is", ["paris", "##ian", "."]) as server:
        choice = complete(server, prompt="the capital is", logprobs=1)
        assert choice["text"] == " parisian ."
        assert choice["logprobs"]["tokens"][:3] == [" paris", "ian", " ."]
        assert choice["logprobs"]["text_offset"][:3] == [0, 6, 9]


BYTES = [(byte_level, "!", list("aÃ©ñ")), (sentencepiece, "▁is", ["▁a", "<0xC3>", "<0xA9>", "<0xF1>"])]


@pytest.mark.parametrize(("make", "last", "reply"), BYTES)
def test_split_characters(tmp_path, make, last, reply):
    tokenizer = make()
    prompt = [tokenizer.convert_tokens_to_ids(last)]
    with replying(tmp_path, tokenizer, last, reply) as server:
        choice = complete(server, prompt=prompt, logprobs=5)
        scores, start = choice["logprobs"], len(choice["text"]) - 2
        assert choice["text"].endswith("aé\ufffd")  # the last character is never complete
        assert scores["tokens"][1:4] == ["bytes:\\xc3", "bytes:\\xa9", "bytes:\\xf1"]
        assert scores["text_offset"] == [0, start, start, start + 1, start + 2]
        for token, own, top in zip(scores["tokens"], scores["token_logprobs"], scores["top_logprobs"], strict=True):
            assert top[token] == own == max(top.values())
            assert len(top) == 5  # no token hides another one
        _, reply = server.chat(tokenizer.decode(prompt), model="base", logprobs=True)
        assert [token["bytes"] for token in reply["choices"][0]["logprobs"]["content"]][1:4] == [[0xC3], [0xA9], [0xF1]]
        assert complete(server, prompt=prompt, stop="é")["text"] == choice["text"][:start]
        assert complete(server, prompt=prompt, stop="aé")["text"] == choice["text"][: start - 1]


def test_tokens_of_equal_text(tmp_path):
    tokenizer = sentencepiece()
    ids = tokenizer.convert_tokens_to_ids(["b", "<0x62>"])
    with replying(tmp_path, tokenizer, "▁is", ["b"]) as server:
        server.service.engine.model.lm_head.weight.data[ids[1], tokenizer.convert_tokens_to_ids("▁is")] = 0.9
        top = complete(server, prompt=tokenizer.convert_tokens_to_ids(CAPITAL), logprobs=2)["logprobs"]["top_logprobs"]
        assert list(top[0]) == ["b", f"token_id:{ids[1]}"]


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("<|im_start|>", "ab"),
        (["zz", "b<|im_start|>c"], "a"),
        ("b<|im_start|>", "a"),
        ("<|im_start|>d", "abcd"),
        ("cd<|endoftext|>", "ab"),
        ("<|endoftext|>", "abcd"),
        ("bc", "a"),
    ],
)
def test_special_tokens_in_stop_strings(tmp_path, stop, text):
    tokenizer = byte_level()
    with replying(tmp_path, tokenizer, "!", ["a", "b", "<|im_start|>", "c", "d"]) as server:
        choice = complete(server, prompt="!", stop=stop)
        assert (choice["text"], choice["finish_reason"]) == (text, "stop")
        engine, stops = server.service.engine, [stop] if isinstance(stop, str) else stop
        assert engine.generate(["!"], stop_strings=stops)[0].text == text
        assert "".join(engine.stream("!", stop_strings=stops)) == text
        offsets = complete(server, prompt="!", logprobs=0)["logprobs"]["text_offset"]
        assert offsets == [0, 1, 2, 2, 3, 4]
