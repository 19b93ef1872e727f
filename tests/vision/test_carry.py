"""Text experts in a vision model: the same weights are the same expert; others are refused, or carried on purpose."""

from __future__ import annotations

import pytest
import torch
from helpers_engine import expert
from helpers_experts import at
from helpers_tiny import build_tiny, build_tokenizer
from helpers_vision import saved, shape, vlm

from sigmix import Bank, Engine, Expert, Mix, load_base
from sigmix.errors import ExpertError, FingerprintError
from sigmix.experts.transfer import carry, compare
from sigmix.models.multimodal import bind

pytest_plugins = ["helpers_cli"]


def text_model():
    return build_tiny("llama", seed=5, tie_word_embeddings=False)


def with_its_words(kind="llava", model=None):
    """A vision-language model whose language backbone is the text model's."""
    seeing, processor = model or vlm(kind)
    seeing.model.language_model.load_state_dict(text_model().model.state_dict())
    seeing.lm_head.load_state_dict(text_model().lm_head.state_dict())
    return seeing, processor


@pytest.fixture
def words():
    return expert(text_model(), "words", seed=3).with_meta(metrics=[{"name": "test accuracy", "value": 0.5}])


def test_an_expert_of_the_same_backbone_does_there_what_it_did(words):
    seeing, processor = with_its_words()
    carried = carry(words, seeing)
    carried.check(seeing)
    origin = carried.meta["carried_from"]
    assert (origin["basis"], origin["base"], origin["digest"]) == ("same", "LlamaForCausalLM", words.digest)
    assert origin["deviation"]["same"] == origin["deviation"]["matrices"] == len(carried.z) == 14
    assert all(path.startswith("model.language_model.layers.") for path in carried.z)
    assert "metrics" not in carried.meta  # measured on the text model, and kept with where it came from
    assert origin["metrics"][0]["value"] == 0.5
    ids = torch.tensor([list(range(4, 40))])
    assert carry(at("prompt", words), seeing).positions == "prompt"
    there = Engine(seeing, bind(processor), bank={"words": carried}).logits(ids, mix=Mix.one("words"))
    here = Engine(text_model(), build_tokenizer(), bank={"words": words}).logits(ids, mix=Mix.one("words"))
    assert torch.equal(there, here)
    assert not torch.equal(here, Engine(text_model(), build_tokenizer()).logits(ids))


def test_it_answers_about_images_beside_others(words):
    seeing, processor = with_its_words(model=vlm("llava", max_position_embeddings=512))
    engine = Engine(seeing, bind(processor), bank={"words": carry(words, seeing)})
    prompt = engine.encode("what?", images=shape("red"))
    together = engine.generate([prompt, prompt], mix=[Mix.one("words"), Mix.base()], max_new_tokens=4)
    assert together[0].ids != together[1].ids
    assert together[1].ids == engine.generate([prompt], max_new_tokens=4)[0].ids


def test_another_backbone_is_refused_with_figures_and_taken_on_purpose(words, tmp_path):
    seeing, _ = with_its_words()
    with torch.no_grad():
        seeing.model.language_model.layers[1].mlp.up_proj.weight.add_(0.05)
    with pytest.raises(ExpertError, match=r"at most \(model\.layers\.1\.mlp\.up_proj\); 13 of 14 matrices"):
        carry(words, seeing)
    carried = carry(words, seeing, force=True)
    assert carried.meta["carried_from"]["basis"] == "differs"
    for path, z in words.z.items():
        assert torch.equal(carried.z[path.replace("model.", "model.language_model.", 1)], z)
    carried.save_pretrained(tmp_path / "words")
    again = Expert.from_pretrained(tmp_path / "words", base=seeing)
    assert again == carried
    assert "other weights, by index order" in (tmp_path / "words/README.md").read_text()
    with pytest.raises(FingerprintError):
        again.check(with_its_words()[0])


