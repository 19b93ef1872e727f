"""Text in and out: chat template, stop strings, streaming, end tokens; a scripted model says what the test wants."""

from __future__ import annotations

import pytest
import torch
from helpers_engine import expert, rows

from sigmix.engine import Engine
from sigmix.engine.generation import SamplingParams
from sigmix.engine.tokenization import check_context, context_length, encode, eos_token_ids
from sigmix.errors import ConfigError, ContextError, FingerprintError, PromptError, UnknownNameError
from sigmix.experts.mix import Mix

pytestmark = pytest.mark.usefixtures("cache")


ROWS = rows([9, 12])


def scripted(model, start: int, script: list[int]):
    """`model` answers the ids of `script` one after another, the first at position `start`."""

    def say(_, args, kwargs, output):
        positions = kwargs["position_ids"][:, -output.logits.shape[1] :]
        output.logits = torch.full_like(output.logits, -50.0)
        for b, places in enumerate(positions.tolist()):
            for t, place in enumerate(places):
                token = script[place + 1 - start] if 0 <= place + 1 - start < len(script) else 2
                output.logits[b, t, token] = 0.0
        return output

    model.register_forward_hook(say, with_kwargs=True)
    return model


@pytest.fixture
def speaker(tiny, tiny_tokenizer):
    """speaker("text") -> (engine that answers it, prompt ids)."""

    def make(text: str, tokenizer=tiny_tokenizer):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return Engine(scripted(tiny("llama"), 6, ids), tokenizer), [5] * 6

    return make


