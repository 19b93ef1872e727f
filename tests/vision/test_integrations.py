"""Vision-language bases in the evaluation harness and in TRL's data sets: no text and no image gets lost unsaid."""

from __future__ import annotations

import pytest
import torch
from helpers_vision import saved, shape, vlm

from sigmix.engine.tokenization import encode
from sigmix.errors import ConfigError
from sigmix.models.multimodal import bind
from sigmix.tasks.base import Sample
from sigmix.utils.images import pictures


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("seeing") / "base")


def harness_model(place):
    lm_eval = pytest.importorskip("sigmix.integrations.lm_eval", exc_type=ImportError)
    return lm_eval.SigmixLM(str(place), dtype="float32", device="cpu")


@torch.no_grad()
def test_the_harness_sends_the_prompts_of_the_engine(place):
    from lm_eval.api.instance import Instance

    model = harness_model(place)
    assert model.max_length == 256
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "what is it?"}]
    text = model.apply_chat_template(turns)
    assert "what is it?" in text
    ids = model.engine.encode("what is it?", "Be brief.")
    assert model.tok_encode(text) == ids
    assert model.chat_template(True) == model.tokenizer.sigmix_processor.chat_template
    answer = model.tok_encode("red", add_special_tokens=False)
    request = Instance("loglikelihood", {}, (text, "red"), 0)
    ((logprob, _),) = model.loglikelihood([request], True)
    scores = model.engine.logits(torch.tensor([[*ids, *answer]]))[0, len(ids) - 1 : -1].log_softmax(-1)
    assert logprob == pytest.approx(float(scores.gather(1, torch.tensor(answer)[:, None]).sum()), rel=1e-4, abs=1e-3)


def test_the_harness_refuses_images_in_prompts(place):
    model = harness_model(place)
    with pytest.raises(ConfigError, match="<image>"):
        model.apply_chat_template([{"role": "user", "content": "what is <image>?"}])
    with pytest.raises(ConfigError, match="<image>"):
        model.tok_encode("what is <image>?")
    model.tokenizer.sigmix_processor.chat_template = None
    with pytest.raises(ConfigError, match="--apply_chat_template"):
        model.chat_template(True)


def trl_data():
    return pytest.importorskip("sigmix.integrations.trl", exc_type=ImportError)


def test_samples_with_images_are_no_data_set_for_trl():
    data, (model, processor) = trl_data(), vlm()
    samples = [Sample.make("what?", "red", images=pictures([shape("red")]))]
    samples = [Sample.make("and?", "blue"), *samples]
    for make in (lambda: data.prompt_dataset(samples, bind(processor)),
                 lambda: data.gold_dataset(samples, model, bind(processor))):  # fmt: skip
        with pytest.raises(ConfigError, match=r"'what\?'.* -> .*sigmix train"):
            make()


@pytest.mark.parametrize("template", ["the same", "none", "of text"])
def test_trl_gets_a_vision_models_prompts_whole_or_not_at_all(template):
    data, (model, processor) = trl_data(), vlm()
    tokenizer, samples = bind(processor), [Sample.make("what?", "red", system="Be brief.")]
    if template != "none":
        tokenizer.chat_template = processor.chat_template
    if template == "of text":  # one that takes plain contents, as TRL has them, and writes what the processor writes
        tokenizer.chat_template = (
            "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '<eos>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
        )
        assert data.prompt_dataset(samples, tokenizer)[0]["prompt"][-1]["content"] == "what?"
        return
    with pytest.raises(ConfigError, match="SFTTrainer"):
        data.prompt_dataset(samples, tokenizer)
    (row,) = data.gold_dataset(samples, model, tokenizer)
    prompt = encode(tokenizer, "what?", "Be brief.")
    assert row["input_ids"][: len(prompt)] == prompt
