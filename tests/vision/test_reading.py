"""Prompts with images: read as the model itself reads them, a mix for every row, whatever they share."""

from __future__ import annotations

import pickle

import PIL.Image
import pytest
import torch
from helpers_engine import TOLERANCE, dense, expert
from helpers_vision import shape, vlm

from sigmix import Engine, Mix
from sigmix.engine.tokenization import encode
from sigmix.errors import BaseModelError, ConfigError, ContextError, DataError
from sigmix.models import multimodal as images
from sigmix.models.multimodal import ImagePrompt, ImageVectors, bind
from sigmix.train.rollout import Rollouts
from sigmix.utils.images import picture

KINDS = ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl"]


def shapes():
    return [shape("red"), shape("blue", "rectangle", size=(48, 40)), shape("green", "triangle", size=(60, 32))]


def opened(kind="llava", bank=None, **text):
    model, processor = vlm(kind, max_position_embeddings=512, **text)
    engine = Engine(model, bind(processor), bank=bank)
    engine.eos_token_ids = []  # random models end anywhere
    return engine


def own_words(model, processor, question, image, steps):
    """What the model's own `generate` answers to what its own processor makes of a question and an image."""
    turn = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(
        turn, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=steps, do_sample=False, eos_token_id=255, pad_token_id=0)
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None  # what it remembers for its own next token
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_ragged_batch_is_read_as_the_model_reads_each_image_itself(kind):
    engine = opened(kind)
    processor = engine.tokenizer.sigmix_processor
    questions = ["what?", "what is it?", "which colour is it?"]
    own = [own_words(engine.model, processor, q, image, 5) for q, image in zip(questions, shapes(), strict=True)]
    prompts = [engine.encode(q, images=image) for q, image in zip(questions, shapes(), strict=True)]
    answers = engine.generate([*prompts, "text alone"], max_new_tokens=5)
    assert [one.ids for one in answers[:3]] == own
    assert answers[3].ids == engine.generate(["text alone"], max_new_tokens=5)[0].ids


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("form", ["factored", "gain"])
def test_a_row_of_a_mixed_batch_with_images_equals_dense_weights_alone(kind, form):
    engine = opened(kind)
    engine.bank = {name: expert(vlm(kind)[0], name, seed) for seed, name in enumerate("ab")}
    mixes = [Mix.one("a"), Mix.base(), Mix.parse("a:.5+b:.5")]
    prompts = [engine.encode(q, images=i) for q, i in zip(["what?", "and?", "so it is?"], shapes(), strict=True)]
    got = engine.generate(prompts, mix=mixes, max_new_tokens=4, form=form)
    for number, (mix, question) in enumerate(zip(mixes, ["what?", "and?", "so it is?"], strict=True)):
        alone, processor = vlm(kind, max_position_embeddings=512)
        dense(alone, engine.z(mix))
        assert got[number].ids == own_words(alone, processor, question, shapes()[number], 4)
    assert len({tuple(one.ids) for one in got}) == 3


@pytest.mark.parametrize("kind", ["llava_next", "qwen2_5_vl"])
def test_prompts_share_what_they_have_in_common_and_no_more(kind):
    engine = opened(kind)
    red, blue = shape("red"), shape("blue")
    prompts = [engine.encode(q, images=i) for i in (red, blue) for q in ("what is it?", "where is it?")]
    same, other = prompts[0], prompts[2]
    assert len(same) == len(other)
    assert same != other  # the same question about another image is another prompt
    assert sum(a == b for a, b in zip(same, prompts[1], strict=False)) > sum(one < 0 for one in same)
    together = engine.generate(prompts, max_new_tokens=4)
    in_pairs = [one for pair in (prompts[:2], prompts[2:]) for one in engine.generate(pair, max_new_tokens=4)]
    again = engine.generate(prompts[:2], max_new_tokens=4)  # what the two share was kept
    alone = [opened(kind).generate([prompt], max_new_tokens=4)[0] for prompt in prompts]
    assert len(engine.prefix_cache) > 0
    assert [one.ids for one in together] == [one.ids for one in alone] == [one.ids for one in in_pairs]
    assert [one.ids for one in again] == [one.ids for one in alone[:2]]


def test_logits_of_whole_prompts():
    for kind in ("llava", "qwen2_vl"):
        engine = opened(kind)
        prompt = engine.encode("what?", images=shape("red", size=(48, 32)))
        row = engine.logits(torch.tensor([prompt]))[0]
        padded = engine.logits(
            torch.tensor([[0] * 3 + prompt, prompt + [0] * 3]),
            torch.tensor([[0] * 3 + [1] * len(prompt), [1] * len(prompt) + [0] * 3]),
        )
        torch.testing.assert_close(padded[0, 3:], row, **TOLERANCE)
        torch.testing.assert_close(padded[1, :-3], row, **TOLERANCE)


def test_a_prompt_of_text_alone_keeps_its_text():
    engine = opened()
    said = engine.tokenizer.decode(engine.encode("hello there", "be kind"))
    assert said == "[system]be kind<eos>[user]hello there<eos>[assistant]"
    assert engine.tokenizer.decode(engine.encode("hello", chat=False)) == "hello"
    bare = engine.encode("hello", chat=False, images=shape("red"))
    assert engine.tokenizer.decode([one for one in bare if one >= 0]) == "\nhello"


def test_a_prompt_travels_without_its_image(monkeypatch):
    engine = opened()
    mine, other = (engine.encode("what is it?", images=shape(colour)) for colour in ("red", "blue"))
    monkeypatch.setattr(PIL.Image.Image, "__reduce_ex__", None)  # nothing of an image can be pickled
    sent = pickle.dumps(Rollouts([other], [[5]], ["b"], torch.ones(1), ["b"]))
    assert len(sent) < 1000 + 20 * len(other)
    joined = Rollouts.joined([Rollouts([mine], [[4]], ["a"], torch.ones(1), ["a"]), pickle.loads(sent)])
    assert joined.prompts[0] is mine
    assert joined.prompts[1] == other
    assert type(joined.prompts[1]) is list