def byte_tokenizer():
    """One token per byte, so that a character of three bytes is three tokens; ids 3 to 258, <eos> 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture
def byte_speaker(tiny):
    def make(text: str):
        tokenizer = byte_tokenizer()
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(text.encode())
        return Engine(scripted(tiny("llama", vocab_size=300), 6, ids), tokenizer), [5] * 6

    return make


# ------------------------------------------------------------------ answers


def test_the_end_token_is_kept_in_ids_and_left_out_of_text(speaker):
    engine, prompt = speaker("four")
    (answer,) = engine.generate([prompt])
    assert (answer.text, answer.finish) == ("four", "stop")
    assert answer.ids[-1] == 2
    assert len(answer.ids) == len(answer.logprobs) == 5


def test_max_new_tokens(speaker):
    engine, prompt = speaker("forty-two")
    (answer,) = engine.generate([prompt], max_new_tokens=5)
    assert (answer.text, answer.finish, len(answer.ids)) == ("forty", "length", 5)


@pytest.mark.parametrize(
    ("stop", "text", "used"),
    [
        (["END"], "one ", 7),
        (["x", "END"], "one ", 7),
        (["e", "END"], "on", 3),
        (["never"], "one END two\nthree", 18),
        (["ENDS"], "one END two\nthree", 18),
        (["\n"], "one END two", 12),
        ((), "one END two\nthree", 18),
    ],
)
def test_stop_strings(speaker, stop, text, used):
    engine, prompt = speaker("one END two\nthree")
    (answer,) = engine.generate([prompt], stop_strings=stop)
    assert answer.text == text
    assert answer.finish == "stop"
    assert len(answer.ids) == used
    assert "".join(engine.stream(prompt, stop_strings=stop, max_new_tokens=64)) == text


def test_a_long_stop_string_of_many_tokens_per_character(byte_speaker):
    mark = "この文で終わりです。"  # 10 characters, 30 tokens
    engine, prompt = byte_speaker(f"yes{mark} and more of it")
    (answer,) = engine.generate([prompt], stop_strings=[mark])
    assert (answer.text, answer.finish, len(answer.ids)) == ("yes", "stop", 33)


def test_stop_strings_end_rows_of_a_batch_separately(tiny, tiny_tokenizer):
    engine = Engine(tiny("llama"), tiny_tokenizer)
    prompts = rows([14, 22, 11, 17])
    free = engine.generate(prompts, max_new_tokens=24)
    mark = next(c for c in free[0].text if any(c not in g.text for g in free[1:]))
    for before, after in zip(free, engine.generate(prompts, max_new_tokens=24, stop_strings=[mark]), strict=True):
        assert after.text == before.text.split(mark)[0]
        assert after.ids == before.ids[: len(after.ids)]


# ------------------------------------------------------------------ streaming


@pytest.mark.parametrize("text", ["a b  c\n\nd", "naïve 日本語 🙂 end", "x"])
@pytest.mark.parametrize("budget", [4, 7, 12, 64])
def test_stream_joins_to_generates_text(byte_speaker, text, budget):
    engine, prompt = byte_speaker(text)
    (whole,) = engine.generate([prompt], max_new_tokens=budget)
    pieces = list(engine.stream(prompt, max_new_tokens=budget))
    assert "".join(pieces) == whole.text
    assert all(pieces)
    if budget == 64:
        assert whole.text == text
        assert "\ufffd" not in "".join(pieces)
        assert pieces == list(text)  # a character appears when its last byte is there


def test_stream_holds_back_what_may_become_a_stop_string(speaker):
    engine, prompt = speaker("a STOLE b STOP c")
    pieces = list(engine.stream(prompt, stop_strings=["STOP"], max_new_tokens=64))
    assert "".join(pieces) == "a STOLE b "
    assert "STOL" in pieces  # shown only once it cannot be the mark any more
    assert not any(piece in ("S", "T", "O") for piece in pieces)


def test_stream_under_a_mix_and_a_seed(tiny, tiny_tokenizer):
    bank = {"math": expert(tiny("llama"), "math", 1)}
    engine = Engine(tiny("llama"), tiny_tokenizer, bank)
    options = {"max_new_tokens": 20, "do_sample": True}
    (whole,) = engine.generate(["What?"], "math", seeds=[4], **options)
    assert "".join(engine.stream("What?", "math", seed=4, **options)) == whole.text
    (base,) = engine.generate(["What?"], seeds=[4], **options)
    assert base.text != whole.text


def test_a_stream_that_was_overtaken_is_an_error(tiny, tiny_tokenizer):
    bank = {"math": expert(tiny("llama"), "math", 1), "code": expert(tiny("llama"), "code", 2)}
    engine = Engine(tiny("llama"), tiny_tokenizer, bank)
    options = {"max_new_tokens": 40}
    prompt = next(ids for ids in rows([12] * 20) if len(engine.generate([ids], "math", **options)[0].text) > 8)
    stream = engine.stream(prompt, "math", **options)
    next(stream)
    (answer,) = engine.generate([prompt], "code", **options)
    assert answer == Engine(tiny("llama"), tiny_tokenizer, bank).generate([prompt], "code", **options)[0]
    with pytest.raises(ConfigError, match="stream"):  # its weights are gone: no wrong token may follow
        list(stream)


# ------------------------------------------------------------------ prompts


def test_chat_template(tiny_tokenizer):
    text = tiny_tokenizer.decode(encode(tiny_tokenizer, "Hi", "Be brief"))
    assert text == "[system]Be brief<eos>[user]Hi<eos>[assistant]"
    assert tiny_tokenizer.decode(encode(tiny_tokenizer, "Hi", chat=False)) == "Hi"
    assert tiny_tokenizer.decode(encode(tiny_tokenizer, "Hi", "Be brief", chat=False)) == "Be brief\n\nHi"
    tiny_tokenizer.chat_template = None
    assert tiny_tokenizer.decode(encode(tiny_tokenizer, "Hi")) == "Hi"


def test_strings_and_ids_are_the_same_prompt(tiny, tiny_tokenizer):
    engine = Engine(tiny("llama"), tiny_tokenizer)
    ids = encode(tiny_tokenizer, "What?")
    text, given, bare = engine.generate(["What?", ids, tiny_tokenizer("What?")["input_ids"]], max_new_tokens=6)
    assert text == given
    assert text.prompt_tokens == len(ids)
    assert engine.generate(["What?"], max_new_tokens=6, chat=False)[0].ids == bare.ids
    assert engine.generate([]) == []


def test_end_ids_of_all_sources(tiny_llama, tiny_tokenizer):
    tiny_llama.generation_config.eos_token_id = [7, 8]
    assert eos_token_ids(tiny_llama, tiny_tokenizer) == [2, 7, 8]


def test_context(tiny):
    for arch in ("llama", "gpt2", "gemma3"):
        assert context_length(tiny(arch)) == 256
    model = tiny("llama")
    check_context(model, [5] * 200, 56)
    with pytest.raises(ContextError, match=r"prompt 3 has 200 tokens.*context of 256 -> shorten it to 199"):
        check_context(model, [5] * 200, 57, "prompt 3")
    with pytest.raises(ContextError, match="empty"):
        check_context(model, [], 1)
    with pytest.raises(ContextError, match="-> lower --max-new-tokens"):
        check_context(model, [5], 10**6)


# ------------------------------------------------------------------ errors


@pytest.fixture
def engine(tiny, tiny_tokenizer):
    return Engine(tiny("llama"), tiny_tokenizer, {"math": expert(tiny("llama"), "math", 1)})


def test_a_prompt_over_the_context_names_itself(engine):
    with pytest.raises(ContextError, match="prompt 1 has 250 tokens"):
        engine.generate([[5] * 10, [5] * 250], max_new_tokens=10)
    with pytest.raises(ContextError, match="250"):
        list(engine.stream([5] * 250, max_new_tokens=10))
    with pytest.raises(ContextError, match="empty"):
        engine.generate([[]])


@pytest.mark.parametrize("bank", [None, {}, "math"])
def test_unknown_expert(engine, tiny_tokenizer, bank):
    engine = engine if bank == "math" else Engine(engine.model, tiny_tokenizer, bank)
    with pytest.raises(UnknownNameError, match="unknown expert 'maths'"):
        engine.generate([[5, 6]], "maths")


def test_an_expert_of_another_base(engine, tiny):
    foreign = expert(tiny("llama", seed=1), "math", 1)
    engine.bank = {"math": foreign}
    with pytest.raises(FingerprintError, match="made on"):
        engine.generate([[5, 6]], "math")


def test_an_expert_is_checked_again_when_the_bank_changes(engine, tiny):
    good = dict(engine.bank["math"].z), engine.bank["math"].meta
    other = expert(tiny("llama", seed=1), "math", 1)
    for _ in range(20):  # a new object may get the address of one that is gone
        engine.bank = {"math": type(other)("math", *good)}
        engine.z(Mix.one("math"))
        engine.bank = {}
        engine.bank = {"math": type(other)("math", dict(other.z), other.meta)}
        with pytest.raises(FingerprintError):
            engine.z(Mix.one("math"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"do_sample": True, "temperature": -0.1}, "temperature"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature"),
        ({"do_sample": True, "top_p": 0.0}, "top_p"),
        ({"do_sample": True, "top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"logit_bias": {7: 101.0}}, "token 7"),
        ({"logit_bias": {100: 1.0}}, "token 100.*0 to 99"),
        ({"params": [SamplingParams()]}, "1 params for 2 prompts"),
        ({"params": SamplingParams(min_p=2.0)}, "min_p"),
        ({"params": SamplingParams(), "top_k": 5}, "params"),
        ({"num_return_sequences": 0}, "num_return_sequences"),
        ({"num_return_sequences": 2, "seeds": [1, 2]}, "2 seeds"),
        ({"form": "fused"}, "unknown form 'fused'"),
        ({"mix": ["math"]}, "1 mixes for 2 prompts"),
        ({"mix": ["math", None], "form": "merged"}, "one mix"),
        ({"mix": "math:x"}, "finite number"),
        ({"seeds": [1]}, "1 seeds for 2 prompts"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": -1}, "batch_size"),
        ({"stop_strings": ["a", ""]}, "stop"),
        ({"stop_strings": [5]}, "stop"),
        ({"logit_bias": {"5": 1.0}}, "token '5'"),
        ({"structured_output": {"type": "object"}}, "StructuredOutput"),
    ],
)
def test_bad_options(engine, options, message):
    with pytest.raises(ConfigError, match=message):
        engine.generate([[5, 6], [5, 7]], **options)


def test_options_of_each_prompt(engine):
    prompts, mixes = [[5, 6, 7], [8, 9], [5, 6]], ["math", "base", "math:0.5"]
    params = [
        SamplingParams(9, repetition_penalty=1.5),
        SamplingParams(4, True, 1.5, seed=3, top_k=20, logit_bias={2: -100.0}),
        SamplingParams(6, logit_bias={11: 100.0}),
    ]  # fmt: skip
    found = engine.generate(prompts, mixes, params=params)
    assert [len(one.ids) for one in found] == [9, 4, 6]
    assert found[2].ids == [11] * 6
    for prompt, mix, one, row in zip(prompts, mixes, params, found, strict=True):
        assert engine.generate([prompt], mix, params=one)[0].ids == row.ids
    options = {"max_new_tokens": 4, "do_sample": True, "temperature": 1.5, "top_k": 20, "logit_bias": {2: -100.0}}
    assert engine.generate(prompts[1:2], seeds=[3], **options)[0].ids == found[1].ids


def test_options_may_be_integers(engine):
    options = {"do_sample": True, "max_new_tokens": 6}
    found = engine.generate([[5, 6]], temperature=1, top_p=1, min_p=0, presence_penalty=1, **options)
    assert found == engine.generate([[5, 6]], temperature=1.0, presence_penalty=1.0, **options)


def test_logits_of_tokens_beyond_the_vocabulary(engine):
    for tokens in ([5, 10**6], [5, -1]):
        with pytest.raises(PromptError, match=f"token {tokens[1]}"):
            engine.logits(torch.tensor([tokens]))


def test_several_completions_of_each_prompt(engine):
    prompts, options = [[5, 6, 7], [8, 9]], {"do_sample": True, "temperature": 1.5, "max_new_tokens": 12}
    found = engine.generate(prompts, ["math", "base"], num_return_sequences=3, **options)
    assert len({tuple(one.ids) for one in found}) == 6
    for row, one in enumerate(found):
        mix = ["math", "base"][row // 3]
        assert engine.generate([prompts[row // 3]], mix, seeds=[row], **options)[0].ids == one.ids
    params = SamplingParams(seed=3, **options)
    found = engine.generate(prompts, ["math", "base"], params=params, num_return_sequences=3)
    assert len({tuple(one.ids) for one in found}) == 6
    assert engine.generate(prompts[1:], params=params)[0].ids == found[3].ids
    with pytest.raises(ConfigError, match="seeds"):
        engine.generate(prompts, seed=3, **options)


def test_bad_options_of_a_stream(engine):
    bad = {"do_sample": True, "temperature": -1.0}
    for options in ({"max_new_tokens": 0}, bad, {**bad, "temperature": 1.0, "top_p": 2.0}, {"stop_strings": [""]}):
        with pytest.raises(ConfigError):
            list(engine.stream([5, 6], **options))


def test_one_string_is_not_a_list_of_prompts_or_marks(engine):
    with pytest.raises(ConfigError, match="list"):
        engine.generate("What?")
    with pytest.raises(ConfigError, match="list"):
        engine.generate(["What?"], stop_strings="END")
    with pytest.raises(ConfigError, match="list"):
        engine.generate([{"role": "user", "content": "What?"}])


def test_one_prompt_over_the_context_gets_an_error_and_the_others_answers(tiny, tiny_tokenizer):
    engine = Engine(tiny("llama", max_position_embeddings=32), tiny_tokenizer)
    prompts = [ROWS[0], [5] * 40, [], ROWS[1]]
    answers = engine.generate(prompts, max_new_tokens=4, keep_errors=True, batch_size=1)
    assert [one.finish == "error" for one in answers] == [False, True, True, False]
    assert "prompt 1" in str(answers[1].error)
    assert "prompt 2" in str(answers[2].error)
    alone = engine.generate([ROWS[0], ROWS[1]], max_new_tokens=4, batch_size=1)
    assert [answers[0], answers[3]] == alone
    with pytest.raises(ContextError, match="prompt 1"):
        engine.generate(prompts, max_new_tokens=4)