def test_weights_are_compared_where_the_old_base_is_there(words):
    base = text_model()
    same = compare(words, with_its_words()[0], base)
    assert same.by == "weights"
    assert same.same
    assert set(same.deviations.values()) == {0.0}
    other = compare(words, vlm(seed=8)[0], base)
    assert not other.same
    assert 1.2 < other.figures()["median"] < 1.6  # √2: as far as unrelated matrices are
    with pytest.raises(FingerprintError, match="was made on"):
        compare(words, with_its_words()[0], build_tiny("llama", seed=6, tie_word_embeddings=False))


def test_an_expert_without_sketches_needs_its_base(words):
    bare = Expert("bare", words.z)
    with pytest.raises(ExpertError, match=r"has no sketches.*\(--from BASE\)"):
        carry(bare, with_its_words()[0])
    assert carry(bare, with_its_words()[0], base=text_model()).meta["carried_from"]["basis"] == "same"
    forced = carry(bare, with_its_words()[0], force=True).meta["carried_from"]
    assert (forced["basis"], forced["deviation"]) == ("differs", None)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"hidden_size": 32}, "has 64 components, and .* is 32×96"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\..*model\.language_model.*7 of 14"),
    ],
)
def test_even_on_purpose_the_sizes_must_fit(words, sizes, message):
    with pytest.raises(ExpertError, match=message):
        carry(words, vlm("llava", **sizes)[0], force=True)


def test_to_a_text_model_of_another_make(words):
    carried = carry(words, build_tiny("qwen2"), force=True)
    assert set(carried.z) == set(words.z)
    with pytest.raises(ExpertError, match="14 of 14 are missing"):
        carry(words, build_tiny("gpt2"), force=True)


def test_an_expert_of_a_quantised_base_is_carried_to_one_quantised_alike(tmp_path, run):
    pytest.importorskip("torchao")
    text_model().save_pretrained(tmp_path / "text")
    build_tokenizer().save_pretrained(tmp_path / "text")
    seeing, processor = with_its_words()
    seeing.save_pretrained(tmp_path / "seeing")
    processor.save_pretrained(tmp_path / "seeing")
    model = load_base(tmp_path / "text", "float32", quantization_config="int8")[0]
    carried = expert(model, "words", seed=3)
    Bank(tmp_path / "bank", create=True).add(carried)
    assert carried.meta["base"]["dtype"] == "float32 in int8"
    common = ("experts", "carry", "words", "--bank", tmp_path / "bank", "--to", tmp_path / "seeing", "--json")
    done = run(*common, "--out", tmp_path / "carried/one")
    assert done.code == 0, done.err
    assert done.json["basis"] == "same"
    assert Expert.from_pretrained(tmp_path / "carried/one").meta["base"]["dtype"] == "float32 in int8"
    assert run(*common, "--out", tmp_path / "carried/two", "--from", tmp_path / "text").json["basis"] == "same"


def test_the_command(words, tmp_path, run, refused):
    seeing, processor = with_its_words()
    seeing.save_pretrained(tmp_path / "seeing")
    processor.save_pretrained(tmp_path / "seeing")
    saved(tmp_path / "other", seed=8)
    bank = Bank(tmp_path / "bank", create=True)
    bank.add(words)
    common = ("experts", "carry", "words", "--bank", bank.folder)
    done = run(*common, "--to", tmp_path / "seeing", "--out", tmp_path / "carried/words", "--json")
    assert done.json["basis"] == "same"
    assert done.json["matrices"] == 14
    assert Expert.from_pretrained(tmp_path / "carried/words").meta["base"]["name"] == str(tmp_path / "seeing")
    assert "carried from: LlamaForCausalLM (same weights" in run("experts", "show", tmp_path / "carried/words").out
    again = refused(*common, "--to", tmp_path / "seeing", "--out", tmp_path / "carried/words")
    assert "holds an expert already" in again
    text = refused(*common, "--to", tmp_path / "other", "--out", tmp_path / "carried/second")
    assert "0 of 14 matrices are the same -> to carry it anyway: --force" in text
    assert not (tmp_path / "carried/second").exists()
    forced = run(*common, "--to", tmp_path / "other", "--out", tmp_path / "carried/second", "--force")
    assert "FORCED: weights differ by" in forced.out