def test_several_images_in_one_prompt_keep_their_order():
    engine = opened("qwen2_vl")
    red, blue = shape("red"), shape("blue", size=(48, 32))
    first, second = (engine.encode("same?", images=pair) for pair in ([red, blue], [blue, red]))
    assert isinstance(first, ImagePrompt)
    assert sorted(first) == sorted(second)
    assert first != second
    answers = engine.generate([first, second], max_new_tokens=4)
    assert answers[0].ids != answers[1].ids
    twice, other = (engine.encode("same?", images=[red, second]) for second in (red, shape("blue")))
    (mine,), (theirs,) = (images.grid_positions(engine.model, [prompt]) for prompt in (twice, other))
    assert torch.equal(mine, theirs)  # one image twice has the positions of two


def test_vectors_that_were_dropped_are_made_again(monkeypatch):
    engine = opened()
    prompts = [engine.encode("what?", images=image) for image in shapes()]
    kept = engine.generate(prompts, max_new_tokens=4)
    none = opened()
    monkeypatch.setitem(images._VECTORS, none.model, ImageVectors(none.model, budget=0))
    assert [one.ids for one in none.generate(prompts, max_new_tokens=4)] == [one.ids for one in kept]
    assert images._VECTORS[none.model].cache.nbytes == 0 < images._VECTORS[engine.model].cache.nbytes


def test_vectors_of_other_weights_are_other_vectors():
    engine = opened()
    prompt = engine.encode("what?", images=shape("red"))
    before = engine.logits(torch.tensor([prompt]))
    with torch.no_grad():
        engine.model.model.multi_modal_projector.linear_2.weight.mul_(2)
    after = engine.logits(torch.tensor([prompt]))
    fresh = opened()
    with torch.no_grad():
        fresh.model.model.multi_modal_projector.linear_2.weight.mul_(2)
    assert not torch.equal(before, after)
    assert torch.equal(after, fresh.logits(torch.tensor([prompt])))


def test_a_model_that_reads_images_otherwise_is_refused(monkeypatch):
    monkeypatch.setattr(images, "TESTED", ())
    engine = opened()
    plain = engine.generate([engine.encode("what?", images=shape("red"))], max_new_tokens=2)
    assert plain[0].ids == opened().generate([engine.encode("what?", images=shape("red"))], max_new_tokens=2)[0].ids
    other = opened()
    read = other.model.forward

    def twice(*args, pixel_values=None, **inputs):  # as a model that adds the image to its layers too
        out = read(*args, pixel_values=pixel_values, **inputs)
        if pixel_values is not None:
            out.logits = out.logits + 1
        return out

    monkeypatch.setattr(other.model, "forward", twice)
    with pytest.raises(BaseModelError, match="llava"):
        other.generate([other.encode("what?", images=shape("red"))], max_new_tokens=2)


def test_an_image_that_depends_on_the_mix_is_refused():
    from peft import get_peft_model

    from sigmix import SVFConfig

    model, processor = vlm()
    wrapped = get_peft_model(model, SVFConfig(target_modules=["q_proj", "model.multi_modal_projector.linear_1"]))
    engine = Engine(wrapped, bind(processor))
    assert engine.generate(["text"], max_new_tokens=1)
    with pytest.raises(ConfigError, match="multi_modal_projector"):
        engine.generate([engine.encode("what?", images=shape("red"))], max_new_tokens=1)


def test_a_search_and_a_strategy_show_the_images_too():
    from sigmix.adapt import FewShotSearch
    from sigmix.adapt.few_shot import Example
    from sigmix.evals.strategies import measure_strategy
    from sigmix.tasks.base import Sample, Score, Task

    class Looking(Task):
        name, max_new_tokens = "looking", 3

        def samples(self, split, n=None, seed=0):
            return [Sample.make("what?", "x", images=[picture(image)]) for image in shapes()]

        def score(self, sample, reply):
            return Score.of(False, reply)

    engine = opened(bank={"a": expert(vlm()[0], "a", 0)})
    examples = [Example("what?", "red", images=(shape("red"),)), Example("what?", "blue", images=(shape("blue"),))]
    search = FewShotSearch(engine, examples, lambda one, reply: 0.0, population=2, iterations=1, max_new_tokens=2)
    assert all(isinstance(row, ImagePrompt) for row in search.rows)
    assert set(search.fit().weights) <= {"a"}
    samples = Looking().samples("test")
    result, _ = measure_strategy(engine, Looking(), samples, Mix.one("a"))
    prompts = [engine.encode("what?", images=image) for image in shapes()]
    assert [i.reply for i in result.items] == [g.text for g in engine.generate(prompts, mix="a", max_new_tokens=3)]
    assert len({item.reply for item in result.items}) == 3


def test_what_cannot_be_shown(tmp_path, tiny_tokenizer):
    engine = opened()
    with pytest.raises(ConfigError, match="llava-hf/"):
        encode(tiny_tokenizer, "what?", images=shape("red"))
    with pytest.raises(ConfigError, match="<image>"):
        engine.encode("what <image> is this?")
    with pytest.raises(DataError, match=r"gone\.png"):
        engine.encode("what?", images=tmp_path / "gone.png")
    with pytest.raises(ContextError, match="prompt 0 has"):
        Engine(*_short()).generate([engine.encode("what?", images=shape("red"))], max_new_tokens=8)


def _short():
    model, processor = vlm(max_position_embeddings=40)
    return model, bind(processor)
